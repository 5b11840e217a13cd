"""Which tensor of one forward pass was made from which: what the two operands of a sum share."""

import heapq
import weakref
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, cast

from torch import Tensor, nn

from resdiag.watch.base.functions import Call, features_after

_LEFT, _RIGHT = 1, 2

Depth: TypeAlias = tuple[int, int, int]
"""Of a way: parameterised transforming operations, other transforming ones, other parameterised."""

_NONE: Depth = (0, 0, 0)


@dataclass(eq=False)
class _Node:
    """One tensor as one call left it.

    Attributes:
        tensor: The tensor, or None for an operand that a fused call never wrote out.
        parents: The floating-point tensors of the pass it was computed from: gradients flow there.
        call: What made it.
        repeatable: Whether the call, applied to the one parent again, gives the same.
        parameters: Parameters that took part.
        piece: Which piece of its parent it is ("" for the whole): a split gives unlike pieces.
        features: The dimension that parameterised operations treated as channels, if known.
        discrete: It has no floating point: nothing descends from it through gradients.
        stream: Of a residual sum, the operand that is the shortcut.
    """

    tensor: "weakref.ref[Tensor] | None"
    parents: tuple[int, ...] = ()
    call: Call | None = None
    repeatable: bool = False
    parameters: tuple[nn.Parameter, ...] = ()
    piece: str = ""
    features: int | None = None
    discrete: bool = False
    stream: int | None = None

    @property
    def is_opaque(self) -> bool:
        """Whether no shortcut leads through it: neither a copy nor a linear map of one parent."""
        return self.call is not None and self.call.is_opaque(len(set(self.parents)))

    @property
    def depth(self) -> Depth:
        """What it adds to a way."""
        transforms, learned = self.is_transform, bool(self.parameters)
        return (
            int(transforms and learned),
            int(transforms and not learned),
            int(learned and not transforms),
        )

    @property
    def is_transform(self) -> bool:
        """Whether it mixes positions or channels."""
        return self.call is not None and self.call.is_transform


@dataclass(frozen=True)
class Scope:
    """A module's forward as the lineage sees it: what came in, and what was there before.

    Attributes:
        entries: Numbers of its inputs.
        start: Tensors numbered below this were there before it began.
    """

    entries: frozenset[int]
    start: int


@dataclass(frozen=True)
class Meeting:
    """What lies between a shortcut and a branch and the last tensor that both came from.

    Attributes:
        swapped: Whether the right operand is the shortcut.
        origin: That tensor: the block's input; None if it is gone.
        shortcut: The shortcut's number.
        shortcut_count: Parameterised calls between it and the shortcut.
        path: The calls that lead from it to the shortcut if they can be repeated, else None.
        parameters: Parameters used on the way to either operand.
        calls: The calls on the branch, in order.
        activations: Activations on the way to either operand.
        is_learned: Whether a parameterised transformation is on the branch.
        begins_activated: Whether the origin was normalised or activated inside the module.
        features: The channel dimension of the sum, if known.
    """

    swapped: bool
    origin: Tensor | None
    shortcut: int
    shortcut_count: int
    path: tuple[Call, ...] | None
    parameters: list[nn.Parameter]
    calls: tuple[Call, ...]
    activations: list[Call]
    is_learned: bool
    begins_activated: bool
    features: int | None


@dataclass(frozen=True)
class Descent:
    """How a result follows from its inputs."""

    parents: tuple[int, ...]
    parameters: tuple[nn.Parameter, ...]
    weighted: bool
    born: bool


