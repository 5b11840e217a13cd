"""The modules whose forwards are running, and the blocks that are open in them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import get_ident

from torch import Tensor, nn

from resdiag.watch.base.functions import Call
from resdiag.watch.base.tensors import TensorTable, first_floating, tensors_in
from resdiag.watch.find.additions import Addition
from resdiag.watch.find.dataflow import Dataflow, Descent, Scope
from resdiag.watch.find.passes import Bus, Operands
from resdiag.watch.find.units import Visit, unit_of


@dataclass(eq=False)
class Frame:
    """One module whose forward is running."""

    name: str
    module: nn.Module
    entry: Tensor | None  # its first floating-point input
    scope: Scope  # the tensors that it was handed, and where its part of the pass begins
    number: int | None  # number of `entry` in the pass
    first_activation: int  # how many activations ran before it
    open: Addition | None = None  # the residual addition whose block has not ended
    tensors: Operands | None = None  # its operands
    total: Tensor | None = None  # its sum
    tail: Tensor | None = None  # the sum, or what the after-add made of it so far
    chain: tuple[Call, ...] = ()  # the calls after the sum that made the tail
    chain_parameters: tuple[nn.Parameter, ...] = ()  # their parameters
    additions: int = 0  # residual additions in its own forward


@dataclass(eq=False)
class _EndingUnit:
    """A unit whose module has ended, while the activations after it are still to come."""

    visit: Visit
    last: Tensor
    tail: list[int] = field(default_factory=list)


def _unseen(x: Tensor) -> Tensor:
    raise NotImplementedError("stands for an operation that cannot be repeated")


_UNSEEN = Call(_unseen, (), {})


class ModuleStack:
    """Opens and closes the blocks and units of one pass as modules begin and end.

    `tails` are names of units, and how many activations and normalisations after each belong to
    it; `chosen` says whether the units were chosen by the user.
    """

    def __init__(self, flow: Dataflow, bus: Bus, tails: Mapping[str, int], *, chosen: bool) -> None:
        self.frames: list[Frame] = []  # the modules that are running, outermost first
        self.activations: list[Call] = []  # of the pass so far
        self._flow, self._bus, self._tails, self._chosen = flow, bus, tails, chosen
        self._counts: Counter[str] = Counter()
        self._ending: list[_EndingUnit] = []

    def push(self, name: str, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        """A module's forward begins."""
        # what a parametrisation is handed makes a weight: it joins no stream
        inputs = [] if self._flow.are_weights(inputs) else inputs
        entry, start = first_floating(inputs), len(self._flow)
        scope = Scope(frozenset(self._flow.enter(tensor) for tensor in inputs), start)
        number = None if entry is None else self._flow.number(entry)
        self.frames.append(Frame(name, module, entry, scope, number, len(self.activations)))
        if name in self._tails and entry is not None and number is not None:
            self.tell_passing(number, entry)

    def pop(self, module: nn.Module, output: object) -> None:
        """A module's forward has ended; so have those in it that an exception has left."""
        frame = self.frames.pop()
        while self.frames and frame.module is not module:
            frame = self.frames.pop()
        outputs = list(tensors_in(output))
        first = outputs[0] if outputs else None
        self._heal(frame, outputs)
        if frame.open is not None:
            self.close(frame, first)
        if frame.name in self._tails and not frame.additions and first is not None:
            self._begin_unit(frame, first)

    def ordinal(self, owner: str) -> int:
        """How many blocks a module had before, in this pass."""
        self._counts[owner] += 1
        return self._counts[owner] - 1

    def open(self, frame: Frame, addition: Addition, tensors: Operands, total: Tensor) -> None:
        """The sum of a residual addition is there."""
        frame.open, frame.tensors, frame.total, frame.tail = addition, tensors, total, total
        frame.chain, frame.chain_parameters = (), ()
        frame.additions += 1

    def close_before(self, frame: Frame, origin: Tensor | None) -> None:
        """The next addition of a module begins, on `origin`: the block before it ends."""
        if frame.open is None:
            return
        returned, tail = origin, frame.tail
        if tail is not None and origin is not None and all(c.is_activation for c in frame.chain):
            # what it handed on is its activated sum, if the next one's input was made from it
            start, goal = self._flow.number(origin), self._flow.number(tail)
            if start is not None and goal is not None and self._flow.descends(start, goal):
                returned = tail
        self.close(frame, returned)

    def close(self, frame: Frame, returned: Tensor | None) -> None:
        """End the open block of a frame at its module's output or at its next addition."""
        addition, output = frame.open, frame.total
        assert addition is not None
        assert output is not None
        if frame.chain and frame.tail is not None and returned is frame.tail:
            output = frame.tail
            addition.after = frame.chain
            addition.parameters.extend(frame.chain_parameters)
            addition.activations.extend(call for call in frame.chain if call.is_activation)
        frame.open = frame.tensors = frame.total = frame.tail = None
        frame.chain, frame.chain_parameters = (), ()
        self._bus.tell("closed", addition, output)

    def owner_of(self, first: Tensor | None, call: Call, result: Tensor) -> Frame | None:
        """The frame whose open block's sum (or its tail) this call turns into the output."""
        if first is None or not call.is_after:
            return None
        owners = (f for f in reversed(self.frames) if f.open is not None and f.tail is first)
        return next(owners, None) if result.shape == first.shape else None

    def _heal(self, frame: Frame, outputs: list[Tensor]) -> None:
        """Go on after an operation that no torch function shows, e.g. an autograd.Function."""
        unseen = [x for x in outputs if x.requires_grad and self._flow.number(x) is None]
        entries = frame.scope.entries
        if unseen and entries:
            parameters = tuple(frame.module.parameters())
            descent = Descent(tuple(sorted(entries)), parameters, bool(parameters), born=False)
            for tensor in unseen:
                self._flow.mark(tensor, descent, _UNSEEN, alone=False)

    def trail(self, first: Tensor | None, call: Call, number: int, result: Tensor) -> None:
        """An activation or a normalisation right after a unit's module is part of the unit."""
        ending = next((e for e in self._ending if e.last is first and call.is_after), None)
        if ending is not None:
            ending.tail.append(number)
            ending.last = result
            if len(ending.tail) == self._tails[ending.visit.name]:
                self._ending.remove(ending)
                self._end_unit(ending)

    def _begin_unit(self, frame: Frame, output: Tensor) -> None:
        """A module that is a unit has ended; as many activations as the first time may follow."""
        number, ordinal = self._flow.enter(output), self.ordinal(frame.name)
        entered = None if frame.entry is None else frame.entry.shape
        start, gate = frame.scope.start, frame.first_activation
        visit = Visit(frame.name, frame.module, ordinal, frame.number, entered, start, gate)
        visit.output, visit.shape, visit.dtype = number, output.shape, output.dtype
        visit.gates = len(self.activations)
        ending = _EndingUnit(visit, output)
        if self._tails[frame.name]:
            self._ending.append(ending)
        else:
            self._end_unit(ending)

    def _end_unit(self, ending: _EndingUnit) -> None:
        chosen = not self._chosen
        unit = unit_of(ending.visit, ending.tail, self._flow, self.activations, chosen=chosen)
        self.tell_passing(unit.output, ending.last)
        self._bus.tell("unit", unit)

    def tell_passing(self, number: int, x: Tensor) -> None:
        """A tensor may be the input or the output of a unit."""
        self._bus.tell("passing", number, x, self._flow.node(number).features)


class Makers:
    """Remembers, for one pass of this thread, the modules that returned tensors."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        self._names = names
        self._known = TensorTable[str]()
        self._thread = get_ident()

    def remember(self, module: nn.Module, args: object, output: object) -> None:
        """A forward hook for all modules: the outermost one of those that hand a tensor on."""
        name = self._names.get(module)
        if name and get_ident() == self._thread:
            for tensor in tensors_in(output):
                self._known.set(tensor, name)

    def same(self, old: Tensor, new: Tensor) -> None:
        """A tensor was replaced by an equal one."""
        self._known.set(new, self.of(old))

    def of(self, tensor: Tensor) -> str:
        """The name of the module that made a tensor, "" if none did."""
        return self._known.get(tensor) or ""
