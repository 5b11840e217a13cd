"""Where the tensors of a block pass in or out of a module: the places at which a hook can tap them.

A compiled forward shows no operations, but the hooks of its modules are traced into its graph. One
pass over example inputs finds, for every tensor of interest, the modules that take or return it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from resdiag.watch.blocks import Anatomy, _evaluating
from resdiag.watch.calls import Call
from resdiag.watch.metrics import channel_dimension
from resdiag.watch.tracer import Addition, Tracer, _tensors, is_question
from resdiag.watch.units import Unit

Key = tuple[int, int]
"""A tensor as it was at one time: identity and version."""


@dataclass(frozen=True)
class Port:
    """One argument or result of one call of a module.

    Attributes:
        module: The module's name.
        call: How many calls of it came before in the pass.
        is_output: Whether the tensor leaves the module.
        place: Position or keyword of the argument; position or key in the result, None for all.
    """

    module: str
    call: int
    is_output: bool
    place: int | str | None


@dataclass(eq=False)
class _Visit:
    """A tensor at a port: when it came by, and when that module's call ended."""

    port: Port
    time: int
    end: int


@dataclass(eq=False)
class Trail:
    """One tensor of one pass: where it passed and when it was used.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        device: Its device.
        visits: Ports, in time order.
        uses: Times at which an operation read it.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    visits: list[_Visit] = field(default_factory=list)
    uses: list[int] = field(default_factory=list)

    @property
    def channels(self) -> int:
        """Channels as `metrics.reduce` counts them."""
        return self.shape[channel_dimension(len(self.shape))]

    def value_port(self) -> Port | None:
        """A port at which its values can be read."""
        return self.visits[0].port if self.visits else None

    def gradient_port(self) -> Port | None:
        """A port that all its uses come after, so that the gradient there is the whole one."""
        for visit in self.visits:
            after = all(visit.time < time for time in self.uses)
            if after and (visit.port.is_output or all(time < visit.end for time in self.uses)):
                return visit.port
        return None

    def operand_port(self, begin: int) -> Port | None:
        """A port after which nothing but the addition that began at `begin` uses it."""
        for visit in reversed(self.visits):
            later = [time for time in self.uses if time > visit.time]
            inside = visit.port.is_output or all(time < visit.end for time in later)
            if visit.time < begin and len(later) == 1 and later[0] > begin and inside:
                return visit.port
        return None


@dataclass(eq=False)
class Route:
    """The tensors of one block, as trails; None where the block has no such tensor.

    Attributes:
        addition: The addition, with its calls, scales and path; None for a unit without one.
        begin: When the addition began.
        input: x.
        branch: F(x).
        shortcut: h(x).
        sum: u.
        output: H.
        joined: Whether x is the output of the block before, or this is the first block.
        projection: Port at which x enters the module that makes h of it, if one module does.
        gates: Activations inside, each with what goes into it.
    """

    addition: Addition | None
    begin: int
    input: Trail | None
    branch: Trail | None = None
    shortcut: Trail | None = None
    sum: Trail | None = None
    output: Trail | None = None
    joined: bool = True
    projection: Port | None = None
    gates: list[tuple[Call, Trail]] = field(default_factory=list)


@dataclass(eq=False)
class Map:
    """What one pass over example inputs found.

    Attributes:
        anatomy: The blocks.
        routes: Their tensors, in the same order.
        features: Input of the last linear layer.
        logits: Its output.
        calls: How often each module was called.
    """

    anatomy: Anatomy
    routes: list[Route]
    features: Trail | None
    logits: Trail | None
    calls: dict[str, int]


def find_ports(
    model: nn.Module,
    inputs: tuple[Any, ...],
    keywords: Mapping[str, Any],
    units: frozenset[str] | None,
) -> Map:
    """Run one pass in evaluation mode without gradients; modes and random state are put back."""
    walk = _Walk()
    tracer = Tracer(model, walk, lambda: True, units)
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

    def __init__(self) -> None:
        super().__init__()
        self.anatomy = Anatomy()
        self._routes: list[Route] = []
        self._time = 0
        self._held: list[object] = []  # identities are of living tensors only
        self._trails: dict[Key, Trail] = {}
        self._calls: dict[str, int] = defaultdict(int)
        self._open: list[list[tuple[_Visit, Key]]] = []
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
        return Map(self.anatomy, self._routes, *self._head, dict(self._calls))

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
            self._open.append(visits)

        return hook

    def _leave(self, name: str) -> Callable[..., Any]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
        ) -> object:
            call, visits = self._calls[name] - 1, self._open.pop()
            if (
                isinstance(output, Tensor)
                and not isinstance(module, nn.Identity)
                and any(_key(output) == key for _, key in visits)
            ):
                # idle in evaluation mode only (stochastic depth): in training it is another tensor
                output = output.view_as(output)
            for visit, _ in visits:
                visit.end = self._tick()
            for place, value in _results(output):
                self._visit(Port(name, call, True, place), value)
                for visit, key in visits:
                    self._passages[key, _key(value)] = visit.port
            return output

        return hook

    def _visit(self, port: Port, x: Tensor) -> _Visit:
        time = self._tick()
        visit = _Visit(port, time, time)
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
        read = {_key(x): x for x in (*_tensors(args), *_tensors(kwargs))}
        used = [self._trail(x) for x in read.values()]
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and _key(result) in read:
            result = result.view_as(result)  # dropout, idle in evaluation mode only
        time = self._tick()
        for trail in used:
            trail.uses.append(time)
        return result

    # -- what the tracer tells -----------------------------------------------------------------

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
        self._trails[_key(new)] = self._trail(old)
        self._held.append(new)

    def activation(self, owners: tuple[str, ...], call: Call, x: Tensor) -> None:
        """What goes into an activation."""
        if x.is_floating_point() and x.numel():
            self._gates.append((owners, call, self._trail(x)))

    def finished(self, features: Tensor | None, logits: Tensor | None) -> None:
        """The classifier."""
        if features is not None and logits is not None:
            self._head = self._trail(features), self._trail(logits)

    def _route(self, addition: Addition) -> Route:
        return self._routes[self.anatomy.rows[addition.owner, addition.ordinal]]


def example(given: object) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Positional and keyword inputs from a tuple, a mapping or a single input."""
    if isinstance(given, Mapping):
        return (), {str(name): value for name, value in given.items()}
    return (tuple(given) if isinstance(given, tuple | list) else (given,)), {}


def _key(x: Tensor) -> Key:
    return id(x), x._version


def _results(output: object) -> Iterator[tuple[int | str | None, Tensor]]:
    """The tensors at the top of a module's result and their places."""
    if isinstance(output, Tensor):
        yield None, output
    elif type(output) in (tuple, list, dict):
        places = output.items() if isinstance(output, dict) else enumerate(output)  # type: ignore[arg-type]
        yield from ((place, value) for place, value in places if isinstance(value, Tensor))
