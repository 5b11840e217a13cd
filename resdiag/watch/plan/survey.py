"""Writes the plan of a pass while it is traced."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from resdiag.watch.base.functions import Call
from resdiag.watch.base.tensors import tensors_in
from resdiag.watch.find.additions import Addition
from resdiag.watch.find.blocks import BlockFinder, trace_once
from resdiag.watch.find.dataflow import Dataflow
from resdiag.watch.find.passes import Operands, Surveyor
from resdiag.watch.find.units import Unit
from resdiag.watch.plan.ports import OPERATIONS, BlockPlan, Plan, Port, Trail, Visit
from resdiag.watch.plan.verify import Edge, PassGraph, Pattern, edge_of


@dataclass(eq=False)
class _Frame:
    """One call of a module that is running."""

    name: str
    call: int
    visits: list[tuple[Visit, int]]
    operations: Counter[str] = field(default_factory=Counter)


@dataclass(eq=False)
class _Operation:
    """An operation that has not returned yet."""

    read: dict[int, tuple[Tensor, int]]
    port: Port | None = None
    operands: list[Visit] = field(default_factory=list)


class Survey(BlockFinder, Surveyor):
    """Notes where every tensor of a traced pass can be seen; each event is an instant.

    A tensor is known by its number in the pass: what an in-place operation makes of it has another.
    In a pass over example inputs, what hands on its very input (dropout in evaluation mode,
    stochastic depth) may return another tensor in training, so another one takes its place.
    Beside the plan, the pattern of the pass's autograd graph is written down.
    `kept` are `id` of the tensors that stay from pass to pass: parameters and buffers; `planned` is
    told at the end; `example` says whether it is a pass over example inputs.
    """

    def __init__(
        self,
        kept: frozenset[int] = frozenset(),
        planned: "Callable[[Survey], None]" = lambda survey: None,
        *,
        example: bool = False,
    ) -> None:
        super().__init__()
        self.kept, self._planned = kept, planned
        self.plan, self.graph = Plan(self.anatomy), PassGraph(kept)
        self.pattern: Pattern | None = None
        self._example, self._flow = example, Dataflow()
        self._time = 0
        self._trails: dict[int, Trail] = {}
        self._calls: dict[str, int] = defaultdict(int)
        self._open: list[_Frame] = []
        self._passages: dict[tuple[int | None, int | None], Port] = {}
        self._keys: dict[int, tuple[int | None, int | None]] = {}
        self._activations: list[tuple[Call, Trail]] = []
        self._passed: dict[int | None, tuple[Trail, int | None, Edge | None]] = {}
        self._last: Trail | None = None
        self._running: _Operation | None = None
        self._waiting: _Frame | None = None
        self._held: list[Tensor] = []  # without gradients nothing else holds a stacked operand

    def begin(self, flow: Dataflow) -> None:
        """The pass begins."""
        self._flow = flow

    def enters(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A module's forward begins."""
        call = self._calls[name]
        self._calls[name] += 1
        visits = self._arrive(Port(name, call, False, None), args, kwargs)
        self._open.append(_Frame(name, call, visits))

    def leaves(self, name: str, module: nn.Module, output: Any) -> Any:  # noqa: ANN401
        """A module's forward has ended; an exception may have ended calls inside it."""
        while self._open and self._open[-1].name != name:
            self._open.pop()
            self.plan.flaw = "an exception ended a module's forward"
        if not self._open:
            return output
        frame = self._open.pop()
        self.plan.operations[name, frame.call] = dict(frame.operations)
        for visit, _ in frame.visits:
            visit.end = self._tick()
        handed_on = self._separate(module, frame, output)
        if handed_on is output:
            self._return(frame, output)
        return handed_on

    def same(self, old: Tensor, new: Tensor) -> None:
        """A tensor was replaced by an equal one: by us, or by a wrapper of a module's."""
        before, number = self._flow.number(old), self._flow.number(new)
        frame, self._waiting = self._waiting, None
        if number is not None and frame is not None:
            self._return(frame, new)
        elif number is not None and before is not None:
            self._trails[number] = self._trail(before, old)
            self._trails[number].wrapped = True

    def _return(self, frame: _Frame, output: object) -> None:
        for place, value in _results(output):
            if (number := self._flow.number(value)) is not None:
                self._visit(Port(frame.name, frame.call, True, place), number, value)
                for visit, entered in frame.visits:
                    self._passages[entered, number] = visit.port

    def _separate(self, module: nn.Module, frame: _Frame, output: object) -> object:
        """Another tensor of the same values where a module hands on its input today only."""
        if not self._example or not isinstance(output, Tensor) or _is_idle(module):
            return output
        if self._flow.number(output) not in [entered for _, entered in frame.visits]:
            return output
        with torch._C.DisableTorchFunction():
            fresh = output.view_as(output)
        self._waiting = frame
        return fresh

    def reads(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """An operation is about to run."""
        read = {}
        for x in tensors_in((args, kwargs)):
            if (number := self._flow.number(x)) is not None:
                read[number] = x, x._version
                self._trail(number, x)
        running = self._running = _Operation(read)
        name = getattr(func, "__name__", "")
        if name in OPERATIONS and self._open:  # it can be found again
            frame = self._open[-1]
            writes = name.endswith("_") or bool(kwargs.get("inplace")) or "out" in kwargs
            port = Port(frame.name, frame.call, True, None, name, frame.operations[name], writes)
            frame.operations[name] += 1
            running.port = port
            operands = self._arrive(replace(port, is_output=False), args, kwargs)
            running.operands = [visit for visit, _ in operands]

    def _arrive(
        self, port: Port, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> list[tuple[Visit, int]]:
        """Visits of the tensors of the pass among arguments, and their numbers."""
        places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        return [
            (self._visit(replace(port, place=place), number, x), number)
            for place, x in places
            if isinstance(x, Tensor) and (number := self._flow.number(x)) is not None
        ]

    def returns(self, result: Any) -> Any:  # noqa: ANN401
        """It has run."""
        running = self._running
        assert running is not None
        if self._example and any(x is result and x._version == v for x, v in running.read.values()):
            with torch._C.DisableTorchFunction():
                result = result.view_as(result)  # dropout, idle in evaluation mode only
        time = self._tick()
        for number in running.read:
            self._trails[number].uses.append(time)
        for visit in running.operands:
            visit.end = self._tick()
        return result

    def wrote(self, result: Tensor) -> None:
        """The result has its number."""
        running, number = self._running, self._flow.number(result)
        if self._example:
            self._held.append(result)
        if running is None or running.port is None or number is None:
            return
        # what was written into a part of another tensor: nothing may take its place
        if not (result._is_view() and any(x is result for x, _ in running.read.values())):
            self._visit(running.port, number, result)

    def operands(self, addition: Addition, tensors: Operands) -> None:
        """Both operands of a residual addition are there."""
        if addition.extends:
            self.plan.blocks[self.row_of(addition.key)].extended = True
            return
        row, running = len(self.plan.blocks), self._running
        block = BlockPlan(addition.key, addition, None, begin=self._tick())
        self.plan.blocks.append(block)
        block.junction = None if running is None else running.port
        block.input = self._trail_of(tensors.origin)
        block.branch, block.shortcut = map(self._trail_of, (tensors.branch, tensors.shortcut))
        block.joined = not row or (block.input is not None and block.input is self._last)
        self.graph.see(row, "input", tensors.origin)
        self.graph.see(row, "branch", tensors.branch)
        self.graph.see(row, "shortcut", tensors.shortcut)
        if tensors.origin is not None:
            numbers = self._flow.number(tensors.origin), self._flow.number(tensors.shortcut)
            self._keys[row] = numbers

    def added(self, addition: Addition, total: Tensor) -> None:
        """The sum, before an in-place after-add."""
        super().added(addition, total)
        row = self.row_of(addition.key)
        self.plan.blocks[row].sum = self._last = self._trail_of(total)
        self.graph.see(row, "sum", total)

    def closed(self, addition: Addition, output: Tensor) -> None:
        """The block's end."""
        super().closed(addition, output)
        row = self.row_of(addition.key)
        block = self.plan.blocks[row]
        block.addition = addition
        block.output = self._last = self._trail_of(output)
        self.graph.see(row, "output", output)

    def passing(self, number: int, x: Tensor, features: int | None) -> None:
        """A tensor that may be a unit's input or output."""
        self._passed[number] = self._trail(number, x), features, edge_of(x)

    def unit(self, unit: Unit) -> None:
        """A module without an addition."""
        super().unit(unit)
        block = BlockPlan((unit.owner, unit.ordinal), None, unit, self._time)
        row, nothing = len(self.plan.blocks), (None, None, None)
        block.input, entered, edge = self._passed.get(unit.input, nothing)
        self.graph.see_edge(row, "input", edge)
        block.output, left, edge = self._passed[unit.output]
        self.graph.see_edge(row, "output", edge)
        self._last, block.features = block.output, (entered, left)
        self.plan.blocks.append(block)

    def activation(self, call: Call, x: Tensor) -> None:
        """What goes into an activation."""
        trail = self._trail_of(x)
        if trail is not None and x.is_floating_point() and x.numel():
            self._activations.append((call, trail))

    def finished(
        self, features: Tensor | None, logits: Tensor | None, outputs: Sequence[Tensor]
    ) -> None:
        """The classifier, and what the blocks could not know before."""
        if logits is not None:
            self.plan.features, self.plan.logits = map(self._trail_of, (features, logits))
        self.plan.calls = dict(self._calls)
        self._held.clear()
        for row, block in enumerate(self.plan.blocks):
            thing = block.addition or block.unit
            inside = set() if thing is None else {id(call) for call in thing.activations}
            block.activations = [(call, x) for call, x in self._activations if id(call) in inside]
            block.projection = self._passages.get(self._keys.get(row, (None, None)))
        self.graph.see_ends(features, logits, outputs)
        self.pattern = Pattern(self.plan, self.graph, len(outputs))
        self._planned(self)

    def row_of(self, key: tuple[str, int]) -> int:
        """The place of a block in the plan."""
        blocks = self.plan.blocks
        return next(row for row in reversed(range(len(blocks))) if blocks[row].key == key)

    def _visit(self, port: Port, number: int, x: Tensor) -> Visit:
        visit = Visit(port, time := self._tick(), end=time)
        self._trail(number, x).visits.append(visit)
        return visit

    def _tick(self) -> int:
        self._time += 1
        return self._time

    def _trail_of(self, x: Tensor | None) -> Trail | None:
        number = None if x is None else self._flow.number(x)
        return None if x is None or number is None else self._trail(number, x)

    def _trail(self, number: int, x: Tensor) -> Trail:
        return self._trails.setdefault(number, Trail(x.shape, x.dtype, x.device))


def plan_of_example(
    model: nn.Module,
    inputs: tuple[Any, ...],
    keywords: Mapping[str, Any],
    units: frozenset[str] | None,
) -> Plan:
    """The plan of one pass over example inputs, for passes of which Python sees nothing.

    The pass runs in the modes that the model has: in evaluation mode it may do something else.
    Where it cannot, as a BatchNorm in training on one sample, it runs in evaluation mode.
    """
    try:
        survey = Survey(example=True)
        trace_once(model, inputs, keywords, [], units, [survey], evaluate=False)
    except Exception:
        survey = Survey(example=True)
        trace_once(model, inputs, keywords, [], units, [survey])
    return survey.plan


def _results(output: object) -> Iterator[tuple[int | str | None, Tensor]]:
    """The tensors at the top of a module's result and their places."""
    if isinstance(output, Tensor):
        yield None, output
    elif type(output) is dict:
        yield from ((key, x) for key, x in output.items() if isinstance(x, Tensor))
    elif type(output) is tuple or type(output) is list:
        yield from ((place, x) for place, x in enumerate(output) if isinstance(x, Tensor))


def _is_idle(module: nn.Module) -> bool:
    """Whether a module hands on its input in training too."""
    return isinstance(module, nn.Identity) or (
        isinstance(module, nn.Sequential) and all(_is_idle(child) for child in module)
    )
