"""Which tensor of one forward pass was made from which."""

import heapq
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

from torch import Tensor, nn

from resdiag.watch.base.functions import Call, features_after
from resdiag.watch.base.tensors import TensorTable

Depth: TypeAlias = tuple[int, int, int]
"""Of a way: parameterised transforming operations, other transforming ones, other parameterised."""


@dataclass(eq=False)
class Node:
    """One tensor as one call left it."""

    tensor: "weakref.ref[Tensor] | None"  # None for an operand that a fused call never wrote out
    parents: tuple[int, ...] = ()  # what it was computed from, and gradients flow to
    call: Call | None = None  # what made it
    repeatable: bool = False  # whether the call, applied to the one parent again, gives the same
    parameters: tuple[nn.Parameter, ...] = ()  # parameters that took part
    piece: str = ""  # which piece of its parent it is, "" for the whole
    features: int | None = None  # what parameterised operations treated as channels, if known
    discrete: bool = False  # it has no floating point: nothing descends from it through gradients
    size: int = 0  # how many elements it has
    stream: int | None = None  # of a residual sum, the operand that is the shortcut
    gate: Tensor | None = None  # t of a product t * (f - x) with a difference

    def at_hand(self) -> Tensor | None:
        """The tensor, if it is still there."""
        return None if self.tensor is None else self.tensor()

    @property
    def is_opaque(self) -> bool:
        """Whether no shortcut leads through it: neither a copy nor a linear map of one parent."""
        return self.call is not None and self.call.is_opaque(len(set(self.parents)))

    @property
    def depth(self) -> Depth:
        """What it adds to a way."""
        transforms, learned = self.is_transform, bool(self.parameters)
        both = transforms and learned
        return int(both), int(transforms and not both), int(learned and not both)

    @property
    def is_difference(self) -> bool:
        """Whether it is one tensor of the pass less another."""
        return self.name in ("sub", "subtract") and len(self.parents) == 2

    @property
    def name(self) -> str:
        """The name of what made it."""
        return "" if self.call is None else self.call.name

    @property
    def is_transform(self) -> bool:
        """Whether it mixes positions or channels."""
        return self.call is not None and self.call.is_transform


@dataclass(frozen=True)
class Scope:
    """A module's forward as the flow sees it: what came in, and what was there before."""

    entries: frozenset[int]  # numbers of its inputs
    start: int  # tensors numbered below this were there before it began


@dataclass(frozen=True)
class Descent:
    """How a result follows from its inputs."""

    parents: tuple[int, ...]
    parameters: tuple[nn.Parameter, ...]
    weighted: bool
    born: bool


def reach(start: int, ahead: Callable[[int], Iterable[int]]) -> Iterator[int]:
    """A tensor, those that are `ahead` of it, those ahead of them, ...; each once."""
    queue, seen = [start], {start}
    while queue:
        yield (number := queue.pop())
        found = set(ahead(number)) - seen
        seen |= found
        queue.extend(found)


