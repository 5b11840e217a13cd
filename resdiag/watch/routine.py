"""What one followed forward pass did, call by call, so that the next one can be recognised.

Following a pass asks of every call what it makes of what: that costs more than most measurements.
A training repeats its pass, and a pass that makes the same calls with the same operands has the
same blocks. So a `Routine` keeps, of a pass that was followed, every torch function with its
operands - the result of which earlier call, which parameter, which constant - and what the tracer
concluded; `watch/repeat.py` compares.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resdiag.watch.base.functions import Call
from resdiag.watch.lineage import Descent, Lineage, Scope

if TYPE_CHECKING:
    from resdiag.watch.addition import Addition

_CONSTANTS = (
    type(None),
    int,
    float,
    bool,
    str,
    type(...),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
)


class Unlike(Exception):
    """An operand that cannot be recognised in another pass."""


@dataclass(frozen=True)
class Made:
    """An operand inside a list: the result at a place of the routine."""

    place: int


@dataclass(eq=False, slots=True)
class Joint:
    """A residual addition of the routine, as the tracer understood it.

    Attributes:
        known: The addition without its tensors.
        swapped: Whether the right operand is the shortcut.
        origin: Place of the block's input, None if it was gone.
        activations: Indices of the calls among `known.activations`, which does not keep them.
        parameters: What each call after the addition added to the block's parameters.
        closes: The block before in the same module, which ends here.
        is_tail: Whether the block's output is what the chain made, not the sum.
    """

    known: "Addition"
    swapped: bool
    origin: int | None
    activations: tuple[int, ...]
    parameters: list[tuple[nn.Parameter, ...]] = field(default_factory=list)
    closes: "Joint | None" = None
    is_tail: bool = False


@dataclass(eq=False, slots=True)
class Step:
    """One call of the routine.

    Attributes:
        function: The torch function.
        count: Number of positional arguments.
        made: Positions of arguments that are results, with their places.
        kept: Positions of arguments that are parameters or buffers, with these.
        constants: The other positional arguments.
        nested: Positions of lists that hold tensors, with a pattern of each.
        keywords: A pattern of each keyword argument.
        results: Number of tensors that it returned.
        tells: Whether anything below is more than nothing.
        owners: For an activation, the names of the modules that were running.
        joint: The residual addition that it is.
        chained: The block whose sum it turns into the output.
        is_head: Whether it is a linear layer that may be the last one.
        nodes: Size of the lineage once it had run.
        numbers: For each result its number in the lineage or the parameters it is made of.
    """

    function: Callable[..., Any]
    count: int = 0
    made: tuple[tuple[int, int], ...] = ()
    kept: tuple[tuple[int, Tensor], ...] = ()
    constants: tuple[tuple[int, object], ...] = ()
    nested: tuple[tuple[int, object], ...] = ()
    keywords: dict[str, object] = field(default_factory=dict)
    results: int = 1
    tells: bool = False
    owners: tuple[str, ...] | None = None
    joint: Joint | None = None
    chained: Joint | None = None
    is_head: bool = False
    nodes: int = 0
    numbers: tuple[int | tuple[nn.Parameter, ...] | None, ...] = ()


@dataclass(eq=False, slots=True)
class Turn:
    """A module's forward begins or ends.

    Attributes:
        at: Index of the call before which it happens.
        name: The module.
        begins: Which of the two.
        module: The module itself.
        scope: For a beginning, how the lineage saw it.
        nodes: Size of the lineage after it.
        closes: For an end, the block that ends with it.
        returned: Place of what is returned, for an end that closes a block.
    """

    at: int
    name: str
    begins: bool
    module: nn.Module
    scope: Scope | None
    nodes: int
    closes: Joint | None = None
    returned: int | None = None


@dataclass(eq=False, slots=True)
class Routine:
    """One followed pass.

    Attributes:
        inputs: Shape without the batch, dtype and device of each tensor that went in.
        numbers: Their numbers in the lineage.
        entered: Parameters and buffers that were handed to a module, with their numbers.
        steps: The calls in order.
        turns: Where modules began and ended, in order.
        lineage: The nodes of the pass, without its tensors.
    """

    inputs: tuple[object, ...] = ()
    numbers: tuple[int, ...] = ()
    entered: list[tuple[Tensor, int]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    lineage: Lineage = field(default_factory=Lineage)


def kind_of(x: Tensor) -> object:
    """What two passes' inputs must have in common."""
    return x.shape[1:], x.dtype, x.device


