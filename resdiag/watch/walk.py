"""One pass over example inputs that finds the ports of a model's blocks."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from resdiag.watch.addition import Addition
from resdiag.watch.base.functions import Call, is_question
from resdiag.watch.base.tensors import tensors_in
from resdiag.watch.blocks import Anatomy, _evaluating
from resdiag.watch.ports import OPERATIONS, Map, Port, Route, Trail, Visit
from resdiag.watch.tracer import Tracer
from resdiag.watch.units import Unit

Key = tuple[int, int]
"""A tensor as it was at one time: identity and version."""


@dataclass(eq=False)
class _Frame:
    """One call of a module that is running."""

    name: str
    call: int
    visits: list[tuple[Visit, Key]]
    operations: Counter[str] = field(default_factory=Counter)


def find_ports(
    model: nn.Module,
    inputs: tuple[Any, ...],
    keywords: Mapping[str, Any],
    units: frozenset[str] | None,
) -> Map:
    """Run one pass in evaluation mode without gradients; modes and random state are put back."""
    walk = _Walk()
    tracer = walk.tracer = Tracer(model, walk, lambda: True, units)
    handles = list(walk.install(model))
    try:
        with _evaluating(model), torch.no_grad(), walk:
            model(*inputs, **keywords)
    finally:
        tracer.close()
        for handle in handles:
            handle.remove()
    return walk.map()


class _Walk(TorchFunctionMode):
    """The listener of the pass, and its clock: every operation and every port is an instant."""

    counts_gates: bool = True
    looks_back: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.anatomy = Anatomy()
        self.tracer: Tracer | None = None
        self._routes: list[Route] = []
        self._time = 0
        self._held: list[object] = []  # identities are of living tensors only
        self._trails: dict[Key, Trail] = {}
        self._calls: dict[str, int] = defaultdict(int)
        self._open: list[_Frame] = []
        self._operations: dict[tuple[str, int], dict[str, int]] = {}
        self._passages: dict[tuple[Key, Key], Port] = {}
        self._gates: list[tuple[tuple[str, ...], Call, Trail]] = []
        self._keys: dict[int, tuple[Key, Key]] = {}
        self._passed: dict[int, Trail] = {}
        self._head: tuple[Trail | None, Trail | None] = (None, None)
        self._last: Trail | None = None

    def map(self) -> Map:
        """What was found, without the tensors of the pass."""
        for route in self._routes:
            if route.addition is not None:
                self._finish(route.addition, route)
        calls, operations = dict(self._calls), self._operations
        return Map(self.anatomy, self._routes, *self._head, calls, operations)

    def _finish(self, addition: Addition, route: Route) -> None:
        inside = {id(call) for call in addition.activations}
        route.gates = [(call, x) for _, call, x in self._gates if id(call) in inside]
        route.projection = self._passages.get(self._keys[id(addition)])
        # shapes say all that is needed later; the pass's tensors would stay in memory
        empty = torch.empty(0)
        addition.origin = None if addition.origin is None else empty
        addition.branch = addition.shortcut = empty
        addition.sum = None

    # -- ports ---------------------------------------------------------------------------------

    def install(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Hooks on every module."""
        for name, module in model.named_modules():
            yield module.register_forward_pre_hook(self._enter(name), with_kwargs=True)
            yield module.register_forward_hook(self._leave(name), with_kwargs=True)

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = self._calls[name]
            self._calls[name] += 1
            places: list[tuple[int | str, object]] = [*enumerate(args), *kwargs.items()]
            visits = [
                (self._visit(Port(name, call, False, place), value), _key(value))
                for place, value in places
                if isinstance(value, Tensor)
            ]
            self._open.append(_Frame(name, call, visits))

        return hook

    def _leave(self, name: str) -> Callable[..., Any]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
        ) -> object:
            frame = self._open.pop()
            call, visits = frame.call, frame.visits
            self._operations[name, call] = dict(frame.operations)
            if (
                isinstance(output, Tensor)
                and not _is_idle(module)
                and any(_key(output) == key for _, key in visits)
            ):
                # idle in evaluation mode only (stochastic depth): in training it is another tensor
                output = self._separate(output)
            for visit, _ in visits:
                visit.end = self._tick()
            for place, value in _results(output):
                self._visit(Port(name, call, True, place), value)
                for visit, key in visits:
                    self._passages[key, _key(value)] = visit.port
            return output

        return hook

    def _separate(self, output: Tensor) -> Tensor:
        """Another tensor of the same values, of which the tracer knows as much."""
        with torch._C.DisableTorchFunction():
            fresh = output.view_as(output)
        self._trails[_key(fresh)] = Trail(fresh.shape, fresh.dtype, fresh.device)
        self._held.append(fresh)
        if self.tracer is not None:
            self.tracer.same(output, fresh)
        return fresh

    def _visit(self, port: Port, x: Tensor) -> Visit:
        time = self._tick()
        visit = Visit(port, time, time)
        self._trail(x).visits.append(visit)
        return visit

    def _tick(self) -> int:
        self._time += 1
        return self._time

    def _trail(self, x: Tensor) -> Trail:
        key = _key(x)
        if key not in self._trails:
            self._held.append(x)
            self._trails[key] = Trail(x.shape, x.dtype, x.device)
        return self._trails[key]

    # -- operations ----------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Note which tensors an operation reads."""
        kwargs = dict(kwargs or {})
        if is_question(func):
            return func(*args, **kwargs)
        read = {_key(x): x for x in (*tensors_in(args), *tensors_in(kwargs))}
        used = [self._trail(x) for x in read.values()]
        port, operands = self._operation(func, args, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and _key(result) in read:
            result = result.view_as(result)  # dropout, idle in evaluation mode only
        time = self._tick()
        for trail in used:
            trail.uses.append(time)
        for visit in operands:
            visit.end = self._tick()
        if port is not None and isinstance(result, Tensor) and not _is_borrowed(result, read):
            self._visit(port, result)
        return result

    def _operation(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Port | None, list[Visit]]:
        """The port of a counted operation's result, and visits at those of its operands."""
        name = getattr(func, "__name__", "")
        if name not in OPERATIONS or not self._open:
            return None, []
        frame = self._open[-1]
        ordinal = frame.operations[name]
        frame.operations[name] += 1
        places: list[tuple[int | str, object]] = [*enumerate(args), *kwargs.items()]
        port = Port(
            frame.name,
            frame.call,
            True,
            None,
            name,
            ordinal,
            writes=name.endswith("_") or bool(kwargs.get("inplace")) or "out" in kwargs,
        )
        visits = [
            self._visit(replace(port, is_output=False, place=place), value)
            for place, value in places
            if isinstance(value, Tensor)
        ]
        return port, visits

    # -- what the tracer tells -----------------------------------------------------------------

    def started(self, inputs: Sequence[Tensor]) -> None:
        """Nothing is tapped at the inputs."""

    def operands(self, addition: Addition) -> None:
        """Both operands, before an in-place addition."""
        origin = addition.origin
        row = len(self._routes)
        route = Route(
            addition=addition,
            begin=self._tick(),
            input=None if origin is None else self._trail(origin),
            branch=self._trail(addition.branch),
            shortcut=self._trail(addition.shortcut),
        )
        route.joined = row == 0 or (route.input is not None and route.input is self._last)
        if origin is not None:
            self._keys[id(addition)] = _key(origin), _key(addition.shortcut)
        else:
            self._keys[id(addition)] = (0, 0), (0, 0)
        self._routes.append(route)
        addition.sum = addition.branch  # same shape; the sum itself is not there yet
        self.anatomy.add_block(addition)
        addition.sum = None

    def added(self, addition: Addition) -> None:
        """The sum, before an in-place after-add."""
        assert addition.sum is not None
        self._route(addition).sum = self._last = self._trail(addition.sum)

    def closed(self, addition: Addition, output: Tensor) -> None:
        """The block's end."""
        route = self._route(addition)
        route.output = self._last = self._trail(output)
        row = self.anatomy.rows[addition.owner, addition.ordinal]
        self.anatomy.finish(row, addition.after, addition.parameters)

    def passing(self, number: int, x: Tensor, features: int | None) -> None:
        """A tensor that may be a unit's input or output."""
        self._passed[number] = self._trail(x)

    def dismiss(self) -> None:
        """There are no units."""
        self._passed.clear()

    def unit(self, unit: Unit) -> None:
        """A module without an addition."""
        self.anatomy.add_unit(unit)
        entry = None if unit.input is None else self._passed.get(unit.input)
        route = Route(None, self._time, entry, output=self._passed[unit.output])
        inside = {id(call) for call in unit.activations}
        route.gates = [(call, trail) for _, call, trail in self._gates if id(call) in inside]
        self._last = route.output
        self._routes.append(route)

    def same(self, old: Tensor, new: Tensor) -> None:
        """A tensor was replaced by an equal one."""
        if _key(new) not in self._trails:  # else it is one that we replaced
            self._trails[_key(new)] = self._trail(old)
            self._held.append(new)

    def activation(self, owners: tuple[str, ...], call: Call, x: Tensor) -> None:
        """What goes into an activation."""
        if x.is_floating_point() and x.numel():
            self._gates.append((owners, call, self._trail(x)))

    def finished(
        self, features: Tensor | None, logits: Tensor | None, outputs: Sequence[Tensor]
    ) -> None:
        """The classifier."""
        if features is not None and logits is not None:
            self._head = self._trail(features), self._trail(logits)

    def look_back(self, outputs: Sequence[Tensor]) -> None:
        """Every pass is listened to."""

    def _route(self, addition: Addition) -> Route:
        return self._routes[self.anatomy.rows[addition.owner, addition.ordinal]]


def _is_idle(module: nn.Module) -> bool:
    """Whether a module hands on its input in training too."""
    return isinstance(module, nn.Identity) or (
        isinstance(module, nn.Sequential) and all(_is_idle(child) for child in module)
    )


def _is_borrowed(result: Tensor, read: Mapping[Key, Tensor]) -> bool:
    """Whether an operation wrote into a part of another tensor: nothing may take its place."""
    return result._is_view() and any(x is result for x in read.values())


def _key(x: Tensor) -> Key:
    return id(x), x._version


def _results(output: object) -> Iterator[tuple[int | str | None, Tensor]]:
    """The tensors at the top of a module's result and their places."""
    if isinstance(output, Tensor):
        yield None, output
    elif type(output) in (tuple, list, dict):
        places = output.items() if isinstance(output, dict) else enumerate(output)  # type: ignore[arg-type]
        yield from ((place, value) for place, value in places if isinstance(value, Tensor))
