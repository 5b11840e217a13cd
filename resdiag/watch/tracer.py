"""Sees one forward pass as residual blocks: which additions join a shortcut and a branch.

The rule (design, section 4.2): for every tensor, keep per open module frame the largest number of
parameterised operations on its way from that frame's input. An addition of equal shapes is residual
if both operands descend from the input of the module whose forward is running and their counts
differ: the smaller one is the shortcut, the other the branch, and the sum starts the count again.
The block's input is the last tensor that both operands came from; an activation or a normalisation
applied to the sum is the after-add.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, is_dataclass
from threading import get_ident
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from resdiag.watch.calls import ADDITIONS, Call
from resdiag.watch.dynamo import is_running_compiled, never_alone, plain
from resdiag.watch.lineage import Descent, Lineage


@dataclass(eq=False)
class Addition:
    """One residual addition, as it happens.

    Attributes:
        owner: Name of the module whose forward is running ("" is the model itself).
        ordinal: Number of residual additions that `owner` has done before in this pass.
        origin: The block's input x: where both operands descend from; None if it is gone.
        branch: F(x), before the addition.
        shortcut: h(x).
        shortcut_count: Parameterised operations on the shortcut: 0 for an identity.
        path: The calls that lead from `origin` to `shortcut` if they can be repeated, else None.
        shortcut_scale: Factor on the shortcut inside the addition (torch.add's alpha), mostly 1.
        branch_scale: The same for the branch.
        parameters: Parameters of the branch, the shortcut and (at the end) the after-add.
        activations: Activations on the branch, the shortcut and (at the end) in the after-add.
        sum: y = h + F, set once it is computed.
        after: The after-add's calls, set at the end of the block.
    """

    owner: str
    ordinal: int
    origin: Tensor | None
    branch: Tensor
    shortcut: Tensor
    shortcut_count: int
    path: tuple[Call, ...] | None
    shortcut_scale: float
    branch_scale: float
    parameters: list[nn.Parameter]
    activations: list[Call]
    sum: Tensor | None = None
    after: tuple[Call, ...] = ()


_QUESTIONS = frozenset({"__get__", "dim", "size", "numel", "stride", "is_floating_point"})
"""Calls that ask about a tensor and make none."""


class Listener(Protocol):
    """What a tracer tells while the forward pass runs."""

    def operands(self, addition: Addition) -> None:
        """Both operands are there; an in-place addition has not overwritten one yet."""

    def added(self, addition: Addition) -> None:
        """The sum is there; an in-place after-add has not overwritten it yet."""

    def closed(self, addition: Addition, output: Tensor) -> None:
        """The block has ended: `addition.after` turned the sum into `output`."""

    def unit(self, owner: str, ordinal: int, x: Tensor, output: Tensor, module: nn.Module) -> None:
        """A module that was named as a block ended without a residual addition."""

    def same(self, old: Tensor, new: Tensor) -> None:
        """A tensor was replaced by an equal one behind the back of torch functions."""

    def activation(self, owners: tuple[str, ...], call: Call, x: Tensor) -> None:
        """A known activation is about to be applied to `x`; `owners` are the open frames' names."""

    def finished(self, features: Tensor | None, logits: Tensor | None) -> None:
        """The pass has ended; the last linear layer mapped `features` to `logits`."""


@dataclass(eq=False)
class _Frame:
    """One module whose forward is running."""

    serial: int
    name: str
    module: nn.Module
    entry: Tensor | None
    entries: set[int] = field(default_factory=set)
    sums: set[int] = field(default_factory=set)
    open: Addition | None = None
    tail: Tensor | None = None
    chain: tuple[Call, ...] = ()
    chain_parameters: tuple[nn.Parameter, ...] = ()
    additions: int = 0


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
            additions elsewhere are not blocks.
    """

    _busy: ClassVar[bool] = False  # of all tracers: what one listener computes is no one's model

    def __init__(
        self,
        model: nn.Module,
        listener: Listener,
        wanted: Callable[[], bool],
        units: frozenset[str] | None = None,
    ) -> None:
        super().__init__()
        self._listener, self._wanted, self._units = listener, wanted, units
        self._frames: list[_Frame] = []
        self._lineage, self._pushed = Lineage(), 0
        self._counts: dict[str, int] = {}
        self._head: tuple[Tensor | None, Tensor | None] = (None, None)
        self._on, self._thread = False, 0
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
        if self._on and get_ident() == self._thread and self._lineage.number(old) is not None:
            descent = self._lineage.descend([old], [frame.serial for frame in self._frames])
            self._lineage.mark(new, descent, None, alone=True)
            self._quietly(self._listener.same, old, new)

    # -- hooks ---------------------------------------------------------------------------------

    def _install(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Hooks on the root first: its pre-hook switches the others on."""
        names = {module: name for name, module in model.named_modules()}
        for module, name in names.items():
            root = module is model
            if not root and not _can_add(module) and name not in (self._units or ()):
                continue
            yield module.register_forward_pre_hook(
                self._enter(name, module, root), with_kwargs=True
            )
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
            if self._on and get_ident() == self._thread:
                self._push(name, module, [*_tensors(args), *_tensors(kwargs)])

        return hook

    def _leave(self, name: str, owner: nn.Module, root: bool) -> Callable[..., None]:
        @never_alone
        def hook(module: nn.Module, args: object, output: object) -> None:
            if torch.compiler.is_compiling() or module is not owner:
                return
            if not self._on or get_ident() != self._thread:
                return
            if root and (len(self._frames) != 1 or output is None):  # an exception passed
                self._stop()
                return
            self._pop(module, output)
            if root:
                features, logits = self._head
                self._quietly(self._listener.finished, features, logits)
                self._stop()

        return hook

    @plain
    def _begin(self, *, compiled: bool) -> None:
        self._stop()  # an interrupt (no Exception) leaves a pass open
        self.seen.compiled = compiled
        if self._wanted():
            self._start()

    def _start(self) -> None:
        # replicas of the model in other threads (DataParallel) are not followed
        self._on, self._thread = True, get_ident()
        self._mode.enter_context(self)

    def _stop(self) -> None:
        """Leave the function mode and forget the pass."""
        if self._on:
            self._on = False
            self._mode.close()
        self._frames.clear()
        self._lineage.clear()
        self._counts.clear()
        self._head = (None, None)

    def _quietly(self, tell: Callable[..., None], *args: object) -> None:
        """Tell the listener without tracing what it computes."""
        Tracer._busy = True
        try:
            # or each of its many small operations would call us, only to be waved through
            with torch._C.DisableTorchFunction():
                tell(*args)
        finally:
            Tracer._busy = False

    # -- frames --------------------------------------------------------------------------------

    def _push(self, name: str, module: nn.Module, inputs: list[Tensor]) -> None:
        entry = next((t for t in inputs if t.is_floating_point()), None)
        self._pushed += 1
        frame = _Frame(self._pushed, name, module, entry)
        self._frames.append(frame)
        frame.entries.update(self._lineage.enter(tensor, frame.serial) for tensor in inputs)

    def _pop(self, module: nn.Module, output: object) -> None:
        frame = self._frames.pop()
        if frame.module is not module:  # an inner exception was caught by the model's own code
            while self._frames and frame.module is not module:
                frame = self._frames.pop()
        outputs = list(_tensors(output))
        first = outputs[0] if outputs else None
        if frame.open is not None:
            self._close(frame, first)
        named = self._units is not None and frame.name in self._units
        if named and not frame.additions and frame.entry is not None and first is not None:
            ordinal = self._ordinal(frame.name)
            self._quietly(
                self._listener.unit, frame.name, ordinal, frame.entry, first, frame.module
            )

    def _close(self, frame: _Frame, returned: Tensor | None) -> None:
        """End the open block of a frame at its module's output or at its next addition."""
        addition, frame.open = frame.open, None
        assert addition is not None
        assert addition.sum is not None
        tail, output = frame.tail, addition.sum
        if frame.chain and tail is not None and returned is not None and tail is returned:
            output = tail
            addition.after = frame.chain
            addition.parameters.extend(frame.chain_parameters)
            addition.activations.extend(call for call in frame.chain if call.is_activation)
        frame.tail, frame.chain, frame.chain_parameters = None, (), ()
        self._quietly(self._listener.closed, addition, output)

    def _passed(self, frame: _Frame, x: Tensor | None) -> Tensor | None:
        """What the open block handed to the next one: its activated sum, if x was made from it."""
        tail, activated = frame.tail, all(call.is_activation for call in frame.chain)
        if tail is None or x is None or not activated:
            return x
        return tail if self._lineage.descends(x, tail) else x

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
        """See one torch function: trace it unless it only reads an attribute."""
        kwargs = dict(kwargs or {})
        if Tracer._busy or not self._frames or getattr(func, "__name__", "") in _QUESTIONS:
            return func(*args, **kwargs)
        addition = self._residual(func, args, kwargs) if func in ADDITIONS else None
        call = Call(func, args[1:], kwargs)
        if call.is_activation and args and isinstance(args[0], Tensor):
            owners = tuple(frame.name for frame in self._frames)
            self._quietly(self._listener.activation, owners, call, args[0])
        inputs = [*_tensors(args), *_tensors(kwargs)]
        descent = self._lineage.descend(inputs, [frame.serial for frame in self._frames])
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._after(call, args, tensor, addition, descent, alone=len(inputs) == 1)
        return result

    def _after(
        self,
        call: Call,
        args: tuple[Any, ...],
        result: Tensor,
        addition: Addition | None,
        descent: Descent,
        *,
        alone: bool,
    ) -> None:
        """Number a result; follow the sum; remember the head."""
        frame = self._frames[-1]
        first = args[0] if args and isinstance(args[0], Tensor) else None
        owner = self._owner_of(first, call, result)
        number = self._lineage.mark(result, descent, call, alone=alone)
        if addition is not None and number is not None:
            addition.sum = result
            frame.open, frame.tail = addition, result
            frame.chain, frame.chain_parameters = (), ()
            frame.additions += 1
            frame.sums.add(number)
            self._lineage.enter(result, frame.serial)
            self._quietly(self._listener.added, addition)
        elif owner is not None:
            owner.tail, owner.chain = result, (*owner.chain, call)
            owner.chain_parameters += descent.parameters
        elif call.name == "linear" and descent.weighted and first is not None:
            self._head = (first, result)

    def _owner_of(self, first: Tensor | None, call: Call, result: Tensor) -> _Frame | None:
        """The frame whose open block's sum (or its tail) this call turns into the output."""
        if first is None or not (call.is_activation or call.is_normalisation):
            return None
        for frame in reversed(self._frames):
            if frame.open is not None and frame.tail is first and result.shape == first.shape:
                return frame
        return None

    def _residual(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Addition | None:
        """The addition, if the rule calls it residual; the block before it in this frame ends."""
        left, right = _operands(args, kwargs)
        frame = self._frames[-1]
        if left is None or right is None or left is right or left.shape != right.shape:
            return None
        if self._units is not None and frame.name not in self._units:
            return None
        a, b = (self._lineage.counts(tensor).get(frame.serial) for tensor in (left, right))
        if a is None or b is None or a == b:
            return None
        shortcut, branch = (left, right) if a < b else (right, left)
        meeting = self._lineage.meet(shortcut, branch, frame.entries, frame.sums)
        if frame.open is not None:
            self._close(frame, self._passed(frame, meeting.origin))
        alpha = float(kwargs.get("alpha", 1))
        addition = Addition(
            frame.name,
            self._ordinal(frame.name),
            meeting.origin,
            branch,
            shortcut,
            meeting.shortcut_count,
            meeting.path,
            alpha if shortcut is right else 1.0,
            alpha if branch is right else 1.0,
            meeting.parameters,
            meeting.activations,
        )
        self._quietly(self._listener.operands, addition)
        return addition


def _can_add(module: nn.Module) -> bool:
    """Whether an addition can run in a module's own forward: not in torch's leaves and lists."""
    leaf = next(module.children(), None) is None
    ours = not type(module).__module__.startswith("torch.nn.modules")
    return (ours or not leaf) and not isinstance(module, nn.Sequential | nn.ModuleList)


def _operands(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """The two tensors of an addition, or None for a number."""
    left = args[0] if args else kwargs.get("input")
    right = args[1] if len(args) > 1 else kwargs.get("other")
    return (
        left if isinstance(left, Tensor) else None,
        right if isinstance(right, Tensor) else None,
    )


def _tensors(values: object) -> Iterator[Tensor]:
    """Tensors inside nested tuples, lists, dicts and dataclass-like outputs, in order."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif is_dataclass(values):
        for field_ in fields(values):
            yield from _tensors(getattr(values, field_.name))
