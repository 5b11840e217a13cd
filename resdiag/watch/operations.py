"""Taps at operations that a module does in its own forward, where no module takes or returns them.

torch.compile traces through a torch function mode that is active when the graph is entered, as long
as what it keeps is the same at the end of the graph as at its beginning. An operation is known by
its name and by how many of that name came before in the call of its module; that the counts are
those of the pass over example inputs is checked at the end of every call.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from resdiag.watch.base.compilation import never_alone
from resdiag.watch.ports import OPERATIONS
from resdiag.watch.taps import Switch, Tap, pass_eager, pass_traced

Where = tuple[int, str, int]
"""Number of the module's call, name and ordinal of the operation."""


class Frame:
    """The hooks that tell which module's forward is running, and its taps.

    Args:
        name: The module's name.
        switch: Whether to write.
        running: The open calls, innermost last; shared by all frames.
        operands: Taps of operands by place.
        results: Taps of results.
        expected: Per call of the module, how often it does which operation.

    Attributes:
        calls: Calls of the module in this pass.
        has_changed: Whether a call did other operations than expected, so that no tap is right.
    """

    def __init__(
        self,
        name: str,
        switch: Switch,
        running: "list[tuple[Frame, dict[str, int]]]",
        operands: Mapping[Where, list[tuple[int | str, Tap]]],
        results: Mapping[Where, list[Tap]],
        expected: Mapping[int, tuple[tuple[str, int], ...]],
    ) -> None:
        self.name, self.switch, self.running = name, switch, running
        self.operands, self.results = dict(operands), dict(results)
        self.expected, self.repeated = dict(expected), len(expected) > 1
        self.calls, self.has_changed = 0, False

    @never_alone
    def before(self, module: nn.Module, args: object) -> None:
        """The module's forward begins."""
        self.running.append((self, {}))

    @never_alone
    def after(self, module: nn.Module, args: object, output: object) -> None:
        """The module's forward ends."""
        _, counts = self.running.pop()
        if self.operands or self.results:
            for name, count in self.expected.get(self.calls, ()):
                if counts.get(name, 0) != count:
                    self.has_changed = True
        if self.repeated:
            self.calls = self.calls + 1

    @never_alone
    def run(
        self,
        func: Callable[..., Any],
        name: str,
        ordinal: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Do an operation of this module, tapped if it is one of interest."""
        where, compiling = (self.calls, name, ordinal), torch.compiler.is_compiling()
        on = (self.switch.on and torch.is_grad_enabled()) if compiling else self.switch.eager
        if not on:
            return func(*args, **kwargs)
        taps = self.operands.get(where)
        if taps is not None:
            changed, named = list(args), dict(kwargs)
            for place, tap in taps:
                if isinstance(place, str):
                    named[place] = _pass(tap, named[place])
                else:
                    changed[place] = _pass(tap, changed[place])
            args, kwargs = tuple(changed), named
        result = func(*args, **kwargs)
        for tap in self.results.get(where, ()):
            result = _pass(tap, result)
        return result


@never_alone
def _pass(tap: Tap, x: Tensor) -> Tensor:
    return pass_traced(tap, x) if torch.compiler.is_compiling() else pass_eager(tap, x)


class Operations(TorchFunctionMode):
    """Hands the operations of tapped modules to their frames while it is entered.

    Attributes:
        running: The open calls, innermost last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running: list[tuple[Frame, dict[str, int]]] = []

    @never_alone
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """See one torch function."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in OPERATIONS or not self.running:
            return func(*args, **kwargs)
        frame, counts = self.running[-1]
        ordinal = counts.get(name, 0)
        counts[name] = ordinal + 1
        return frame.run(func, name, ordinal, args, kwargs)
