"""Which tensor of one forward pass was made from which: what the two operands of a sum share."""

import heapq
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from resdiag.watch.calls import Call

_SHORTCUT, _BRANCH = 1, 2


@dataclass(eq=False)
class _Node:
    """One tensor as one call left it.

    `counts` has, per frame from whose input it descends, the largest number of parameterised calls
    on the way. `call` is kept where it says something: it can be repeated, or is an activation.
    """

    tensor: "weakref.ref[Tensor]"
    counts: dict[int, int] = field(default_factory=dict)
    parents: tuple[int, ...] = ()
    call: Call | None = None
    repeatable: bool = False
    parameters: tuple[nn.Parameter, ...] = ()
    weighted: bool = False


@dataclass(frozen=True)
class Meeting:
    """What lies between the two operands of an addition and the last tensor that both came from.

    Attributes:
        origin: That tensor: the block's input; None if it is gone.
        shortcut_count: Parameterised calls between it and the shortcut.
        path: The calls that lead from it to the shortcut if they can be repeated, else None.
        parameters: Parameters used on the way to either operand.
        activations: Activations on the way to either operand.
    """

    origin: Tensor | None
    shortcut_count: int
    path: tuple[Call, ...] | None
    parameters: list[nn.Parameter]
    activations: list[Call]


@dataclass(frozen=True)
class Descent:
    """How a result follows from its inputs."""

    counts: dict[int, int]
    parents: tuple[int, ...]
    parameters: tuple[nn.Parameter, ...]
    weighted: bool


class Lineage:
    """The tensors of one forward pass, numbered in the order in which they were made."""

    def __init__(self) -> None:
        self._nodes: list[_Node] = []
        self._at: dict[int, int] = {}
        self._weights: dict[int, tuple[weakref.ref[Tensor], tuple[nn.Parameter, ...]]] = {}

    def clear(self) -> None:
        """Forget the pass."""
        self._nodes.clear()
        self._at.clear()
        self._weights.clear()

    def counts(self, tensor: Tensor) -> dict[int, int]:
        """Parameterised calls on the way to a tensor, per frame whose input it descends from."""
        number = self.number(tensor)
        return {} if number is None else self._nodes[number].counts

    def number(self, tensor: Tensor) -> int | None:
        """The number of a tensor that has been seen."""
        number = self._at.get(id(tensor))
        return number if number is not None and self._nodes[number].tensor() is tensor else None

    def enter(self, tensor: Tensor, frame: int) -> int:
        """A tensor is the input of a frame."""
        number = self.number(tensor)
        if number is None:
            number = self._add(tensor, _Node(weakref.ref(tensor)))
        self._nodes[number].counts[frame] = 0
        return number

    def descend(self, inputs: Iterable[Tensor], frames: Iterable[int]) -> Descent:
        """What the inputs of a call hand on.

        Per open frame that is the largest count, one more if the call has parameters or tensors
        made of parameters alone, e.g. a standardised weight.
        """
        counts: dict[int, int] = {}
        parents: list[int] = []
        parameters: list[nn.Parameter] = []
        weighted = False
        for tensor in inputs:
            number = self.number(tensor)
            if number is None:
                made_of = self._made_of(tensor)
                weighted = weighted or made_of is not None
                parameters.extend(made_of or ())
                continue
            parents.append(number)
            for frame, count in self._nodes[number].counts.items():
                counts[frame] = max(count, counts.get(frame, 0))
        kept = {frame: counts[frame] + weighted for frame in frames if frame in counts}
        return Descent(kept, tuple(parents), tuple(parameters), weighted)

    def mark(
        self, result: Tensor, descent: Descent, call: Call | None, *, alone: bool
    ) -> int | None:
        """Number the result of a call; `alone` if no other tensor went into it.

        None for a result that does not depend on the pass's inputs.
        """
        if not descent.parents:
            if descent.weighted:
                self._weights[id(result)] = (weakref.ref(result), descent.parameters)
            return None
        repeatable = alone and call is not None and not call.is_random
        kept = call if repeatable or (call is not None and call.is_activation) else None
        node = _Node(
            weakref.ref(result),
            dict(descent.counts),
            descent.parents,
            kept,
            repeatable,
            descent.parameters,
            descent.weighted,
        )
        return self._add(result, node)

    def descends(self, tensor: Tensor, ancestor: Tensor) -> bool:
        """Whether `tensor` was made from `ancestor`."""
        start, goal = self.number(tensor), self.number(ancestor)
        if start is None or goal is None:
            return False
        backward = self._walk({goal: 0, start: _BRANCH}, set(), set())
        return next(way for number, way in backward if number <= goal) == _BRANCH

    def meet(self, shortcut: Tensor, branch: Tensor, entries: set[int], sums: set[int]) -> Meeting:
        """Walk back from both operands, latest tensor first, to the first one on both ways.

        Args:
            shortcut: One operand.
            branch: The other.
            entries: Numbers of the frame's inputs: no way leads further back.
            sums: Numbers of the frame's earlier residual sums: the shortcut begins there if it
                gets there alone, as where two branches of one input are added in turn.
        """
        begin, end = self.number(shortcut), self.number(branch)
        assert begin is not None
        assert end is not None
        origin, count, between = begin, 0, list[_Node]()
        for number, way in self._walk({begin: _SHORTCUT, end: _BRANCH}, entries, sums):
            node = self._nodes[number]
            if way == _SHORTCUT | _BRANCH:
                origin = number
                break
            if way == _SHORTCUT:
                origin = number
                count += node.weighted and number not in entries
            if number not in entries:
                between.append(node)
        return Meeting(
            origin=self._nodes[origin].tensor(),
            shortcut_count=count,
            path=self._path(begin, origin),
            parameters=[p for node in between for p in node.parameters],
            activations=[n.call for n in between if n.call is not None and n.call.is_activation],
        )

    def _walk(
        self, ways: dict[int, int], entries: set[int], sums: set[int]
    ) -> Iterator[tuple[int, int]]:
        """Ancestors of some tensors, latest first, each with the ways that lead back to it."""
        queue = [-number for number in ways]
        heapq.heapify(queue)
        while queue:
            number = -heapq.heappop(queue)
            way = ways[number]
            yield number, way
            if number in entries or (number in sums and way == _SHORTCUT):
                continue
            for parent in self._nodes[number].parents:
                if parent not in ways:
                    heapq.heappush(queue, -parent)
                ways[parent] = ways.get(parent, 0) | way

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