class Learner:
    """Writes the routine of a pass while the tracer follows it.

    Args:
        kept: The model's parameters and buffers.
    """

    def __init__(self, kept: Iterable[Tensor]) -> None:
        self._kept = {id(tensor): tensor for tensor in kept}
        self._places: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._count = 0
        self._routine = Routine()
        self._joints: dict[int, Joint] = {}
        self._calls: dict[int, int] = {}
        self._ending: Joint | None = None
        self._now = Step(_nothing)
        self.is_spoiled = False

    def spoil(self) -> None:
        """Something happened that a repeat could not recognise: there will be no routine."""
        self.is_spoiled = True

    def enter(
        self,
        name: str,
        module: nn.Module,
        inputs: Sequence[Tensor],
        numbers: Sequence[int],
        scope: Scope,
        nodes: int,
    ) -> None:
        """A module's forward begins, with inputs of these numbers in the lineage."""
        routine = self._routine
        if not routine.turns:
            routine.inputs, routine.numbers = tuple(map(kind_of, inputs)), tuple(numbers)
            self._register(inputs)
        for x, number in zip(inputs, numbers, strict=True):
            if self._place(x) is None and id(x) in self._kept:
                routine.entered.append((x, number))
            elif self._place(x) is None:
                self.spoil()
        routine.turns.append(
            Turn(len(routine.steps), name, begins=True, module=module, scope=scope, nodes=nodes)
        )

    def leave(self, name: str, module: nn.Module, first: Tensor | None, nodes: int) -> None:
        """A module's forward has ended and returned `first`."""
        at, ending = len(self._routine.steps), self._ending
        turn = Turn(at, name, begins=False, module=module, scope=None, nodes=nodes, closes=ending)
        if ending is not None and first is not None:
            turn.returned = self._place(first)
            if turn.returned is None:
                self.spoil()
        self._ending = None
        self._routine.turns.append(turn)

    def close(self, addition: "Addition", *, is_tail: bool) -> None:
        """A block ends: with its module, or because the next addition begins."""
        self._ending = self._joints.get(id(addition))
        if self._ending is not None:
            self._ending.is_tail = is_tail

    def begin(self, function: Callable[..., Any]) -> None:
        """A call is about to be looked at."""
        self._now = Step(function)

    def activate(self, owners: tuple[str, ...]) -> None:
        """The call is an activation."""
        self._now.owners = owners

    def join(self, addition: "Addition", *, swapped: bool) -> None:
        """The call is a residual addition."""
        origin = None if addition.origin is None else self._place(addition.origin)
        if addition.origin is not None and origin is None:
            self.spoil()
        known = copy(addition)
        known.origin = known.sum = None
        known.branch = known.shortcut = torch.empty(0)
        known.calls, known.activations, known.after = (), [], ()
        known.parameters = list(addition.parameters)
        indices = [self._calls.get(id(call)) for call in addition.activations]
        known_indices = tuple(index for index in indices if index is not None)
        if len(known_indices) != len(indices):
            self.spoil()
        joint = Joint(known, swapped, origin, known_indices, closes=self._ending)
        self._ending, self._now.joint = None, joint
        self._joints[id(addition)] = joint

    def chain(self, addition: "Addition", parameters: tuple[nn.Parameter, ...]) -> None:
        """The call turns a block's sum into its output."""
        joint = self._joints.get(id(addition))
        if joint is not None:
            joint.parameters.append(parameters)
            self._now.chained = joint

    def head(self) -> None:
        """The call is a linear layer."""
        self._now.is_head = True

    def end(
        self,
        call: Call,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        results: Sequence[Tensor],
        numbers: Sequence[int | None],
        descent: Descent,
        nodes: int,
    ) -> None:
        """The call has run."""
        if self.is_spoiled:
            return
        step = self._now
        try:
            self._read(step, args, kwargs)
        except Unlike:
            self.spoil()
            return
        self._calls[id(call)] = len(self._routine.steps)
        made_of = descent.parameters if descent.weighted else None
        step.numbers = tuple(made_of if number is None else number for number in numbers)
        step.results, step.nodes = len(results), nodes
        step.tells = bool(step.owners is not None or step.joint or step.chained or step.is_head)
        self._routine.steps.append(step)
        self._register(results)

    def finish(self, lineage: Lineage) -> Routine | None:
        """The routine of the pass that has ended; None if another could not be recognised by it."""
        if self.is_spoiled:
            return None
        self._routine.lineage = lineage.without_tensors(self._kept)
        return self._routine

    def _register(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self._places[id(tensor)] = (weakref.ref(tensor), self._count)
            self._count += 1

    def _place(self, tensor: Tensor) -> int | None:
        reference, place = self._places.get(id(tensor), (None, 0))
        return place if reference is not None and reference() is tensor else None

    def _read(self, step: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note what the operands are."""
        patterns = [(index, self._pattern(value)) for index, value in enumerate(args)]
        step.count = len(args)
        step.made = tuple((i, p.place) for i, p in patterns if isinstance(p, Made))
        step.kept = tuple((i, p) for i, p in patterns if isinstance(p, Tensor))
        lists = {i for i, p in patterns if isinstance(p, list | tuple) and _has_tensors(p)}
        step.nested = tuple((i, p) for i, p in patterns if i in lists)
        others = (
            (i, p) for i, p in patterns if not isinstance(p, Made | Tensor) and i not in lists
        )
        step.constants = tuple(others)
        step.keywords = {name: self._pattern(value) for name, value in kwargs.items()}

    def _pattern(self, value: object) -> object:
        """What another pass must have in the place of a value."""
        if isinstance(value, Tensor):
            place = self._place(value)
            if place is not None:
                return Made(place)
            if id(value) in self._kept:
                return value
            raise Unlike
        if type(value) in _CONSTANTS:
            return value
        if type(value) is slice:
            parts = (value.start, value.stop, value.step)
            if all(type(part) in _CONSTANTS for part in parts):
                return value
        if type(value) in (list, tuple):
            items = [self._pattern(item) for item in value]  # type: ignore[attr-defined]
            if type(value) is tuple and not _has_tensors(items):
                return value  # a module hands on the same one each time
            return items if type(value) is list else tuple(items)
        raise Unlike


def agrees(value: object, pattern: object, made: Sequence[weakref.ref[Tensor]]) -> bool:
    """Whether a value is what a pattern says."""
    if value is pattern:
        return True
    if isinstance(pattern, Made):
        return made[pattern.place]() is value
    if isinstance(pattern, Tensor) or type(value) is not type(pattern):
        return False
    if isinstance(value, list | tuple) and isinstance(pattern, list | tuple):
        pairs = zip(value, pattern, strict=False)
        return len(value) == len(pattern) and all(agrees(v, p, made) for v, p in pairs)
    return bool(value == pattern)


def _has_tensors(pattern: object) -> bool:
    if isinstance(pattern, list | tuple):
        return any(_has_tensors(item) for item in pattern)
    return isinstance(pattern, Made | Tensor)


def _nothing() -> None:
    """What no call is."""
