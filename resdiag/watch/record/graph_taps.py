"""What hooks write of a tensor that passes through a graph, and of its gradient.

A graph that torch.compile makes, or that CUDA replays, runs no Python: what is to be known of it
must be a part of it. Everything here is traced into the graph, or runs in a hook while it is
captured; it is a pure function of tensors and of numbers that stay the same, and writes into
tensors made beforehand. It may not look at a value: the shortcuts of `measure` on a CPU rest on
that, so these are writers of their own. `collect` hands on what they wrote.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resdiag.watch.base.safety import never_alone, plain
from resdiag.watch.measure import kernels
from resdiag.watch.plan.ports import Port, Trail
from resdiag.watch.record.operations import Where

Function = Callable[[Tensor], Tensor]
Place = int | str | None
"""A position or a keyword; None for all of a result."""

MEANS = slice(None, -3)
SECOND, BROKEN, COUNT = -3, -2, -1
"""Where a tap's `moments` holds channel means, E[x^2], non-finite fraction, elements a channel."""


@dataclass(eq=False)
class Tap:
    """What is written at one port; each part is a tensor made beforehand, or None.

    `samples` at the head of the batch are measured for moments and gradients, None for all.

    Attributes:
        moments: Of the tensor, float64 (C + 3,), see `MEANS`.
        head: The first samples of the tensor.
        values: Custom metrics of the tensor, float64 (n,), one for each of `functions`.
        norm: G2, non-finite fraction and batch size of the gradient, float64 (3,).
        tail: The first samples of the gradient.
        gap: The gradient's sum over the batch, float64 (K,).
        backward_values: Custom metrics of the gradient, one for each of `backward_functions`.
        channel: The dimension of the channels.
        separate: Whether the gradient of this use alone is wanted, not of the whole tensor.
    """

    port: Port
    samples: int | None
    moments: Tensor | None = None
    head: Tensor | None = None
    values: Tensor | None = None
    norm: Tensor | None = None
    tail: Tensor | None = None
    gap: Tensor | None = None
    backward_values: Tensor | None = None
    functions: tuple[Function, ...] = ()
    backward_functions: tuple[Function, ...] = ()
    channel: int = 1
    separate: bool = False

    def tensors(self) -> list[Tensor]:
        """All parts that are there."""
        parts = self.moments, self.head, self.values, *self._of_gradient()
        return [part for part in parts if part is not None]

    @property
    def reads_gradient(self) -> bool:
        """Whether anything of the gradient is written."""
        return any(part is not None for part in self._of_gradient())

    def _of_gradient(self) -> tuple[Tensor | None, ...]:
        return self.norm, self.tail, self.gap, self.backward_values


def numbers(count: int, trail: Trail) -> Tensor:
    """A part for so many numbers of a tensor."""
    return torch.full((count,), math.nan, dtype=torch.float64, device=trail.device)


class Switch:
    """What all hooks look at; guarded by torch.compile, so that each state is one graph.

    `on` says whether graphs write, `eager` whether hooks that run outside of every graph do.
    """

    def __init__(self) -> None:
        self.on, self.eager = True, False

    @never_alone
    def is_on(self) -> bool:
        """Whether the pass that runs is to be written."""
        compiling = torch.compiler.is_compiling()
        return (self.on and torch.is_grad_enabled()) if compiling else self.eager


class _Gradient(torch.autograd.Function):
    """The identity, whose backward writes what the gradient is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tap: Tap) -> Tensor:  # noqa: ANN401
        """A copy, which the compiler drops: an in-place operation may not overwrite a view."""
        ctx.tap = tap
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        """Write into the parts."""
        _write_gradient(ctx.tap, g)
        return g, None


class Hook:
    """The forward hooks of one module.

    `taps` holds, for (is_output, number of the call), places and their taps; `repeated` says that
    the module is called several times in a pass.
    """

    def __init__(
        self,
        switch: Switch,
        taps: dict[tuple[bool, int], list[tuple[Place, Tap]]],
        *,
        repeated: bool,
    ) -> None:
        self.switch, self.taps, self.repeated = switch, taps, repeated
        self.calls = 0

    @never_alone
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Tap arguments."""
        taps = self.taps.get((False, self.calls)) if self.switch.is_on() else None
        return None if taps is None else _tap_arguments(taps, args, kwargs)

    @never_alone
    def after(self, module: nn.Module, args: object, output: Any) -> Any:  # noqa: ANN401
        """Tap results, and count the call."""
        call = self.calls
        if self.repeated:
            self.calls = call + 1
        taps = self.taps.get((True, call)) if self.switch.is_on() else None
        if taps is None:
            return None
        for place, tap in taps:
            if place is None:
                output = tapped(tap, output)
            elif isinstance(output, dict):
                output = {**output, place: tapped(tap, output[place])}
            else:
                parts = [*output]
                parts[place] = tapped(tap, parts[place])  # type: ignore[index]
                output = type(output)(parts)
        return output


