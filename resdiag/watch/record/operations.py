"""Finds an operation that a module does in its own forward again in a later pass.

No module takes or returns the sum in `F.relu(x + f)`, or a tensor that is overwritten at once.
Where a plan has such a tensor, a torch function mode is entered for the pass; torch.compile traces
through a mode that is active when the graph is entered, as long as what it keeps is the same at the
end of the graph as at its beginning. An operation is known by its name and by how many of that name
came before in the call of its module.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from resdiag.watch.base.safety import never_alone
from resdiag.watch.plan.ports import OPERATIONS, Plan, Port, is_in

Function = Callable[..., Any]
Arguments = tuple[Any, ...]
Keywords = dict[str, Any]
Where = tuple[int, str, int]
"""Number of the module's call, name and ordinal of the operation."""


class Handler:
    """Shows operands and results at some ports of one module, and changes nothing.

    `show` is called with a port, what is there, the operation, its arguments and its result (None
    before it has run).
    """

    def __init__(
        self, at: Mapping[Where, Sequence[tuple[Port, Any]]], show: Callable[..., None]
    ) -> None:
        self._at, self._show = at, show

    def before(
        self, where: Where, func: Function, args: Arguments, kwargs: Keywords
    ) -> tuple[Arguments, Keywords]:
        """The operands, before they can be overwritten."""
        self._see(where, func, args, kwargs, None)
        return args, kwargs

    def after(
        self, where: Where, func: Function, args: Arguments, kwargs: Keywords, result: object
    ) -> Any:  # noqa: ANN401
        """The result."""
        self._see(where, func, args, kwargs, result)
        return result

    def _see(self, where: Where, *seen: object) -> None:
        at = self._at.get(where)
        if at is not None:
            with torch._C.DisableTorchFunction():
                for port, roles in at:
                    self._show(port, roles, *seen)


class Frame:
    """The hooks that tell that a module's forward is running.

    `running` has the open calls, innermost last, of all frames; `expected` says per call of the
    module how often it does which operation, `has_changed` whether one did others.
    """

    def __init__(
        self,
        running: "list[tuple[Frame, dict[str, int]]]",
        handler: Handler | None,
        expected: dict[int, dict[str, int]],
    ) -> None:
        self.running, self.handler = running, handler
        self.expected, self.repeated = expected, len(expected) > 1
        self.calls, self.has_changed = 0, False

    @never_alone
    def before(self, module: nn.Module, args: object) -> None:
        """The module's forward begins."""
        self.running.append((self, {}))

    @never_alone
    def after(self, module: nn.Module, args: object, output: object) -> None:
        """The module's forward ends."""
        _, counts = self.running.pop()
        if self.handler is not None and counts != self.expected.get(self.calls, {}):
            self.has_changed = True
        if self.repeated:
            self.calls = self.calls + 1


class Operations(TorchFunctionMode):
    """Hands the operations of some modules to their `handlers` while it is entered."""

    def __init__(
        self, plan: Plan, handlers: Mapping[str, Handler], names: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.running: list[tuple[Frame, dict[str, int]]] = []
        self._names = names
        self.frames = {
            name: Frame(self.running, handlers.get(name), _expected(plan, name))
            for name in names
            if any(is_in(name, owner) for owner in handlers)
        }

    def install(self) -> Iterator[RemovableHandle]:
        """Hooks on modules with such operations, and on all modules inside them."""
        for name, frame in self.frames.items():
            yield self._names[name].register_forward_pre_hook(frame.before)
            yield self._names[name].register_forward_hook(frame.after)

    def reset(self) -> None:
        """A pass begins."""
        self.running.clear()
        for frame in self.frames.values():
            if frame.repeated:
                frame.calls = 0

    @never_alone
    def __torch_function__(
        self,
        func: Function,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in OPERATIONS or not self.running:
            return func(*args, **kwargs)
        frame, counts = self.running[-1]
        ordinal = counts.get(name, 0)
        counts[name] = ordinal + 1
        if frame.handler is None:
            return func(*args, **kwargs)
        where = frame.calls, name, ordinal
        args, kwargs = frame.handler.before(where, func, args, kwargs)
        result = func(*args, **kwargs)
        return frame.handler.after(where, func, args, kwargs, result)


def _expected(plan: Plan, name: str) -> dict[int, dict[str, int]]:
    """Per call of a module, how often it did which operation."""
    calls = range(plan.calls.get(name, 0))
    return {call: dict(plan.operations.get((name, call), {})) for call in calls}
