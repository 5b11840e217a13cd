"""Recognises a forward pass that repeats a routine, call by call.

Nothing is concluded here. Every torch function is compared with the routine's: the same function,
the results of the same earlier calls, the same parameters, equal constants, in the same modules.
Where the routine has a residual addition, an activation or a block's end, the listener is told of
it with the tensors of this pass. At the first difference the tracer takes over, as if it had
followed from the beginning.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from resdiag.watch.base.functions import Call
from resdiag.watch.base.tensors import tensors_in
from resdiag.watch.routine import Joint, Routine, Step, Turn, agrees, kind_of
from resdiag.watch.sums import read_sum

if TYPE_CHECKING:
    from resdiag.watch.addition import Addition
    from resdiag.watch.listener import Listener


@dataclass(eq=False, slots=True)
class OpenBlock:
    """A residual addition of this pass whose block has not ended yet."""

    addition: "Addition"
    tail: Tensor | None = None
    chain: list[Call] = field(default_factory=list)


class Follower(Protocol):
    """The tracer, as a repeat sees it."""

    def tell(self, what: Callable[..., None], *args: object) -> None:
        """Tell the listener without watching what it computes."""

    def take_over(self, repeat: "Repeat") -> None:
        """Follow on from where the repeat has lost the routine."""

    def passes(self, function: Callable[..., Any]) -> bool:
        """Whether a call is no part of the pass: it asks about a tensor, or a listener runs."""

    def look(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[Any], None]:
        """See a call that is about to run; what it returns is to be called with the result."""

    def watch(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Run a call and follow it."""