class TappedOperations:
    """What is tapped at the operations of one module; an `operations.Handler`.

    `taps` holds places and their taps; where a place is None it is the result.
    """

    def __init__(self, switch: Switch, taps: Mapping[Where, list[tuple[Place, Tap]]]) -> None:
        self.switch = switch
        self.operands = {
            where: [(place, tap) for place, tap in here if place is not None]
            for where, here in taps.items()
        }
        self.results = {
            where: [tap for place, tap in here if place is None] for where, here in taps.items()
        }

    @never_alone
    def before(
        self, where: Where, func: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Tap operands."""
        taps = self.operands.get(where) if self.switch.is_on() else None
        return (args, kwargs) if not taps else _tap_arguments(taps, args, kwargs)

    @never_alone
    def after(self, where: Where, func: object, args: object, kwargs: object, result: Any) -> Any:  # noqa: ANN401
        """Tap the result."""
        if self.switch.is_on():
            for tap in self.results.get(where, ()):
                result = tapped(tap, result)
        return result


@never_alone
def _tap_arguments(
    taps: Sequence[tuple[Place, Tap]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with taps behind them."""
    changed, named = list(args), dict(kwargs)
    for place, tap in taps:
        if isinstance(place, str):
            named[place] = tapped(tap, named[place])
        elif place is not None:
            changed[place] = tapped(tap, changed[place])
    return tuple(changed), named


@never_alone
def tapped(tap: Tap, x: Tensor) -> Tensor:
    """Write what is to be written of `x`; return it with the gradient's tap behind it."""
    if not torch.compiler.is_compiling():
        return _pass_eager(tap, x)
    _write_forward(tap, x.detach())
    if x.requires_grad and tap.reads_gradient:
        passed: Tensor = _Gradient.apply(x, tap)
        return passed
    return x


@plain
def _pass_eager(tap: Tap, x: Tensor) -> Tensor:
    """The same for a hook outside of every graph: a tensor hook leaves the tensor as it is."""
    with torch.no_grad():
        _write_forward(tap, x.detach())
    if x.requires_grad and tap.reads_gradient:
        x = x.view_as(x) if tap.separate else x
        x.register_hook(lambda g: _write_gradient(tap, g.detach()))
    return x


def _write_forward(tap: Tap, x: Tensor) -> None:
    if tap.moments is not None:
        values = moments_of(x if tap.samples is None else x[: tap.samples], tap.channel)
        if values.shape == tap.moments.shape:
            tap.moments.copy_(values)
    if tap.head is not None:
        _write_head(tap.head, x)
    if tap.values is not None:
        tap.values.copy_(torch.stack([f(x).double() for f in tap.functions]))


def _write_gradient(tap: Tap, g: Tensor) -> None:
    if tap.norm is not None:
        tap.norm.copy_(gradient_of(g, tap.samples))
    if tap.tail is not None:
        _write_head(tap.tail, g)
    if tap.gap is not None:
        tap.gap.copy_(g.reshape(-1, g.shape[-1]).sum(0).double())
    if tap.backward_values is not None:
        tap.backward_values.copy_(torch.stack([f(g).double() for f in tap.backward_functions]))


def _write_head(target: Tensor, x: Tensor) -> None:
    head = x[: target.shape[0]]
    if head.shape == target.shape:
        target.copy_(head)


def moments_of(x: Tensor, channel: int) -> Tensor:
    """Channel means, E[x^2], non-finite fraction, elements a channel, all float64; see `MEANS`."""
    if x.dim() < 2:
        x, channel = x.reshape(1, -1), 1
    count = torch.full((1,), x.numel() // x.shape[channel], dtype=torch.float64, device=x.device)
    if kernels.serves(x):
        return torch.cat([kernels.moments(x, channel), count])
    wide = x.double()
    mean = wide.mean([d for d in range(x.dim()) if d != channel])
    rest = torch.stack([wide.square().mean(), x.isfinite().logical_not().double().mean()])
    return torch.cat([mean, rest, count])


def gradient_of(g: Tensor, samples: int | None) -> Tensor:
    """G2, non-finite fraction and batch size, see `reductions.gradient`."""
    batch = g.shape[0] if g.dim() else 1
    scale = 1.0
    if samples is not None and samples < batch:
        g, scale = g[:samples], batch / samples
    size = torch.full((1,), batch, dtype=torch.float64, device=g.device)
    if kernels.serves(g):
        return torch.cat([kernels.gradient(g) * g.new_tensor([scale, 1.0]), size])
    root = math.sqrt(g.shape[0] if g.dim() else 1)
    norm = g.double().square().sum().sqrt() * root * scale
    return torch.cat([torch.stack([norm, g.isfinite().logical_not().double().mean()]), size])
