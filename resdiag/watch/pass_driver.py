"""Begins and ends what follows the forward passes of a model, from two hooks on its root."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import get_ident
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from resdiag.watch.base.compilation import is_running_compiled, never_alone, plain


class FollowedPass(Protocol):
    """One forward pass that is traced, or read at the places of a plan."""

    def start(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model's forward begins."""

    def finish(self, root: nn.Module, output: object) -> None:
        """It has ended as it should; includes `stop`."""

    def stop(self) -> None:
        """Let go of the pass, whatever happened; safe to call twice."""

    def same(self, old: Tensor, new: Tensor) -> None:
        """A wrapper of a module's handed on `old` as another tensor."""


@dataclass(eq=False)
class Seen:
    """What was noticed of torch.compile, whose passes cannot be followed.

    Attributes:
        compiled: Whether the pass that is beginning runs compiled.
        in_graph: Whether a training pass ran as a part of somebody's graph.
    """

    compiled: bool = False
    in_graph: bool = False


class PassDriver:
    """Two hooks on the root; all others stand for the length of a followed pass only.

    Args:
        model: The root module.
        begin: Asked at the beginning of each pass for what follows it, None for nothing.
        seen: Takes what is noticed of torch.compile.
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
            model.register_forward_pre_hook(enter, with_kwargs=True),
            model.register_forward_hook(leave, always_call=True),
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
