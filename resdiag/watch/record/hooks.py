"""Reads a pass that is expected to be the planned one, by hooks at the places of the plan.

It tells the recorder what a traced pass tells it: operands, sums, ends of blocks, activations, the
classifier. Whether the pass was the planned one is known when it has ended (`verify`).
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from resdiag.watch.base.functions import compose
from resdiag.watch.base.safety import guarded, never_alone
from resdiag.watch.base.tensors import tensors_in
from resdiag.watch.find.additions import read_sum
from resdiag.watch.find.passes import Operands
from resdiag.watch.plan.ports import ENDS, OPERANDS, BlockPlan, Plan, Port, Reads, Role
from resdiag.watch.plan.verify import PassGraph, Pattern
from resdiag.watch.record.forward import Recorder
from resdiag.watch.record.operations import Handler, Operations


@dataclass(eq=False)
class Expected:
    """A pass that was traced, and how to recognise and read the next one like it."""

    plan: Plan
    reads: Reads
    pattern: Pattern
    unseen: frozenset[int]  # rows that no gradient shows: there the numbers are compared
    names: Mapping[str, nn.Module]
    kept: frozenset[int]  # `id` of the model's parameters and buffers


@dataclass(eq=False)
class _Seen:
    """What was seen of one block so far."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    told: int = 0  # how many of operands, sum, output; -1 if one came out of turn
    last: Tensor | None = None  # first samples of what the next tensor should be


