"""Networks without residual additions: which modules are their units.

Seen as a tree of module calls, such a network is walked from the root down. A call is divided into
the calls inside it where those form a chain, each made of the one before, and where it is a
container (`Sequential`, `ModuleList`, `ModuleDict`) or holds more than a quarter of the network; it
is a unit where it holds a single parameterised layer or is not divided: a convolution of VGG, a
Fire module of SqueezeNet, an Inception module, a dense layer, an LSTM. What does not lead to the
network's first output, e.g. an auxiliary classifier, is not a unit; nor is a linear map that makes
that output: that is the head, as in a residual network.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from resdiag.watch.base.functions import Call
from resdiag.watch.find.dataflow import Dataflow

_LARGE = 0.25  # share of all parameterised layers above which a module is too coarse a unit


@dataclass(frozen=True, kw_only=True, eq=False)
class Unit:
    """A module call that stands for a block, with the activations right after it."""

    owner: str
    ordinal: int  # number of its calls before in this pass
    input: int | None  # number of its first floating-point input (also in a list), if it has one
    output: int  # number of its output, after `after`
    entered: torch.Size | None  # shape of the input, None without
    shape: torch.Size  # shape of the output
    dtype: torch.dtype  # type of its elements
    features: int | None  # the channel dimension of the output, if known
    after: tuple[Call, ...]  # normalisations and activations that directly follow the module
    calls: tuple[Call, ...]  # the operations inside the module, in order
    activations: list[Call]  # activations inside the module and after it
    parameters: list[nn.Parameter]  # parameters of the module and of what follows it
    chosen: bool  # whether it was chosen here rather than named by the user


@dataclass(eq=False)
class Visit:
    """One call of a module in a pass."""

    name: str
    module: nn.Module
    ordinal: int  # number of its calls before
    input: int | None  # number of its first floating-point input, None if it has none
    entered: torch.Size | None  # shape of that
    start: int  # tensors of the pass numbered below this were there before it began
    gate: int  # number of activations before it began
    layers: int = 0  # parameterised transforming operations that ran inside
    inner: "list[Visit]" = field(default_factory=list)
    output: int | None = None  # number of its first floating-point output
    shape: torch.Size | None = None  # shape of that
    dtype: torch.dtype = torch.float32  # type of its elements
    gates: int = 0  # number of activations when it had ended


class Search:
    """Follows the module calls of one pass and chooses units at its end.

    `gates` are the activations of the pass so far; `passing` is called with every tensor that may
    become the input or the output of a unit.
    """

    def __init__(
        self, flow: Dataflow, gates: list[Call], passing: Callable[[int, Tensor], None]
    ) -> None:
        self._flow, self._gates, self._passing = flow, gates, passing
        self._root: Visit | None = None
        self._open: list[Visit] = []
        self._counts: Counter[str] = Counter()
        self._passed: set[int] = set()

    def enter(self, name: str, module: nn.Module, x: Tensor | None) -> None:
        """A module's forward begins on `x`, its first floating-point input."""
        start, number = len(self._flow), None
        if x is not None and not self._flow.are_weights([x]):
            number = self._flow.enter(x)
            if next(module.parameters(), None) is not None:
                self._pass(number, x)
        shape = None if x is None else x.shape
        visit = Visit(name, module, self._counts[name], number, shape, start, len(self._gates))
        self._counts[name] += 1
        if self._open:
            self._open[-1].inner.append(visit)
        else:
            self._root = visit
        self._open.append(visit)

    def leave(self, module: nn.Module, y: Tensor | None) -> None:
        """It returns `y`, its first floating-point output; inner calls that failed end as well."""
        while self._open:
            visit = self._open.pop()
            if visit.module is module:
                break
        else:
            return
        number = None if y is None else self._flow.number(y)
        if visit.layers and y is not None and number is not None:
            visit.output, visit.shape, visit.dtype = number, y.shape, y.dtype
            visit.gates = len(self._gates)
            self._pass(number, y)

    def operation(self, call: Call, parents: Sequence[int], number: int, result: Tensor) -> None:
        """An operation of the pass made a tensor of others."""
        if call.is_transform and self._flow.node(number).parameters:
            for visit in self._open:
                visit.layers += 1
        elif call.is_after and not self._passed.isdisjoint(parents):
            self._pass(number, result)

    def units(self) -> list[Unit]:
        """The units of the pass that has ended."""
        if self._root is None:
            return []
        flow, users = self._flow, self._flow.users()
        return [
            unit_of(visit, flow.tail(visit.output or 0, users), flow, self._gates, chosen=True)
            for visit in choose_units(self._root, flow)
        ]

    def _pass(self, number: int, x: Tensor) -> None:
        self._passed.add(number)
        self._passing(number, x)


def unit_of(
    visit: Visit, tail: Sequence[int], flow: Dataflow, gates: Sequence[Call], *, chosen: bool
) -> Unit:
    """The unit that a call is, with the tensors of its `tail` and, of the activations, its own."""
    output, after = visit.output, flow.calls(tail)
    assert output is not None
    assert visit.shape is not None
    return Unit(
        owner=visit.name,
        ordinal=visit.ordinal,
        input=visit.input,
        output=tail[-1] if tail else output,
        entered=visit.entered,
        shape=visit.shape,
        dtype=visit.dtype,
        features=flow.node(output).features,
        after=after,
        calls=flow.calls(range(visit.start, output + 1)),
        activations=[*gates[visit.gate : visit.gates], *(c for c in after if c.is_activation)],
        parameters=[*visit.module.parameters(), *flow.parameters(tail)],
        chosen=chosen,
    )


def choose_units(root: Visit, flow: Dataflow) -> list[Visit]:
    """A network's units in the order of their outputs; none without parameterised layers."""
    if not root.layers or root.output is None:
        return []
    way = set(flow.walk({root.output: 1}, 0))
    units = list(_divide(root, root.layers, way, flow))
    while len(units) == 1 and (inner := _inner(units[0], way)) and len(inner) > 1:
        units = [unit for call in inner for unit in _divide(call, root.layers, way, flow)]
    is_head = flow.node(root.output).name == "linear" and units[-1].output == root.output
    return units[:-1] if len(units) > 1 and is_head else units


def _inner(visit: Visit, way: set[int]) -> list[Visit]:
    """The calls inside that have layers and lead to the output; none unless all layers do so."""
    inner = [call for call in visit.inner if call.layers and call.output in way]
    return inner if sum(call.layers for call in visit.inner) == visit.layers else []


def _divide(visit: Visit, total: int, way: set[int], flow: Dataflow) -> Iterator[Visit]:
    inner = _inner(visit, way)
    container = isinstance(visit.module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    divisible = container or visit.layers > _LARGE * total
    chain = (
        flow.descends(late.output or 0, early.output or 0)
        for early, late in itertools.pairwise(inner)
    )
    if visit.layers < 2 or not inner or (visit.name and not (divisible and all(chain))):
        yield visit
    else:
        for call in inner:
            yield from _divide(call, total, way, flow)
