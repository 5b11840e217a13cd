"""Sees one forward pass as residual blocks: which additions join a shortcut and a branch.

Every tensor of the pass is a node of a lineage. At an addition, walk back from both operands to the
last tensor that they share: that is the block's input x, and the two ways from there are the branch
and the shortcut (`Residuals.judge` says when). No list of classes, no names: what counts are
the operations on the two ways. An activation or a normalisation applied to the sum is the
after-add.

One block is one residual unit: in `x + attention(h) + mlp(h)` the second sum adds a parallel branch
to the unit that the first one began, however the terms are put in order.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from resdiag.watch.addition import Addition
from resdiag.watch.calls import Call, is_question
from resdiag.watch.dynamo import is_running_compiled, never_alone, plain
from resdiag.watch.frame import Frame
from resdiag.watch.lineage import Descent, Lineage, Scope
from resdiag.watch.listener import Listener
from resdiag.watch.makers import Makers
from resdiag.watch.memory import Memory
from resdiag.watch.nested import first_floating, tensors_in
from resdiag.watch.repeat import Repeat
from resdiag.watch.residual import Residuals
from resdiag.watch.routine import Learner
from resdiag.watch.stacks import Stacks
from resdiag.watch.sums import ADDITIONS, Sum, read_sum
from resdiag.watch.units import Search, Unit


@dataclass(eq=False)
class _Trailing:
    """A unit whose module has ended, while the activations after it are still to come."""

    unit: Unit
    tail: Tensor
    missing: int


@dataclass(eq=False)
class Seen:
    """What a tracer noticed of torch.compile, whose passes it cannot follow.

    Attributes:
        compiled: Whether the pass that is beginning runs compiled.
        in_graph: Whether a training pass ran as a part of somebody's graph.
    """

    compiled: bool = False
    in_graph: bool = False


class Tracer(TorchFunctionMode):
    """Traces the forward passes of one model while switched on, and tells a listener.

    Hooks stand on the model and on every module that can run an addition; they return at once
    while `wanted()` is False.

    Args:
        model: The root module.
        listener: Told about additions, blocks, activations and the head.
        wanted: Asked once per forward pass of the root whether to trace it.
        units: Names of modules that are blocks even without a residual addition; if given,
            additions elsewhere are not blocks. Without, a network whose first pass has no residual
            addition has the units that `choose_units` finds in it.
        again: Asked at the call of a module outside of a pass, with how often modules were called
            in the last one, for a listener to tell of that module's run; None not to follow it.
    """

    _busy: ClassVar[bool] = False  # of all tracers: what one listener computes is no one's model

    def __init__(
        self,
        model: nn.Module,
        listener: Listener,
        wanted: Callable[[], bool],
        units: frozenset[str] | None = None,
        again: Callable[[str, Mapping[str, int]], Listener | None] = lambda name, called: None,
    ) -> None:
        super().__init__()
        self._listener, self._wanted, self._units = listener, wanted, units
        self._frames: list[Frame] = []
        self._lineage = Lineage()
        self._residuals = Residuals(self._lineage)
        self._model, self._memory = model, Memory(can_learn=units is None)
        self._learner: Learner | None = None
        self._repeat: Repeat | None = None
        self._stacks = Stacks()
        self._names = {module: name for name, module in model.named_modules()}
        self._makers: Makers | None = Makers(self._names)
        self._counts: dict[str, int] = {}
        self._head: tuple[Tensor | None, Tensor | None] = (None, None)
        self._on, self._thread, self._later = False, 0, False
        self._first, self._again = listener, again
        self._called: Counter[str] = Counter()
        # a unit's name, and how many activations and normalisations after it belong to it
        self._tails = dict.fromkeys(units or (), 0)
        self._searching = units is None
        self._search: Search | None = None
        self._trailing: list[_Trailing] = []
        self._gates: list[Call] = []
        self.seen = Seen()
        self._mode = ExitStack()
        self._handles = list(self._install(model))

    def close(self) -> None:
        """Remove every hook; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stop()

    def same(self, old: Tensor, new: Tensor) -> None:
        """Follow on with `new` where a wrapper of the module's hands on `old` as another tensor."""
        if not self._on or get_ident() != self._thread:
            return
        if self._learner is not None:
            self._learner.spoil()
        if self._lineage.number(old) is not None:
            descent = self._lineage.descend([old])
            self._lineage.mark(new, descent, None, alone=True)
            if self._makers is not None:
                self._makers.same(old, new)
            self.tell(self._listener.same, old, new)

    # -- hooks ---------------------------------------------------------------------------------

    def _install(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Hooks on the root first: its pre-hook switches the others on."""
        for module, name in self._names.items():
            root = module is model
            if root or _can_add(module) or name in self._tails:
                yield from self._install_on(name, module, root=root)

    def _install_on(self, name: str, module: nn.Module, *, root: bool) -> Iterator[RemovableHandle]:
        yield module.register_forward_pre_hook(self._enter(name, module, root), with_kwargs=True)
        yield module.register_forward_hook(self._leave(name, module, root), always_call=root)

    def _enter(self, name: str, owner: nn.Module, root: bool) -> Callable[..., None]:
        seen = self.seen

        @never_alone
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():
                if root and module.training and torch.is_grad_enabled():
                    seen.in_graph = True
                return
            if module is not owner:  # a copy of the model took its hooks along
                return
            if root:
                self._begin(compiled=is_running_compiled())
            elif not self._on:
                self._begin_again(name)
            if self._on and get_ident() == self._thread:
                if root:
                    inputs = [*tensors_in(args), *tensors_in(kwargs)]
                    self.tell(self._listener.started, inputs)
                if not self._later:
                    self._come(name, module, args, kwargs)

        return hook

    def _leave(self, name: str, owner: nn.Module, root: bool) -> Callable[..., None]:
        @never_alone
        def hook(module: nn.Module, args: object, output: object) -> None:
            if torch.compiler.is_compiling() or module is not owner:
                return
            if not self._on or get_ident() != self._thread or (self._later and not root):
                return
            if self._later:
                self._end_later(output)
                return
            if root and (self._depth != 1 or output is None):  # an exception passed
                self._stop()
                return
            self._go(name, module, output)
            if not root and not self._depth:
                self._stop()
            if root:
                self._finish(module, output)

        return hook

    def _end_later(self, output: object) -> None:
        """A pass that nobody listened to has ended, or an exception has passed."""
        if output is not None:
            self.tell(self._listener.look_back, list(tensors_in(output)))
        self._stop()

    def _finish(self, root: nn.Module, output: object) -> None:
        """The pass has ended as it should."""
        self._choose(root, output)
        repeated = self._repeat is not None and not self._repeat.lost
        features, logits = (
            self._repeat.head if self._repeat is not None and repeated else self._head
        )
        self.tell(self._listener.finished, features, logits, list(tensors_in(output)))
        if repeated:
            self._memory.recognised()
        elif self._learner is not None:  # a repeat tells nothing of units
            routine = None if self._tails else self._learner.finish(self._lineage)
            self._memory.learn(routine)
        self._stop()
        self._makers = None  # names are asked for once

    @plain
    def _begin(self, *, compiled: bool) -> None:
        self._stop()  # an interrupt (no Exception) leaves a pass open
        self.seen.compiled = compiled
        if self._wanted():
            self._called.clear()
            self._start()

    @plain
    def _begin_again(self, name: str) -> None:
        """A module outside of a pass: one that runs once more in the backward pass is followed."""
        listener = self._again(name, self._called)
        if listener is not None:
            self._stop()
            self._listener = listener
            self._start()

    def _start(self) -> None:
        # replicas of the model in other threads (DataParallel) are not followed
        self._on, self._thread = True, get_ident()
        routine, first = self._memory.routine, self._listener is self._first
        self._later = first and self._listener.looks_back
        if self._later:
            return
        if routine is not None and first:
            self._repeat = Repeat(routine, self._listener, self)
        elif self._memory.can_learn and first:
            self._learner = Learner([*self._model.parameters(), *self._model.buffers()])
        self._mode.enter_context(self._repeat or self)
        if self._makers is not None:
            self._makers.begin()
            handle = nn.modules.module.register_module_forward_hook(self._makers.remember)
            self._mode.callback(handle.remove)
        if self._searching:
            self._search = Search(self._lineage, self._gates, self._tell_passing)
            for module, name in list(self._names.items())[1:]:  # the root has hooks of its own
                for handle in self._follow(name, module):
                    self._mode.callback(handle.remove)

    def _follow(self, name: str, owner: nn.Module) -> Iterator[RemovableHandle]:
        """Hooks that show one module's calls to the search for units."""

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._search is not None and module is owner and get_ident() == self._thread:
                inputs = [*tensors_in(args), *tensors_in(kwargs)]
                self._search.enter(name, module, first_floating(inputs))

        def leave(module: nn.Module, args: object, output: object) -> None:
            if self._search is not None and module is owner and get_ident() == self._thread:
                self._search.leave(module, first_floating(tensors_in(output)))

        yield owner.register_forward_pre_hook(enter, with_kwargs=True)
        yield owner.register_forward_hook(leave)

    def _choose(self, root: nn.Module, output: object) -> None:
        """The first pass ends without a residual addition: its modules are the units."""
        if self._search is None:
            return
        self._search.leave(root, first_floating(tensors_in(output)))
        for unit in self._search.units():
            self._tails[unit.owner] = len(unit.after)
            self.tell(self._listener.unit, unit)
        self._searching, self._search = False, None
        for module, name in self._names.items():
            if name in self._tails and module is not root and not _can_add(module):
                self._handles.extend(self._install_on(name, module, root=False))

    def _dismiss(self) -> None:
        """A residual addition has come: the network is divided into blocks."""
        if self._search is not None:
            self._searching, self._search = False, None
            self.tell(self._listener.dismiss)

    def _tell_passing(self, number: int, x: Tensor) -> None:
        self.tell(self._listener.passing, number, x, self._lineage.features(number))

    def _stop(self) -> None:
        """Leave the function mode and forget the pass."""
        if self._on:
            self._on = self._later = False
            self._mode.close()
        self._repeat = self._learner = None
        self._frames.clear()
        self._lineage.clear()
        self._stacks.clear()
        if self._makers is not None:
            self._makers.clear()
        self._counts.clear()
        self._gates.clear()
        self._trailing.clear()
        self._search = None
        self._head = (None, None)
        self._listener = self._first

    def tell(self, what: Callable[..., None], *args: object) -> None:
        """Tell the listener without tracing what it computes."""
        Tracer._busy = True
        try:
            # or each of its many small operations would call us, only to be waved through
            with torch._C.DisableTorchFunction():
                what(*args)
        finally:
            Tracer._busy = False

    # -- a pass like the one before ------------------------------------------------------------

    def passes(self, function: Callable[..., Any]) -> bool:
        """Whether a call is no part of the pass: it asks about a tensor, or a listener runs."""
        return Tracer._busy or is_question(function)

    def take_over(self, repeat: Repeat) -> None:
        """Follow a pass on from where it has left the routine of an earlier one."""
        self._memory.strayed()
        self._lineage.resume(repeat.routine.lineage, repeat.nodes, repeat.known())
        self._counts, self._head = repeat.ordinals, repeat.head
        for turn, joint in repeat.frames:
            assert turn.scope is not None
            frame = Frame(turn.name, turn.module, None, turn.scope, None, 0)
            block = repeat.open.get(id(joint))
            if joint is not None and block is not None:
                frame.open, frame.tail, frame.chain = block.addition, block.tail, tuple(block.chain)
                added = joint.parameters[: len(block.chain)]
                frame.chain_parameters = tuple(p for parameters in added for p in parameters)
            self._frames.append(frame)

    @property
    def _depth(self) -> int:
        """How many watched modules are running."""
        repeating = self._repeat is not None and not self._repeat.lost
        return len(self._repeat.frames if self._repeat is not None and repeating else self._frames)

    # -- frames --------------------------------------------------------------------------------

    def _come(self, name: str, module: nn.Module, args: object, kwargs: object) -> None:
        """A module's forward begins."""
        if self._listener is self._first:
            self._called[name] += 1
        repeat = self._repeat
        if repeat is not None and not repeat.lost:
            known = repeat.frames or repeat.begin([*tensors_in(args), *tensors_in(kwargs)])
            if known and repeat.enter(name, module):
                return
        inputs = [*tensors_in(args), *tensors_in(kwargs)]
        if self._search is not None and not self._frames:
            self._search.enter(name, module, first_floating(inputs))
        self._push(name, module, inputs)

    def _go(self, name: str, module: nn.Module, output: object) -> None:
        """A module's forward has ended."""
        repeat = self._repeat
        if (
            repeat is None
            or repeat.lost
            or not repeat.leave(name, module, next(tensors_in(output), None))
        ):
            self._pop(module, output)

    def _push(self, name: str, module: nn.Module, inputs: list[Tensor]) -> None:
        inputs = [] if self._lineage.are_weights(inputs) else inputs
        entry = first_floating(inputs)
        start = len(self._lineage)
        numbers = [self._lineage.enter(tensor) for tensor in inputs]
        scope = Scope(frozenset(numbers), start)
        number = None if entry is None else self._lineage.number(entry)
        self._frames.append(Frame(name, module, entry, scope, number, len(self._gates)))
        if self._learner is not None:
            self._learner.enter(name, module, inputs, numbers, scope, len(self._lineage))
        if name in self._tails and entry is not None and number is not None:
            self._tell_passing(number, entry)

    def _pop(self, module: nn.Module, output: object) -> None:
        frame = self._frames.pop()
        if frame.module is not module:  # an inner exception was caught by the model's own code
            while self._frames and frame.module is not module:
                frame = self._frames.pop()
            if self._learner is not None:
                self._learner.spoil()
        outputs = list(tensors_in(output))
        first = outputs[0] if outputs else None
        self._heal(frame, outputs)
        if frame.open is not None:
            self._close(frame, first)
        if self._learner is not None:
            self._learner.leave(frame.name, module, first, len(self._lineage))
        if frame.name in self._tails and not frame.additions and first is not None:
            self._begin_unit(frame, first)

    def _begin_unit(self, frame: Frame, output: Tensor) -> None:
        """A module that is a unit has ended; as many activations as the first time may follow."""
        number, entry = self._lineage.enter(output), frame.entry
        begun = Unit(
            owner=frame.name,
            ordinal=self._ordinal(frame.name),
            input=frame.number,
            output=number,
            entered=None if entry is None else entry.shape,
            shape=output.shape,
            dtype=output.dtype,
            features=self._lineage.features(number),
            after=(),
            calls=self._lineage.calls(frame.scope.start, number),
            activations=self._gates[frame.gate :],
            parameters=list(frame.module.parameters()),
            chosen=self._units is None,
        )
        missing = self._tails[frame.name]
        if missing:
            self._trailing.append(_Trailing(begun, output, missing))
        else:
            self._end_unit(begun, output)

    def _end_unit(self, unit: Unit, output: Tensor) -> None:
        self._tell_passing(unit.output, output)
        self.tell(self._listener.unit, unit)

    def _trail(self, first: Tensor | None, call: Call, number: int, result: Tensor) -> None:
        """An activation or a normalisation right after a unit's module is part of the unit."""
        for trailing in self._trailing:
            if trailing.tail is first and (call.is_after):
                break
        else:
            return
        unit = trailing.unit
        trailing.unit = replace(
            unit,
            output=number,
            after=(*unit.after, call),
            activations=[*unit.activations, *([call] if call.is_activation else [])],
            parameters=[*unit.parameters, *self._lineage.parameters(number)],
        )
        trailing.tail, trailing.missing = result, trailing.missing - 1
        if not trailing.missing:
            self._trailing.remove(trailing)
            self._end_unit(trailing.unit, result)

    def _heal(self, frame: Frame, outputs: list[Tensor]) -> None:
        """Go on after an operation that no torch function shows, e.g. an autograd.Function."""
        unseen = [x for x in outputs if x.requires_grad and self._lineage.number(x) is None]
        entries = frame.scope.entries
        if unseen and entries:
            parameters = tuple(frame.module.parameters())
            if self._learner is not None:
                self._learner.spoil()
            descent = Descent(tuple(sorted(entries)), parameters, bool(parameters), born=False)
            for tensor in unseen:
                self._lineage.mark(tensor, descent, _UNSEEN, alone=False)

    def _close(self, frame: Frame, returned: Tensor | None) -> None:
        """End the open block of a frame at its module's output or at its next addition."""
        addition, frame.open = frame.open, None
        assert addition is not None
        assert addition.sum is not None
        tail, output = frame.tail, addition.sum
        is_tail = bool(frame.chain) and tail is not None and returned is tail
        if is_tail and tail is not None:
            output = tail
            addition.after = frame.chain
            addition.parameters.extend(frame.chain_parameters)
            addition.activations.extend(call for call in frame.chain if call.is_activation)
        addition.returned = returned is output
        if self._learner is not None:
            self._learner.close(addition, is_tail=is_tail)
        frame.tail, frame.chain, frame.chain_parameters = None, (), ()
        self.tell(self._listener.closed, addition, output)

    def _passed(self, frame: Frame, x: Tensor | None) -> Tensor | None:
        """What the open block handed to the next one: its activated sum, if x was made from it."""
        tail, activated = frame.tail, all(call.is_activation for call in frame.chain)
        if tail is None or x is None or not activated:
            return x
        start, goal = self._lineage.number(x), self._lineage.number(tail)
        if start is None or goal is None:
            return x
        return tail if self._lineage.descends(start, goal) else x

    def _ordinal(self, owner: str) -> int:
        ordinal = self._counts.get(owner, 0)
        self._counts[owner] = ordinal + 1
        return ordinal

    # -- operations ----------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """See one torch function: follow it unless it only reads an attribute."""
        return self.watch(func, args, dict(kwargs or {}))

    def watch(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Run a call and follow it."""
        if Tracer._busy or not self._frames or is_question(func):
            return func(*args, **kwargs)
        made = self.look(func, args, kwargs)
        result = func(*args, **kwargs)
        made(result)
        return result

    def look(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[Any], None]:
        """See a call that is about to run; what it returns is to be called with the result."""
        if self._learner is not None:
            self._learner.begin(func)
        spelled = (
            read_sum(func, args, kwargs) if func in ADDITIONS else self._stacks.read(func, args)
        )
        addition = None if spelled is None else self._residual(spelled)
        call = Call(func, args[1:], kwargs)
        if call.is_activation and args and isinstance(args[0], Tensor):
            owners = tuple(frame.name for frame in self._frames)
            self._gates.append(call)
            if self._learner is not None:
                self._learner.activate(owners)
            if self._listener.counts_gates:
                self.tell(self._listener.activation, owners, call, args[0])
        inputs = [*tensors_in(args), *tensors_in(kwargs)]
        alone = len(inputs) == 1
        if call.takes_shape_only or call.is_blank:
            inputs = inputs[: not call.is_blank]
        descent = self._lineage.descend(inputs)

        def made(result: object) -> None:
            results = list(tensors_in(result))
            if call.name == "setitem":  # returns nothing, and makes the whole what it is
                results = list(tensors_in(args[:1]))
                if self._learner is not None:
                    self._learner.spoil()
            numbers = [
                self._after(
                    call,
                    args,
                    tensor,
                    addition,
                    descent,
                    alone=alone,
                    piece=_piece(call, index, len(results)),
                )
                for index, tensor in enumerate(results)
            ]
            if call.name == "stack" and results:
                stacked = self._stacks.add(args, kwargs, results[0])
                if stacked and self._learner is not None:
                    self._learner.spoil()
            if self._learner is not None:
                nodes = len(self._lineage)
                self._learner.end(call, args, kwargs, results, numbers, descent, nodes)

        return made

    def _after(
        self,
        call: Call,
        args: tuple[Any, ...],
        result: Tensor,
        addition: Addition | None,
        descent: Descent,
        *,
        alone: bool,
        piece: str,
    ) -> int | None:
        """Number a result; follow the sum; remember the head."""
        frame = self._frames[-1]
        first = args[0] if args and isinstance(args[0], Tensor) else None
        owner = self._owner_of(first, call, result)
        number = self._lineage.mark(result, descent, call, alone=alone, piece=piece)
        if number is not None and self._trailing:
            self._trail(first, call, number, result)
        if number is not None and self._search is not None:
            self._search.operation(call, descent.parents, number, result)
        if addition is not None and number is not None:
            addition.sum = result
            self._lineage.set_stream(number, addition.stream)
            frame.open, frame.tail = addition, result
            frame.chain, frame.chain_parameters = (), ()
            frame.additions += 1
            self.tell(self._listener.added, addition)
        elif owner is not None:
            owner.tail, owner.chain = result, (*owner.chain, call)
            owner.chain_parameters += descent.parameters
            if self._learner is not None and owner.open is not None:
                self._learner.chain(owner.open, descent.parameters)
        elif call.name == "linear" and descent.weighted and first is not None:
            self._head = (first, result)
            if self._learner is not None:
                self._learner.head()
        return number

    def _owner_of(self, first: Tensor | None, call: Call, result: Tensor) -> Frame | None:
        """The frame whose open block's sum (or its tail) this call turns into the output."""
        if first is None or not (call.is_after):
            return None
        for frame in reversed(self._frames):
            if frame.open is not None and frame.tail is first and result.shape == first.shape:
                return frame
        return None

    def _residual(self, spelled: Sum) -> Addition | None:
        """The addition, if the rule calls it residual; the block before it in this frame ends."""
        frame = self._frames[-1]
        if self._units is not None and frame.name not in self._units:
            return None
        parallel = self._residuals.parallel(frame, spelled)
        if parallel is not None:
            if self._learner is not None:
                self._learner.spoil()
            self.tell(self._listener.operands, parallel)
            return parallel
        meeting = self._residuals.meet(spelled, self._frames)
        if meeting is None:
            return None
        shortcut, branch = meeting.sides
        if frame.open is not None:
            self._close(frame, self._passed(frame, meeting.origin))
        with torch._C.DisableTorchFunction():
            h, f = shortcut.make(), branch.make()
        addition = Addition(
            frame.name,
            self._ordinal(frame.name),
            meeting.origin,
            f if f.shape == h.shape else _spread(f, h),
            h,
            meeting.shortcut_count,
            meeting.path,
            shortcut.scale,
            branch.scale,
            meeting.parameters,
            meeting.activations,
            meeting.calls,
            meeting.begins_activated,
            meeting.features,
            "" if self._makers is None else self._makers.of(f),
            "" if self._makers is None else self._makers.of(h),
            meeting.shortcut,
            is_gated=meeting.is_gated,
        )
        if self._learner is not None and meeting.is_gated:
            self._learner.spoil()
        if self._learner is not None:
            self._learner.join(addition, swapped=meeting.swapped)
        self._dismiss()
        self.tell(self._listener.operands, addition)
        return addition


def _unseen(x: Tensor) -> Tensor:
    raise NotImplementedError("stands for an operation that cannot be repeated")


_UNSEEN = Call(_unseen, (), {})


def _piece(call: Call, index: int, count: int) -> str:
    """What part of its operand a result is, "" for the whole."""
    if count > 1 and call.name in ("chunk", "split", "unbind", "tensor_split", "split_with_sizes"):
        return f"{call.name} {index}"
    if call.name in ("getitem", "narrow", "select") and not any(
        True for _ in tensors_in(call.args)
    ):
        return f"{call.name} {call.args}"
    return ""


def _spread(branch: Tensor, shortcut: Tensor) -> Tensor:
    """A branch that the addition broadcasts."""
    with torch._C.DisableTorchFunction():
        return branch.detach().expand_as(shortcut)


def _can_add(module: nn.Module) -> bool:
    """Whether an addition can run in a module's own forward: not in torch's leaves and lists."""
    leaf = next(module.children(), None) is None
    ours = not type(module).__module__.startswith("torch.nn.modules")
    return (ours or not leaf) and not isinstance(module, nn.Sequential | nn.ModuleList)
