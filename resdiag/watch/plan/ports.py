"""Where the tensors of a model's blocks can be seen again in a later pass: the plan.

A pass that is traced shows every operation. A later pass shows only what hooks see: what modules
take and return, and, where a torch function mode is entered, what operations take and return. A
`Port` names such a place; a `Plan` says which tensor of which block was seen at which ports.
`survey` writes it, `place_reads` chooses the ports to read, `verify` tells whether a later pass is
the one that was planned.
"""

import math
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from resdiag.watch.base.functions import ACTIVATIONS, NORMALISATIONS, Call
from resdiag.watch.base.tensors import tensors_in
from resdiag.watch.find.additions import ADDITIONS, Addition
from resdiag.watch.find.blocks import Anatomy
from resdiag.watch.find.units import Unit

OPERATIONS = frozenset(f.__name__ for f in ADDITIONS) | ACTIVATIONS | NORMALISATIONS | {"linear"}
"""Names of the functions that are counted, so that one of them can be found again in a pass."""


@dataclass(frozen=True)
class Port:
    """One argument or result of one call of a module, or of an operation in its own forward."""

    module: str
    call: int  # how many calls of it came before in the pass
    is_output: bool  # whether the tensor leaves the module, or the operation
    place: int | str | None  # position or keyword, in a result position or key; None for all
    operation: str = ""  # the operation's name, "" for the module itself
    ordinal: int = 0  # how many operations of that name came before in this call of the module
    writes: bool = False  # whether the operation writes into its operand


@dataclass(eq=False)
class Visit:
    """A tensor at a port: when it came by, and when that module's call ended."""

    port: Port
    time: int
    end: int


@dataclass(eq=False)
class Trail:
    """One tensor of one pass: where it passed and when it was used."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    visits: list[Visit] = field(default_factory=list)  # ports, in time order
    uses: list[int] = field(default_factory=list)  # times at which an operation read it
    wrapped: bool = False  # FSDP hands on another tensor of these values where a module begins

    def value_port(
        self, owner: str = "", before: float = math.inf, known: Container[Port] = ()
    ) -> Port | None:
        """A port at which it can be read before a time: rather a module's than an operation's.

        Rather one that is read anyway (`known`: each hook costs) than one inside `owner`.
        """
        ports = [visit.port for visit in self.visits if visit.time < before]
        known = () if self.wrapped else known
        ports.sort(key=lambda p: (bool(p.operation), p not in known, not is_in(p.module, owner)))
        return next(iter(ports), None)

    def gradient_port(self, *, operations: bool = False) -> Port | None:
        """A port that all its uses come after, so that the gradient there is the whole one."""
        for visit in self._takers(operations=operations):
            after = all(visit.time < time for time in self.uses)
            if after and (visit.port.is_output or all(time < visit.end for time in self.uses)):
                return visit.port
        return None

    def operand_port(self, begin: int) -> Port | None:
        """A port after which nothing but the addition that began at `begin` uses it."""
        for visit in reversed(self._takers(operations=False)):
            later = [time for time in self.uses if time > visit.time]
            inside = visit.port.is_output or all(time < visit.end for time in later)
            if visit.time < begin and len(later) == 1 and later[0] > begin and inside:
                return visit.port
        return None

    def _takers(self, *, operations: bool) -> list[Visit]:
        """Ports of modules, or of operations, where another tensor may take its place."""
        of_kind = [visit for visit in self.visits if bool(visit.port.operation) == operations]
        takers = [visit for visit in of_kind if visit.port.is_output or not visit.port.writes]
        # who calls y.add_(f) need not go on with what it returns
        return sorted(takers, key=lambda visit: visit.port.writes)


def is_in(module: str, owner: str) -> bool:
    """Whether a module is another one or inside it, by their names."""
    return not owner or f"{module}.".startswith(f"{owner}.")


@dataclass(eq=False)
class BlockPlan:
    """The tensors of one block; None where the block has no such tensor."""

    key: tuple[str, int]  # what names the block in every pass
    addition: Addition | None
    unit: Unit | None  # the unit; None for a residual block
    begin: int  # when the addition began
    junction: Port | None = None  # the addition's own operation, its ordinal among the module's
    input: Trail | None = None  # x
    branch: Trail | None = None  # F(x)
    shortcut: Trail | None = None  # h(x)
    sum: Trail | None = None  # u
    output: Trail | None = None  # H
    joined: bool = True  # whether x is the output of the block before, or this is the first block
    projection: Port | None = None  # where x enters the module that makes h of it, if one does
    activations: list[tuple[Call, Trail]] = field(default_factory=list)  # and what goes into each
    extended: bool = False  # whether a second addition gave it one more branch
    features: tuple[int | None, int | None] = (None, None)  # channel dimensions of a unit's ends

    def trail(self, site: str) -> Trail | None:
        """The tensor at one of the catalogue's `SITES`."""
        found: Trail | None = getattr(self, site)
        return found

    @property
    def after(self) -> tuple[Call, ...]:
        """The calls that turn the sum into the output."""
        return () if self.addition is None else self.addition.after


