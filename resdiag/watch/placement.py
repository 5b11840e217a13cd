"""Chooses the ports at which a later pass is read: which tensor is read where, and why not."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from resdiag.watch.base.tensors import tensors_in
from resdiag.watch.ports import BlockPlan, Plan, Port, Trail, is_in

ENDS = -1
"""The row of the classifier."""

OPERANDS = "operands"
"""Stands for both operands of an addition, which are read at the operation itself."""


@dataclass(frozen=True, order=True)
class Role:
    """What a tensor at a port is: a row of the plan and a site, or the index of an activation."""

    row: int
    order: int
    site: str
    index: int = 0


@dataclass(eq=False)
class Reads:
    """Where a later pass is read.

    Attributes:
        modules: Per module, direction and number of the call: places and what is there.
        operations: Per module, number of its call, operation and ordinal: the same.
        needs: Per row of the plan, what must be seen before its operands are complete.
        order: The rows in the order in which their sums, or a unit's output, are seen.
        reason: Why the plan cannot be read, or "".
    """

    modules: dict[str, dict[tuple[bool, int], list[tuple[int | str | None, list[Role]]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    operations: dict[str, dict[tuple[int, str, int], list[tuple[Port, list[Role]]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    needs: list[frozenset[str]] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    reason: str = ""


def place_reads(plan: Plan, kept: frozenset[int], *, core: bool) -> Reads:
    """Choose a port for every tensor of interest.

    Args:
        plan: The plan.
        kept: `id` of tensors that stay from pass to pass: parameters and buffers.
        core: Whether only the core set is recorded.
    """
    reads, roles = Reads(reason=plan.flaw), dict[Port, list[Role]]()
    times: list[int] = []
    for row, block in enumerate(plan.blocks):
        reads.reason = reads.reason or _why_not(block, kept)
        if reads.reason:
            return reads
        found = dict(_of_block(block)) if block.unit is None else dict(_of_unit(block))
        for site, port in found.items():
            if port is None:
                reads.reason = f"nothing shows the {site} of block {block.key[0]}"
                return reads
            roles.setdefault(port, []).append(Role(row, _ORDER.index(site), site))
        times.append(_time_of(block, found))
        both = () if block.unit is not None else ("branch", "shortcut")
        reads.needs.append(frozenset([*both, *(site for site in found if site == "input")]))
        for index, (_, trail) in enumerate(() if core else block.activations):
            port = trail.value_port(block.key[0])
            if port is None:
                reads.reason = f"nothing shows an activation of block {block.key[0]}"
                return reads
            roles.setdefault(port, []).append(
                Role(row, _ORDER.index("activation"), "activation", index)
            )
    for site, end in (("features", plan.features), ("logits", plan.logits)):
        port = None if end is None else end.value_port()
        if port is not None:
            roles.setdefault(port, []).append(Role(ENDS, 0, site))
    reads.order = sorted(range(len(times)), key=times.__getitem__)
    for port, several in roles.items():
        if port.operation:
            where = port.call, port.operation, port.ordinal
            reads.operations[port.module][where].append((port, sorted(several)))
        else:
            at = port.is_output, port.call
            reads.modules[port.module][at].append((port.place, sorted(several)))
    return reads


_ORDER = ("input", "branch", "shortcut", OPERANDS, "sum", "activation", "output")
"""In which order what is at one port is told."""


def _why_not(block: BlockPlan, kept: frozenset[int]) -> str:
    """Why a block cannot be seen without following the pass, or ""."""
    if block.extended:
        return f"block {block.key[0]} has parallel branches, whose sum is no tensor of the pass"
    calls = [call for call, _ in block.activations]
    if block.addition is not None:
        calls += [*(block.addition.path or ()), *block.after]
        if block.addition.is_gated:
            return f"a gate is on the shortcut of block {block.key[0]}"
        if block.output is None or block.sum is None:
            return f"block {block.key[0]} did not end"
    for call in calls:
        if any(id(x) not in kept for x in tensors_in((call.args, call.kwargs))):
            return f"{call.name} in block {block.key[0]} takes another tensor of the pass"
    return ""


def _of_unit(block: BlockPlan) -> Iterator[tuple[str, Port | None]]:
    for site in ("input", "output"):
        trail = block.trail(site)
        if trail is not None:
            yield site, trail.value_port(block.key[0])


def _of_block(block: BlockPlan) -> Iterator[tuple[str, Port | None]]:
    """Ports of a residual block, each before the tensor can be overwritten."""
    owner = block.key[0]
    found = {
        site: _before(trail, owner, block.begin)
        for site in ("input", "branch", "shortcut")
        if (trail := block.trail(site)) is not None
    }
    both = found.get("branch"), found.get("shortcut")
    if any(port is None or port.operation for port in both):
        found.pop("branch", None)
        found.pop("shortcut", None)
        found[OPERANDS] = block.junction
        if block.input is not None and found["input"] is None:
            found["input"] = _before(block.input, owner, block.begin, operations=True)
    output = block.output
    end = None if output is None else output.value_port(owner)
    yield from found.items()
    if block.sum is output:
        yield "sum", end
    elif block.sum is not None and output is not None:
        first = min((visit.time for visit in output.visits), default=0)
        yield "sum", _before(block.sum, owner, first, operations=True)
    yield "output", end


def _before(trail: Trail, owner: str, time: int, *, operations: bool = True) -> Port | None:
    """A port of a tensor that it passes before a time."""
    early = [visit for visit in trail.visits if visit.time < time]
    ordered = sorted(early, key=lambda v: (bool(v.port.operation), not is_in(v.port.module, owner)))
    return next((v.port for v in ordered if operations or not v.port.operation), None)


def _time_of(block: BlockPlan, found: dict[str, Port | None]) -> int:
    """When a block's sum, or a unit's output, passes the port at which it is read."""
    trail = block.output if block.unit is not None else block.sum
    port = found["output" if block.unit is not None else "sum"]
    visits = () if trail is None else trail.visits
    return next((visit.time for visit in visits if visit.port == port), 0)