class TappedPass:
    """One forward pass that is read at the places of a plan; `ended` is told whether it fitted."""

    def __init__(
        self, expected: Expected, recorder: Recorder, ended: Callable[[bool], None]
    ) -> None:
        self.guard = recorder.guard
        self._expected, self._recorder, self._ended = expected, recorder, ended
        self._blocks = expected.plan.blocks
        self._graph, self._thread = PassGraph(expected.kept), get_ident()
        self._seen = [_Seen() for _ in self._blocks]
        self._ends: dict[str, Tensor] = {}
        self._order: list[int] = []
        self._operations: Operations | None = None
        self._entered = ExitStack()
        self._calls: dict[tuple[str, bool], int] = defaultdict(int)

    def start(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model's forward begins."""
        with torch._C.DisableTorchFunction():
            self._recorder.started([*tensors_in(args), *tensors_in(kwargs)])
        reads, names = self._expected.reads, self._expected.names
        for name, at in reads.modules.items():
            module = names[name]
            if module is root:
                self._look((name, False), at, args, kwargs)
                continue
            if any(not is_output for is_output, _ in at):
                enter = self._enter(name, module, at)
                handle = module.register_forward_pre_hook(enter, with_kwargs=True)
                self._entered.callback(handle.remove)
            if any(is_output for is_output, _ in at):
                handle = module.register_forward_hook(self._leave(name, module, at))
                self._entered.callback(handle.remove)
        self._enter_operations(root)

    def _enter_operations(self, root: nn.Module) -> None:
        """Follow operations where the plan has some, or where the graph cannot tell their order."""
        at = dict(self._expected.reads.operations)
        if self._expected.unseen:
            at |= {name: {} for name in self._expected.names if name not in at}
        if not at:
            return
        handlers = {name: Handler(there, self._operate) for name, there in at.items()}
        mode = self._operations = Operations(self._expected.plan, handlers, self._expected.names)
        for handle in mode.install():
            self._entered.callback(handle.remove)
        if "" in mode.frames:  # its forward has begun already
            mode.frames[""].before(root, None)
        self._entered.enter_context(mode)

    def finish(self, root: nn.Module, output: object) -> None:
        """It has ended as it should."""
        if (at := self._expected.reads.modules.get("")) is not None:
            self._look(("", True), at, output, None)
        self._entered.close()
        with torch._C.DisableTorchFunction():
            self._end([*tensors_in(output)])

    def stop(self) -> None:
        """Remove the hooks and let go of every tensor; safe to call twice."""
        self._entered.close()
        self._operations, self._seen, self._ends = None, [], {}
        self._graph = PassGraph(frozenset())

    def same(self, old: Tensor, new: Tensor) -> None:
        """A wrapper of a module's handed on `old` as another tensor."""
        self._recorder.same(old, new)

    def _enter(self, name: str, owner: nn.Module, at: Mapping[Any, Any]) -> Callable[..., None]:
        @never_alone
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is owner and get_ident() == self._thread:
                self._look((name, False), at, args, kwargs)

        return enter

    def _leave(self, name: str, owner: nn.Module, at: Mapping[Any, Any]) -> Callable[..., None]:
        @never_alone
        def leave(module: nn.Module, args: object, output: object) -> None:
            if module is owner and get_ident() == self._thread:
                self._look((name, True), at, output, None)

        return leave

    @guarded
    def _look(
        self,
        key: tuple[str, bool],
        at: Mapping[tuple[bool, int], list[tuple[int | str | None, list[Role]]]],
        values: Any,  # noqa: ANN401
        keywords: Mapping[str, Any] | None,
    ) -> None:
        """One side of a call of a module: see what the plan has there."""
        call = self._calls[key]
        self._calls[key] = call + 1
        for place, roles in at.get((key[1], call), ()):
            if place is None:
                x = values
            elif keywords is not None and isinstance(place, str):
                x = keywords.get(place)
            else:
                x = _at(values, place)
            if isinstance(x, Tensor):
                with torch._C.DisableTorchFunction():
                    for role in roles:
                        self._see(role, x)

    @guarded
    def _operate(
        self,
        port: Port,
        roles: list[Role],
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: object,
    ) -> None:
        """An operation of the plan runs, or has run: `result` is None before."""
        for role in roles:
            if role.site == OPERANDS:
                if result is None:
                    self._see_operands(role, func, args, kwargs)
                continue
            if port.is_output is (result is None):
                continue
            x = result
            if not port.is_output:
                x = kwargs.get(port.place) if isinstance(port.place, str) else _at(args, port.place)
            if isinstance(x, Tensor):
                self._see(role, x)

    def _see_operands(
        self, role: Role, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        addition, spelled = self._blocks[role.row].addition, read_sum(func, args, kwargs)
        if addition is None or spelled is None:
            return
        sides = spelled.left, spelled.right
        shortcut, branch = sides[::-1] if addition.swapped else sides
        if (shortcut.scale, branch.scale) == (addition.shortcut_scale, addition.branch_scale):
            self._see(Role(role.row, 0, "branch"), branch.make())
            self._see(Role(role.row, 0, "shortcut"), shortcut.make())

    def _see(self, role: Role, x: Tensor) -> None:
        """A tensor of the plan has come."""
        row, site = role.row, role.site
        if row == ENDS:
            self._ends[site] = x
            return
        block, seen = self._blocks[row], self._seen[row]
        if site == "activation":
            self._recorder.activation(block.activations[role.index][0], x)
            return
        self._graph.see(row, site, x)
        if block.unit is not None:
            self._see_unit(row, block, site, x)
        elif site == "sum":
            self._tell_sum(row, block, seen, x)
        elif site == "output":
            self._tell_output(row, block, seen, x)
        else:
            seen.tensors[site] = x
            if seen.told == 0 and self._expected.reads.needs[row] <= seen.tensors.keys():
                self._tell_operands(row, block, seen)

    def _tell_operands(self, row: int, block: BlockPlan, seen: _Seen) -> None:
        tensors, addition = seen.tensors, block.addition
        assert addition is not None
        operands = Operands(tensors.get("input"), tensors["branch"], tensors["shortcut"])
        if row in self._expected.unseen:
            head = self._recorder.skip.head
            h, f = head(operands.shortcut), head(operands.branch)
            seen.last = h * addition.shortcut_scale + f * addition.branch_scale
        self._tell(seen, 0, self._recorder.operands, addition, operands)
        seen.tensors = {}

    def _tell_sum(self, row: int, block: BlockPlan, seen: _Seen, x: Tensor) -> None:
        self._order.append(row)
        if row in self._expected.unseen:
            head = self._recorder.skip.head(x)
            if not _is_near(seen.last, head):
                seen.told = -1
            elementwise = all(call.is_activation for call in block.after)
            seen.last = compose(block.after)(head.clone()) if elementwise else None
        self._tell(seen, 1, self._recorder.added, block.addition, x)

    def _tell_output(self, row: int, block: BlockPlan, seen: _Seen, x: Tensor) -> None:
        if seen.last is not None and not _is_near(seen.last, self._recorder.skip.head(x)):
            seen.told = -1
        self._tell(seen, 2, self._recorder.closed, block.addition, x)

    @staticmethod
    def _tell(seen: _Seen, order: int, tell: Callable[..., None], *event: object) -> None:
        """Tell of a block's next event; one out of turn spoils the block."""
        if seen.told == order:
            tell(*event)
            seen.told += 1
        else:
            seen.told = -1

    def _see_unit(self, row: int, block: BlockPlan, site: str, x: Tensor) -> None:
        assert block.unit is not None
        number = block.unit.input if site == "input" else block.unit.output
        if number is not None:
            self._recorder.passing(number, x, block.features[site == "output"])
        if site == "output":
            self._order.append(row)
            self._recorder.unit(block.unit)

    @guarded
    def _end(self, outputs: list[Tensor]) -> None:
        features, logits = self._ends.get("features"), self._ends.get("logits")
        self._graph.see_ends(features, logits, outputs)
        pattern = Pattern(self._expected.plan, self._graph, len(outputs))
        known = self._expected.pattern
        pairs = zip(self._blocks, self._seen, pattern.blocks, known.blocks, strict=True)
        frames = {} if self._operations is None else self._operations.frames
        has_changed = any(frame.has_changed for frame in frames.values())
        changed = self._expected.unseen if has_changed else frozenset()
        order = [row for row in self._expected.reads.order if row in self._order]
        elsewhere = pattern.followed(known)
        wrong = [
            block.key
            for row, (block, seen, now, then) in enumerate(pairs)
            # running products go through the blocks in their order
            if self._order != order
            or row in changed
            or now != then
            or elsewhere & {f"sum {row}", f"output {row}"}
            or (block.unit is None and seen.told != _WHOLE)
        ]
        if wrong:
            self._recorder.reject(wrong, [block.key for block in self._blocks])
        ends = pattern.ends == known.ends
        if ends:
            self._recorder.finished(features, logits, outputs)
        else:
            self._recorder.finished(None, None, outputs, reason=_OTHER_END)
        self._ended(not wrong and ends)


_WHOLE = 3  # events of a residual block: operands, sum, output
_OTHER_END = "the classifier of a step's pass was not the one that had been traced"


def _is_near(expected: Tensor | None, x: Tensor) -> bool:
    """Whether a tensor on the CPU is what an addition or an activation of its kind made."""
    if expected is None or expected.shape != x.shape:
        return False
    tolerance = 16 * torch.finfo(x.dtype).eps
    return torch.allclose(expected.to(x.dtype), x, tolerance, tolerance, equal_nan=True)


def _at(values: Any, place: int | str | None) -> object:  # noqa: ANN401
    """The value at a place of a module's arguments or result, or None."""
    try:
        found: object = values[place]
    except (IndexError, KeyError, TypeError):
        return None
    return found