@dataclass(eq=False)
class Plan:
    """What one traced pass showed."""

    anatomy: Anatomy
    blocks: list[BlockPlan] = field(default_factory=list)  # their tensors, in the order of the pass
    features: Trail | None = None  # input of the last linear layer
    logits: Trail | None = None  # its output
    calls: dict[str, int] = field(default_factory=dict)  # how often each module was called
    # per call of a module, how often it did which operation of `OPERATIONS` itself
    operations: dict[tuple[str, int], dict[str, int]] = field(default_factory=dict)
    flaw: str = ""  # why no later pass can be compared with it, or ""


def example(given: object) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Positional and keyword inputs from a tuple, a mapping or a single input."""
    if isinstance(given, Mapping):
        return (), {str(name): value for name, value in given.items()}
    return (tuple(given) if isinstance(given, tuple | list) else (given,)), {}


ENDS = -1  # the row of the classifier
OPERANDS = "operands"  # both operands of an addition, which are read at the operation itself


@dataclass(frozen=True, order=True)
class Role:
    """What a tensor at a port is: a row of the plan and a site, or the index of an activation."""

    row: int
    order: int
    site: str
    index: int = 0


@dataclass(eq=False)
class Reads:
    """Where a later pass is read."""

    modules: dict[str, dict[tuple[bool, int], list[tuple[int | str | None, list[Role]]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )  # per module, direction and number of the call: places and what is there
    operations: dict[str, dict[tuple[int, str, int], list[tuple[Port, list[Role]]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )  # per module, number of its call, operation and ordinal: the same
    # per row of the plan, what must be seen before its operands are complete
    needs: list[frozenset[str]] = field(default_factory=list)
    # the rows in the order in which their sums, or a unit's output, are seen
    order: list[int] = field(default_factory=list)
    reason: str = ""  # why the plan cannot be read, or ""


def place_reads(plan: Plan, kept: frozenset[int], *, core: bool) -> Reads:
    """Choose a port for every tensor of interest; `kept`: `id` of parameters and buffers."""
    reads, roles = Reads(reason=plan.flaw), defaultdict[Port, list[Role]](list)
    times: list[int] = []
    for row, block in enumerate(plan.blocks):
        reads.reason = reads.reason or _why_not(block, kept)
        if reads.reason:
            return reads
        owner, found = block.key[0], dict(_found(block, roles))
        wanted = [(site, 0, port) for site, port in found.items()]
        for index, (_, trail) in enumerate(() if core else block.activations):
            wanted.append(("activation", index, trail.value_port(owner)))
        for site, index, port in wanted:
            if port is None:
                reads.reason = f"nothing shows the {site} of block {owner}"
                return reads
            roles[port].append(Role(row, _ORDER.index(site), site, index))
        times.append(_time_of(block, found))
        both = () if block.unit is not None else ("branch", "shortcut")
        reads.needs.append(frozenset([*both, *found.keys() & {"input"}]))
    for site, end in (("features", plan.features), ("logits", plan.logits)):
        if end is not None and (port := end.value_port()) is not None:
            roles[port].append(Role(ENDS, 0, site))
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
"""The order of the events of tensors at one port."""


def _why_not(block: BlockPlan, kept: frozenset[int]) -> str:
    """Why a block cannot be seen without following the pass, or ""."""
    if block.extended:
        return f"block {block.key[0]} has parallel branches, whose sum is not a tensor of the pass"
    calls = [call for call, _ in block.activations]
    if block.addition is not None:
        calls += [*(block.addition.path or ()), *block.after]
        if block.addition.is_gated:
            return f"a gate is on the shortcut of block {block.key[0]}"
    for call in calls:
        if any(id(x) not in kept for x in tensors_in((call.args, call.kwargs))):
            return f"{call.name} in block {block.key[0]} takes another tensor of the pass"
    return ""


def _found(block: BlockPlan, known: Container[Port]) -> Iterator[tuple[str, Port | None]]:
    """Ports of a unit, or of a residual block, each before the tensor can be overwritten."""
    owner = block.key[0]
    if block.unit is not None:
        ends = (("input", block.input), ("output", block.output))
        yield from ((site, x.value_port(owner, known=known)) for site, x in ends if x is not None)
        return
    found = {
        site: trail.value_port(owner, block.begin, known)
        for site in ("input", "branch", "shortcut")
        if (trail := block.trail(site)) is not None
    }
    both = found.get("branch"), found.get("shortcut")
    if any(port is None or port.operation for port in both):
        found.pop("branch", None)
        found.pop("shortcut", None)
        found[OPERANDS] = block.junction
    output = block.output
    end = None if output is None else output.value_port(owner)
    yield from found.items()
    if block.sum is output:
        yield "sum", end
    elif block.sum is not None and output is not None:
        first = min((visit.time for visit in output.visits), default=0)
        yield "sum", block.sum.value_port(owner, first)
    yield "output", end


def _time_of(block: BlockPlan, found: dict[str, Port | None]) -> int:
    """When a block's sum, or a unit's output, passes the port at which it is read."""
    site = "sum" if block.unit is None else "output"
    trail = block.trail(site)
    visits = () if trail is None else trail.visits
    return next((visit.time for visit in visits if visit.port == found[site]), 0)