class Dataflow:
    """The tensors of one forward pass, numbered in the order in which they were made."""

    def __init__(self) -> None:
        self._nodes: list[Node] = []
        self._numbers = TensorTable[int]()
        self._weights = TensorTable[tuple[nn.Parameter, ...]]()  # made of these parameters alone

    def __len__(self) -> int:
        return len(self._nodes)

    def number(self, tensor: Tensor) -> int | None:
        """The number of a tensor that has been seen."""
        return self._numbers.get(tensor)

    def enter(self, tensor: Tensor) -> int:
        """A tensor is the input of a module: it is part of the pass."""
        number, discrete = self.number(tensor), _is_discrete(tensor)
        if number is not None:
            return number
        return self._add(tensor, Node(weakref.ref(tensor), discrete=discrete, size=tensor.numel()))

    def are_weights(self, tensors: Sequence[Tensor]) -> bool:
        """Whether what goes into a module of the pass is made of parameters alone.

        Then the module makes a weight, e.g. by a parametrisation, and belongs to no stream.
        """
        strange = bool(self._nodes) and all(self.number(x) is None for x in tensors)
        return strange and bool(tensors) and None not in map(self._made_of, tensors)

    def descend(self, inputs: Iterable[Tensor]) -> Descent:
        """What the inputs of a call hand on to its results."""
        parents, parameters = list[int](), list[nn.Parameter]()
        weighted = born = False
        for tensor in inputs:
            number = self.number(tensor)
            if number is None:
                made_of = self._made_of(tensor)
                weighted = weighted or made_of is not None
                parameters.extend(made_of or ())
                born = born or (made_of is None and _is_discrete(tensor))
            elif self._nodes[number].discrete:
                born = True
            else:
                parents.append(number)
        return Descent(tuple(parents), tuple(parameters), weighted, born)

    def mark(
        self, result: Tensor, descent: Descent, call: Call | None, *, alone: bool, piece: str = ""
    ) -> int | None:
        """Number the result of a call; `alone` if no other tensor went into it.

        None for a result that does not depend on the pass's inputs: made of parameters or buffers.
        """
        discrete = _is_discrete(result)
        if not descent.parents and not (descent.born and (descent.weighted or discrete or alone)):
            if descent.weighted:
                self._weights.set(result, descent.parameters)
            return None
        repeatable = alone and call is not None and not call.is_random
        parents = () if discrete else descent.parents
        node = Node(weakref.ref(result), parents, call, repeatable, descent.parameters, piece)
        node.discrete, node.size = discrete, result.numel()
        node.features = None if discrete else self._features(result, descent, call)
        node.gate = self._gate(descent.parents, call)
        return self._add(result, node)

    def set_stream(self, number: int, shortcut: int) -> None:
        """A tensor is a residual sum."""
        self._nodes[number].stream = shortcut

    def imagine(self, inputs: Sequence[Tensor], call: Call) -> int | None:
        """Number an operand that a fused call computes and never writes out."""
        descent = self.descend(inputs)
        if not descent.parents:
            return None
        node = Node(None, descent.parents, call, parameters=descent.parameters)
        node.features = self._nodes[descent.parents[0]].features
        self._nodes.append(node)
        return len(self._nodes) - 1

    def calls(self, numbers: Iterable[int]) -> tuple[Call, ...]:
        """The operations that made some tensors."""
        return tuple(call for n in numbers if (call := self._nodes[n].call) is not None)

    def parameters(self, numbers: Iterable[int]) -> list[nn.Parameter]:
        """Parameters that took part in making some tensors."""
        return [p for n in numbers for p in self._nodes[n].parameters]

    def walk(self, ways: dict[int, int], lowest: int) -> Iterator[int]:
        """Ancestors of some tensors, latest first, none numbered below `lowest`.

        `ways` are the tensors, with a set of bits; filled on the way: an ancestor has those of all
        that were made from it.
        """
        queue = [-number for number in ways]
        heapq.heapify(queue)
        while queue:
            number = -heapq.heappop(queue)
            yield number
            for parent in self._nodes[number].parents:
                if parent < lowest:
                    continue
                if parent not in ways:
                    heapq.heappush(queue, -parent)
                ways[parent] = ways.get(parent, 0) | ways[number]

    def users(self) -> dict[int, list[int]]:
        """By tensor, those that were made from it."""
        users: dict[int, list[int]] = {}
        for user, node in enumerate(self._nodes):
            for parent in set(node.parents):
                users.setdefault(parent, []).append(user)
        return users

    def tail(self, number: int, users: Mapping[int, Sequence[int]]) -> list[int]:
        """The normalisations and activations that alone take a tensor, one after the other."""
        tail: list[int] = []
        while len(then := users.get(number, ())) == 1:
            node, number = self._nodes[then[0]], then[0]
            if node.call is None or not node.call.is_after or len(node.parents) != 1:
                break
            tail.append(number)
        return tail

    def node(self, number: int) -> Node:
        """A tensor and where it came from."""
        return self._nodes[number]

    def descends(self, number: int, ancestor: int) -> bool:
        """Whether a tensor was made from another."""
        return ancestor in self.walk({number: 1}, ancestor)

    def _features(self, result: Tensor, descent: Descent, call: Call | None) -> int | None:
        """The channel dimension of a result."""
        first = self._nodes[descent.parents[0]] if descent.parents else Node(None)
        if call is None:
            return first.features
        before = first.at_hand()
        shape = None if before is None else before.shape
        return features_after(call, result, descent.parameters, shape, first.features)

    def _gate(self, parents: tuple[int, ...], call: Call | None) -> Tensor | None:
        """The factor of a difference: the model may have freed it before it adds the product."""
        if call is None or not call.is_product or len(parents) != 2:
            return None
        for value, gate in (parents, parents[::-1]):
            if self._nodes[value].is_difference and self._nodes[gate].tensor is not None:
                return self._nodes[gate].at_hand()
        return None

    def _add(self, tensor: Tensor, node: Node) -> int:
        self._nodes.append(node)
        self._numbers.set(tensor, len(self._nodes) - 1)
        return len(self._nodes) - 1

    def _made_of(self, tensor: Tensor) -> tuple[nn.Parameter, ...] | None:
        """The parameters that a tensor is, or was computed from alone; None if it is neither."""
        # first: x.H of a parameter, without gradients, is a leaf that asks for one
        known = self._weights.get(tensor)
        if known is None and (
            isinstance(tensor, nn.Parameter) or (tensor.is_leaf and tensor.requires_grad)
        ):
            return (cast(nn.Parameter, tensor),)  # or what functional_call puts in its place
        return known


def _is_discrete(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex())
