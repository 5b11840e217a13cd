"""The events of a forward pass, and the protocol of observers.

A `TracedPass` follows a pass operation by operation and tells its observers what it finds. In a
later pass that is expected to be the same, hooks at the places of a plan tell the recorder the
same things. The order is always that of the pass:

    started -> (activation | operands -> added -> closed | passing)* -> unit* -> finished
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from resdiag.watch.base.functions import Call
from resdiag.watch.base.hooks import Hook
from resdiag.watch.base.safety import is_running_compiled, never_alone, plain
from resdiag.watch.find.additions import Addition
from resdiag.watch.find.dataflow import Dataflow
from resdiag.watch.find.units import Unit


@dataclass(eq=False)
class Operands:
    """The tensors of a residual addition in one pass."""

    origin: Tensor | None  # x, where both operands come from; None if it was freed
    branch: Tensor  # F(x), before the addition, which may broadcast it
    shortcut: Tensor  # h(x)


class Observer:
    """Observes a forward pass while it runs, before a tensor can be overwritten."""

    def started(self, inputs: Sequence[Tensor]) -> None:
        """The pass begins with these inputs."""

    def operands(self, addition: Addition, tensors: Operands) -> None:
        """Both operands of a residual addition are there."""

    def added(self, addition: Addition, total: Tensor) -> None:
        """Their sum is there."""

    def closed(self, addition: Addition, output: Tensor) -> None:
        """The block has ended: `addition.after` turned the sum into `output`."""

    def passing(self, number: int, x: Tensor, features: int | None) -> None:
        """A tensor that may be the input or the output of a unit, with its channel dimension."""

    def dismiss(self) -> None:
        """A residual addition was found: none of the tensors that passed belongs to a unit."""

    def unit(self, unit: Unit) -> None:
        """A module without a residual addition stands for a block; its tensors have passed."""

    def same(self, old: Tensor, new: Tensor) -> None:
        """A tensor was replaced by an equal one, and no torch function showed it."""

    def activation(self, call: Call, x: Tensor) -> None:
        """A known activation is about to be applied to `x`."""

    def finished(
        self, features: Tensor | None, logits: Tensor | None, outputs: Sequence[Tensor]
    ) -> None:
        """The pass has ended; the last linear layer mapped `features` to `logits`."""


class Surveyor(Observer):
    """Sees every module and every operation of the pass as well."""

    def begin(self, flow: Dataflow) -> None:
        """The pass begins; `flow` numbers its tensors."""

    def enters(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A module's forward begins."""

    def leaves(self, name: str, module: nn.Module, output: Any) -> Any:  # noqa: ANN401
        """A module's forward has ended; returns what is to be handed on in place of `output`."""
        return output

    def reads(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """An operation is about to run."""

    def returns(self, result: Any) -> Any:  # noqa: ANN401
        """It has run; returns what is to be handed on in place of `result`."""
        return result

    def wrote(self, result: Tensor) -> None:
        """The result of the operation has its number."""


class Bus:
    """Hands every event of a pass on to several observers, unseen by the mode that follows it."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers

    def tell(self, event: str, *args: object) -> None:
        """Call the method of that name of each observer."""
        # what observers compute is not part of the model, so no torch function mode sees it
        with torch._C.DisableTorchFunction():
            for observer in self.observers:
                method: Callable[..., None] = getattr(observer, event)
                method(*args)


class FollowedPass(Protocol):
    """One forward pass that is traced, or read at the places of a plan."""

    def start(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model's forward begins."""

    def finish(self, root: nn.Module, output: object) -> None:
        """It has ended as it should; includes `stop`."""

    def stop(self) -> None:
        """Release everything of the pass, also after an error; safe to call twice."""

    def same(self, old: Tensor, new: Tensor) -> None:
        """A wrapper of a module's handed on `old` as another tensor."""


@dataclass(eq=False)
class Seen:
    """What was noticed of torch.compile, whose passes cannot be followed."""

    compiled: bool = False  # whether the pass that is beginning runs compiled
    in_graph: bool = False  # whether a training pass ran as a part of somebody's graph


class PassDriver:
    """Two hooks on the root; all others stand for the length of a followed pass only.

    `begin` is asked at the beginning of each pass for what follows it, None for nothing; `seen`
    takes what is noticed of torch.compile.
    """

    def __init__(
        self, model: nn.Module, begin: Callable[[], FollowedPass | None], seen: Seen | None = None
    ) -> None:
        self._model, self._begin = model, begin
        self._seen = seen or Seen()
        self._pass: FollowedPass | None = None
        self._thread = 0
        enter, leave = self._hooks()
        self._handles = [
            model.register_forward_pre_hook(Hook(enter), with_kwargs=True),
            model.register_forward_hook(Hook(leave), always_call=True),
        ]

    def close(self) -> None:
        """Remove the hooks; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stop()

    def same(self, old: Tensor, new: Tensor) -> None:
        """A wrapper of a module's handed on `old` as another tensor."""
        if self._pass is not None and get_ident() == self._thread:
            self._pass.same(old, new)

    def _hooks(self) -> tuple[Callable[..., None], Callable[..., None]]:
        seen, model = self._seen, self._model

        @never_alone
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():
                if module.training and torch.is_grad_enabled():
                    seen.in_graph = True
                return
            if module is model:  # a copy of the model took its hooks along
                self._start(args, kwargs, compiled=is_running_compiled())

        @never_alone
        def leave(module: nn.Module, args: object, output: object) -> None:
            if not torch.compiler.is_compiling() and module is model:
                self._end(output)

        return enter, leave

    @plain
    def _start(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, compiled: bool) -> None:
        if self._pass is not None and get_ident() != self._thread:
            return  # another thread's pass is being followed
        self._stop()  # an interrupt (no Exception) leaves a pass open
        self._seen.compiled = compiled
        followed = self._begin()
        if followed is not None:
            self._pass, self._thread = followed, get_ident()
            followed.start(self._model, args, kwargs)

    @plain
    def _end(self, output: object) -> None:
        if self._pass is None or get_ident() != self._thread:
            return
        if output is not None:  # None: an exception has passed
            self._pass.finish(self._model, output)
        self._stop()

    def _stop(self) -> None:
        followed, self._pass = self._pass, None
        if followed is not None:
            followed.stop()