class Lineage:
    """The tensors of one forward pass, numbered in the order in which they were made."""

    def __init__(self) -> None:
        self._nodes: list[_Node] = []
        self._at: dict[int, int] = {}
        self._weights: dict[int, tuple[weakref.ref[Tensor], tuple[nn.Parameter, ...]]] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def clear(self) -> None:
        """Forget the pass."""
        self._nodes.clear()
        self._at.clear()
        self._weights.clear()

    def without_tensors(self, kept: Container[int]) -> "Lineage":
        """A copy that holds on to no tensor but those whose `id` is in `kept`."""
        bare = Lineage()
        for node in self._nodes:
            call = None if node.call is None else node.call.without_tensors(kept)
            bare._nodes.append(replace(node, tensor=None, call=call))
        return bare

    def resume(
        self,
        known: "Lineage",
        count: int,
        tensors: Iterable[tuple[Tensor, int | tuple[nn.Parameter, ...]]],
    ) -> None:
        """Stand where a pass like this one stood, which `known` was taken from.

        Args:
            known: Its lineage, without tensors.
            count: How many of its nodes this pass has made.
            tensors: This pass's tensors, in order, with their numbers or, for what is made of
                parameters alone, these.
        """
        self._nodes = [replace(node) for node in known._nodes[:count]]
        for tensor, number in tensors:
            reference = weakref.ref(tensor)
            if isinstance(number, int):
                self._nodes[number].tensor = reference
                self._at[id(tensor)] = number
            else:
                self._weights[id(tensor)] = (reference, number)

    def number(self, tensor: Tensor) -> int | None:
        """The number of a tensor that has been seen."""
        number = self._at.get(id(tensor))
        if number is None:
            return None
        reference = self._nodes[number].tensor
        return number if reference is not None and reference() is tensor else None

    def enter(self, tensor: Tensor) -> int:
        """A tensor is the input of a module: it is part of the pass."""
        number = self.number(tensor)
        if number is None:
            number = self._add(tensor, _Node(weakref.ref(tensor), discrete=_is_discrete(tensor)))
        return number

    def descend(self, inputs: Iterable[Tensor]) -> Descent:
        """What the inputs of a call hand on to its results."""
        parents: list[int] = []
        parameters: list[nn.Parameter] = []
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
                self._weights[id(result)] = (weakref.ref(result), descent.parameters)
            return None
        repeatable = alone and call is not None and not call.is_random
        node = _Node(
            weakref.ref(result),
            () if discrete else descent.parents,
            call,
            repeatable,
            descent.parameters,
            piece,
            None if discrete else self._features(result, descent, call),
            discrete,
        )
        return self._add(result, node)

    def set_stream(self, number: int, shortcut: int) -> None:
        """A tensor is a residual sum."""
        self._nodes[number].stream = shortcut

    def imagine(self, inputs: Sequence[Tensor], call: Call) -> int | None:
        """Number an operand that a fused call computes and never writes out."""
        descent = self.descend(inputs)
        if not descent.parents:
            return None
        parameters = descent.parameters
        features = next((self._nodes[p].features for p in descent.parents), None)
        self._nodes.append(
            _Node(None, descent.parents, call, parameters=parameters, features=features)
        )
        return len(self._nodes) - 1

    def features(self, number: int) -> int | None:
        """The channel dimension of a tensor, if known."""
        return self._nodes[number].features

    def is_linear(self, number: int | None) -> bool:
        """Whether a tensor is what a linear layer returned."""
        call = None if number is None else self._nodes[number].call
        return call is not None and call.name == "linear"

    def calls(self, start: int, end: int) -> tuple[Call, ...]:
        """The operations that made the tensors from one number to another, in order."""
        made = (node.call for node in self._nodes[start : end + 1])
        return tuple(call for call in made if call is not None)

    def parameters(self, number: int) -> tuple[nn.Parameter, ...]:
        """Parameters that took part in making a tensor."""
        return self._nodes[number].parameters

    def ancestors(self, number: int) -> set[int]:
        """All that a tensor was made from, itself included."""
        return set(self._walk({number: _LEFT}, 0))

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
            known = node.call is not None and (
                node.call.is_activation or node.call.is_normalisation
            )
            if not known or len(node.parents) != 1:
                break
            tail.append(number)
        return tail

    def call(self, number: int) -> Call | None:
        """What made a tensor."""
        return self._nodes[number].call

    def descends(self, number: int, ancestor: int) -> bool:
        """Whether a tensor was made from another."""
        queue, seen = [number], {number}
        while queue:
            at = queue.pop()
            if at == ancestor:
                return True
            for parent in self._nodes[at].parents:
                if parent >= ancestor and parent not in seen:
                    seen.add(parent)
                    queue.append(parent)
        return False

    def meet(self, left: int, right: int, scope: Scope) -> Meeting | None:
        """What the two operands of an addition have in common, if that makes it residual.

        Walk back from both, latest tensor first, to the first one on both ways: x. Of the two ways
        from there the shorter one, in parameterised and then in other transforming operations, is
        the shortcut. The addition is residual if

        - the branch transforms at all (convolution, linear map, attention, pooling, ...), and more
          often than the shortcut does: else they are parallel branches,
        - the shortcut does not but for linear maps: no product of two tensors of the pass, no
          activation between two maps,
        - they are not different pieces of x, as in Res2Net's hierarchy of splits,
        - no residual sum on the branch has a shortcut that passes x by: else x is only added to
          somebody else's stream again and again, as a position bias is,
        - the shortcut begins inside the module whose forward runs the addition, or at its input.
        """
        ways = {left: _LEFT}
        ways[right] = ways.get(right, 0) | _RIGHT
        between: list[int] = []
        origin = None
        for number in self._walk(ways, min(scope.entries, default=0)):
            if ways[number] == _LEFT | _RIGHT:
                origin = number
                break
            between.append(number)
        if origin is None:
            return None
        depths = self._depths(origin, reversed(between))
        one, other = depths[left], depths[right]
        if one[:2] == other[:2]:
            return None
        swapped = other < one
        shortcut, branch = (right, left) if swapped else (left, right)
        short, long = (_RIGHT, _LEFT) if swapped else (_LEFT, _RIGHT)
        on_shortcut = [n for n in reversed(between) if ways[n] == short]
        on_branch = [n for n in reversed(between) if ways[n] == long and n in depths]
        if depths[branch][:2] == (0, 0) or not self._is_shortcut(on_shortcut):
            return None
        if self._are_pieces(origin, on_shortcut, on_branch):
            return None
        if any((s := self._nodes[n].stream) is not None and s not in depths for n in on_branch):
            return None
        if not _is_inside(scope, origin, on_shortcut, on_branch, depths[shortcut] == _NONE):
            return None
        inside = [n for n in between if n in depths or n >= scope.start]
        return self._meeting(swapped, origin, shortcut, branch, on_shortcut, on_branch, inside)

    def _meeting(
        self,
        swapped: bool,
        origin: int,
        shortcut: int,
        branch: int,
        on_shortcut: list[int],
        on_branch: list[int],
        inside: list[int],
    ) -> Meeting:
        nodes = self._nodes
        calls = tuple(call for n in on_branch if (call := nodes[n].call) is not None)
        at, reference = nodes[origin], nodes[origin].tensor
        # the stream's own: a branch that mixes tokens, turned, has its features where they are
        found = (nodes[n].features for n in (shortcut, origin, branch))
        return Meeting(
            swapped=swapped,
            origin=None if reference is None else reference(),
            shortcut=shortcut,
            shortcut_count=sum(bool(nodes[n].parameters) for n in on_shortcut),
            path=self._path(shortcut, origin),
            parameters=[p for n in inside for p in nodes[n].parameters],
            calls=calls,
            activations=[
                call for n in inside if (call := nodes[n].call) is not None and call.is_activation
            ],
            is_learned=any(nodes[n].depth[0] for n in on_branch),
            begins_activated=at.call is not None
            and (at.call.is_activation or at.call.is_normalisation),
            features=next((f for f in found if f is not None), None),
        )

    def _walk(self, ways: dict[int, int], lowest: int) -> Iterator[int]:
        """Ancestors of some tensors, latest first; `ways` is filled on the way."""
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

    def _depths(self, origin: int, numbers: Iterable[int]) -> dict[int, Depth]:
        """The longest way from the origin to each tensor that descends from it."""
        depths = {origin: _NONE}
        for number in numbers:
            node = self._nodes[number]
            before = [depths[parent] for parent in node.parents if parent in depths]
            if before:
                (a, b, c), (d, e, f) = max(before), node.depth
                depths[number] = (a + d, b + e, c + f)
        return depths

    def _is_shortcut(self, numbers: list[int]) -> bool:
        """Whether a way is the identity or a linear map, activated at its ends at most."""
        mapped = activated = False
        for number in numbers:
            node = self._nodes[number]
            if node.is_opaque or (mapped and activated and node.is_transform):
                return False
            mapped = mapped or node.is_transform
            acts = node.call is not None and node.call.is_activation
            activated = mapped and (activated or acts)
        return True

    def _are_pieces(self, origin: int, on_shortcut: list[int], on_branch: list[int]) -> bool:
        """Whether the shortcut and the branch begin with different pieces of the origin."""
        pieces = [
            {self._nodes[n].piece for n in way if origin in self._nodes[n].parents}
            for way in (on_shortcut, on_branch)
        ]
        one, other = pieces
        return bool(one) and "" not in one | other and one.isdisjoint(other)

    def _path(self, number: int, origin: int) -> tuple[Call, ...] | None:
        """Calls from `origin` to a tensor if each can be repeated, else None."""
        calls: list[Call] = []
        while number != origin:
            node = self._nodes[number]
            if node.call is None or not node.repeatable or number < origin:
                return None
            calls.append(node.call)
            (number,) = node.parents
        return tuple(reversed(calls))

    def _features(self, result: Tensor, descent: Descent, call: Call | None) -> int | None:
        """The channel dimension of a result."""
        first = self._nodes[descent.parents[0]] if descent.parents else None
        before = None if first is None or first.tensor is None else first.tensor()
        known = None if first is None else first.features
        if call is None:
            return known
        shape = None if before is None else before.shape
        return features_after(call, result, descent.parameters, shape, known)

    def _add(self, tensor: Tensor, node: _Node) -> int:
        self._nodes.append(node)
        self._at[id(tensor)] = len(self._nodes) - 1
        return len(self._nodes) - 1

    def _made_of(self, tensor: Tensor) -> tuple[nn.Parameter, ...] | None:
        """The parameters that a tensor is, or was computed from alone; None if it is neither."""
        if isinstance(tensor, nn.Parameter) or (tensor.is_leaf and tensor.requires_grad):
            return (cast(nn.Parameter, tensor),)  # or what functional_call puts in its place
        reference, parameters = self._weights.get(id(tensor), (None, ()))
        return parameters if reference is not None and reference() is tensor else None


def _is_inside(
    scope: Scope, origin: int, on_shortcut: list[int], on_branch: list[int], identity: bool
) -> bool:
    """Whether the shortcut begins inside the module or at its input.

    A branch may come from outside if the shortcut is the module's very input, as where a module
    gets x and F(x) and adds them; a shortcut may where the module gets x and h(x).
    """
    if any(number in scope.entries for number in on_shortcut):
        handed = on_shortcut[-1] in scope.entries and origin in scope.entries
        if not handed:
            return False
    return identity or not any(number in scope.entries for number in on_branch)


def _is_discrete(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex())