class Repeat(TorchFunctionMode):
    """One forward pass along a routine.

    Args:
        routine: The pass that this one is expected to repeat.
        listener: Told about additions, blocks and activations.
        tracer: Takes over where the pass leaves the routine.

    Attributes:
        made: The tensors of this pass by their places on the routine.
        at: Index of the next call.
        turn: Index of the next turn: a beginning or an end of a module.
        lost: Whether the pass has left the routine.
        head: Input and result of the last linear layer.
        ordinals: Residual additions that each module has done.
        frames: The modules that are running, outermost first, each with the block it has open.
        open: The blocks that are open, by the `id` of their place on the routine.
    """

    def __init__(self, routine: Routine, listener: "Listener", tracer: Follower) -> None:
        super().__init__()
        self.routine, self._listener, self._tracer = routine, listener, tracer
        self._steps, self._turns = routine.steps, routine.turns
        self.made: list[weakref.ref[Tensor]] = []
        self.at = self.turn = 0
        self.lost = False
        self.head: tuple[Tensor | None, Tensor | None] = (None, None)
        self.ordinals: dict[str, int] = {}
        self.frames: list[tuple[Turn, Joint | None]] = []
        self.open: dict[int, OpenBlock] = {}
        self._activations: dict[int, Call] = {}

    # -- modules -------------------------------------------------------------------------------

    def begin(self, inputs: Sequence[Tensor]) -> bool:
        """The model's forward begins; whether its inputs are like those of the routine."""
        if tuple(map(kind_of, inputs)) != self.routine.inputs:
            self._lose()
            return False
        self.made.extend(map(weakref.ref, inputs))
        return True

    def enter(self, name: str, module: nn.Module) -> bool:
        """A module's forward begins; whether the routine says so too."""
        turn = self._next_turn(name, module, begins=True)
        if turn is None:
            self._lose()
            return False
        self.turn += 1
        self.frames.append((turn, None))
        return True

    def leave(self, name: str, module: nn.Module, first: Tensor | None) -> bool:
        """A module's forward has returned `first`; whether the routine says so too."""
        turn = self._next_turn(name, module, begins=False)
        if turn is not None and turn.closes is not None:
            there = None if turn.returned is None else self.made[turn.returned]()
            turn = turn if there is first else None
        if turn is None:
            self._lose()
            return False
        self.turn += 1
        self.frames.pop()
        if turn.closes is not None:
            self._close(turn.closes, first)
        return True

    def _next_turn(self, name: str, module: nn.Module, *, begins: bool) -> Turn | None:
        turn = self._turns[self.turn] if self.turn < len(self._turns) else None
        if turn is None or turn.at != self.at or turn.begins != begins:
            return None
        return turn if turn.name == name and turn.module is module else None

    # -- calls ---------------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run one torch function: the next of the routine, or the one that leaves it."""
        words: Mapping[str, Any] = kwargs or {}
        if self.lost:
            return self._tracer.watch(func, args, dict(words))
        step = self._steps[self.at] if self.at < len(self._steps) else None
        if step is None or not self._is_next(step, func, args, words):
            if self._tracer.passes(func):
                return func(*args, **words)
            self._lose()
            return self._tracer.watch(func, args, dict(words))
        if step.tells:
            return self._tell(step, func, args, dict(words))
        result = func(*args, **words)
        if step.results == 1 and isinstance(result, Tensor):
            self.made.append(weakref.ref(result))
            self.at += 1
        else:
            self._keep(step, func, args, dict(words), result)
        return result

    def _is_next(
        self,
        step: Step,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> bool:
        """Whether a call is the one that the routine has here."""
        if func is not step.function and func != step.function:
            return False
        if len(args) != step.count or len(kwargs) != len(step.keywords):
            return False
        turns = self._turns
        if turns[self.turn].at == self.at:  # a module was to begin or end first
            return False
        made = self.made
        for index, place in step.made:
            if made[place]() is not args[index]:
                return False
        for index, tensor in step.kept:
            if args[index] is not tensor:
                return False
        for index, constant in step.constants:
            value = args[index]
            if value is not constant and not agrees(value, constant, made):
                return False
        if step.nested and not all(agrees(args[i], p, made) for i, p in step.nested):
            return False
        keywords = step.keywords
        return not kwargs or all(
            name in keywords and agrees(value, keywords[name], made)
            for name, value in kwargs.items()
        )

    def _keep(
        self,
        step: Step,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: object,
    ) -> None:
        """Remember several results, or that there is none."""
        results = list(tensors_in(result))
        if len(results) != step.results:  # the data says how many there are
            self._lose()
            self._tracer.look(func, args, kwargs)(result)
            return
        self.made.extend(map(weakref.ref, results))
        self.at += 1

    def _tell(
        self, step: Step, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:  # noqa: ANN401
        """Run a call that is an addition, an activation or a linear layer."""
        block = None if step.joint is None else self._join(step.joint, func, args, kwargs)
        call = Call(func, args[1:], kwargs)
        if step.owners is not None:
            self._activations[self.at] = call
            if self._listener.counts_gates:
                self._tracer.tell(self._listener.activation, step.owners, call, args[0])
        result = func(*args, **kwargs)
        if step.results != 1 or not isinstance(result, Tensor):
            self._keep(step, func, args, kwargs, result)
            return result
        self.made.append(weakref.ref(result))
        self.at += 1
        if block is not None:
            block.addition.sum = block.tail = result
            self.open[id(step.joint)] = block
            self.frames[-1] = (self.frames[-1][0], step.joint)
            self._tracer.tell(self._listener.added, block.addition)
        elif step.chained is not None:
            chained = self.open[id(step.chained)]
            chained.tail = result
            chained.chain.append(call)
        elif step.is_head:
            self.head = (args[0], result)
        return result

    # -- blocks --------------------------------------------------------------------------------

    def _join(
        self,
        joint: Joint,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> OpenBlock:
        """Both operands of a residual addition are there."""
        if joint.closes is not None:
            self._close(joint.closes, None)
        spelled = read_sum(func, args, kwargs)
        assert spelled is not None  # it was one when the routine was made
        shortcut, branch = (
            (spelled.right, spelled.left) if joint.swapped else (spelled.left, spelled.right)
        )
        addition = joint.known.again()
        with torch._C.DisableTorchFunction():
            h, f = shortcut.make(), branch.make()
            addition.shortcut = h
            addition.branch = f if f.shape == h.shape else f.detach().expand_as(h)
        addition.shortcut_scale, addition.branch_scale = shortcut.scale, branch.scale
        addition.origin = None if joint.origin is None else self.made[joint.origin]()
        addition.activations = [self._activations[index] for index in joint.activations]
        addition.parameters = list(joint.known.parameters)
        self.ordinals[addition.owner] = addition.ordinal + 1
        self._tracer.tell(self._listener.operands, addition)
        return OpenBlock(addition)

    def _close(self, joint: Joint, returned: Tensor | None) -> None:
        """A block has ended."""
        block = self.open.pop(id(joint))
        addition, output = block.addition, block.addition.sum
        if joint.is_tail:
            output = block.tail
            addition.after = tuple(block.chain)
            addition.parameters.extend(p for added in joint.parameters for p in added)
            addition.activations.extend(call for call in block.chain if call.is_activation)
        addition.returned = returned is output
        self._tracer.tell(self._listener.closed, addition, output)

    def _lose(self) -> None:
        """The pass does something else."""
        self.lost = True
        self._tracer.take_over(self)

    # -- what the tracer needs to go on --------------------------------------------------------

    @property
    def nodes(self) -> int:
        """How much of the routine's lineage this pass has had."""
        last_step = self._steps[self.at - 1].nodes if self.at else 0
        return max(last_step, self._turns[self.turn - 1].nodes if self.turn else 0)

    def known(self) -> Iterator[tuple[Tensor, int | tuple[nn.Parameter, ...]]]:
        """The tensors of this pass that are still there, and what the lineage says of each."""
        yield from (pair for pair in self.routine.entered if pair[1] < self.nodes)
        numbers: list[int | tuple[nn.Parameter, ...] | None] = list(self.routine.numbers)
        for step in self._steps[: self.at]:
            numbers.extend(step.numbers)
        for reference, number in zip(self.made, numbers, strict=False):
            tensor = reference()
            if tensor is not None and number is not None:
                yield tensor, number
