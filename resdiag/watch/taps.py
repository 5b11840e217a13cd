"""What hooks write of a tensor that passes through a compiled graph, and of its gradient.

Everything here is traced into the graph, or runs in a hook outside of every graph; it is a pure
function of tensors and of numbers that stay the same, and writes into tensors made beforehand.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from resdiag.watch.base.compilation import never_alone, plain
from resdiag.watch.measure import kernels
from resdiag.watch.ports import Port


class Tap:
    """What is written at one port; each part is a tensor made beforehand, or None.

    Args:
        port: The port.

    Attributes:
        port: The port.
        moments: Channel means, second moment and non-finite fraction, float64 (C + 2,).
        head: The first samples of the tensor.
        norm: G2 and the non-finite fraction of the gradient, float64 (2,).
        tail: The first samples of the gradient.
        gap: Largest entry of the gradient's sum over the batch, float64 (1,).
        channel: The dimension of the channels.
    """

    def __init__(self, port: Port) -> None:
        self.port = port
        self.moments: Tensor | None = None
        self.head: Tensor | None = None
        self.norm: Tensor | None = None
        self.tail: Tensor | None = None
        self.gap: Tensor | None = None
        self.channel = 1

    def tensors(self) -> list[Tensor]:
        """All parts that are there."""
        parts = (self.moments, self.head, self.norm, self.tail, self.gap)
        return [part for part in parts if part is not None]


class Switch:
    """What all hooks look at; guarded by torch.compile, so that each state is one graph.

    Attributes:
        on: Whether passes write.
        eager: Whether hooks that run outside of every graph write too.
    """

    def __init__(self) -> None:
        self.on, self.eager = True, False


class _Gradient(torch.autograd.Function):
    """The identity, whose backward writes what the gradient is."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        norm: Tensor | None,
        tail: Tensor | None,
        gap: Tensor | None,
    ) -> Tensor:
        """A copy, which the compiler drops: an in-place operation may not overwrite a view."""
        ctx.norm, ctx.tail, ctx.gap = norm, tail, gap
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        """Write into the parts."""
        _write_gradient(ctx.norm, ctx.tail, ctx.gap, g)
        return g, None, None, None


class Hook:
    """The forward hooks of one module.

    Args:
        switch: Whether to write.
        taps: Per direction and number of the call, places and their taps.
        repeated: Whether the module is called several times in a pass.
    """

    def __init__(
        self,
        switch: Switch,
        taps: dict[tuple[bool, int], list[tuple[int | str | None, Tap]]],
        *,
        repeated: bool,
    ) -> None:
        self.switch, self.taps, self.repeated = switch, taps, repeated
        self.calls = 0

    @never_alone
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Tap arguments."""
        if torch.compiler.is_compiling():
            taps = self.taps.get((False, self.calls)) if self.switch.on else None
            if taps is None or not torch.is_grad_enabled():
                return None
            changed, named = list(args), dict(kwargs)
            for place, tap in taps:
                if isinstance(place, str):
                    named[place] = pass_traced(tap, named[place])
                else:
                    changed[place] = pass_traced(tap, changed[place])  # type: ignore[index]
            return tuple(changed), named
        if self.switch.eager:
            for place, tap in self.taps.get((False, self.calls), ()):
                pass_eager(tap, kwargs[place] if isinstance(place, str) else args[place])  # type: ignore[index]
        return None

    @never_alone
    def after(self, module: nn.Module, args: object, output: Any) -> Any:  # noqa: ANN401
        """Tap results, and count the call."""
        call = self.calls
        if self.repeated:
            self.calls = call + 1
        if torch.compiler.is_compiling():
            taps = self.taps.get((True, call)) if self.switch.on else None
            if taps is None or not torch.is_grad_enabled():
                return None
            for place, tap in taps:
                if place is None:
                    output = pass_traced(tap, output)
                elif isinstance(output, dict):
                    output = {**output, place: pass_traced(tap, output[place])}
                else:
                    parts = [*output]
                    parts[place] = pass_traced(tap, parts[place])  # type: ignore[index]
                    output = type(output)(parts)
            return output
        if self.switch.eager:
            for place, tap in self.taps.get((True, call), ()):
                pass_eager(tap, output if place is None else output[place])
        return None


def pass_traced(tap: Tap, x: Tensor) -> Tensor:
    """Write what is to be written of `x`; return it with the gradient's tap behind it."""
    _write_forward(tap, x.detach())
    if x.requires_grad and not (tap.norm is None and tap.tail is None and tap.gap is None):
        tapped: Tensor = _Gradient.apply(x, tap.norm, tap.tail, tap.gap)
        return tapped
    return x


@plain
def pass_eager(tap: Tap, x: Tensor) -> Tensor:
    """The same for a hook outside of every graph: a tensor hook leaves the tensor as it is."""
    with torch.no_grad():
        _write_forward(tap, x.detach())
    if x.requires_grad and not (tap.norm is None and tap.tail is None and tap.gap is None):
        x.register_hook(lambda g: _write_gradient(tap.norm, tap.tail, tap.gap, g.detach()))
    return x


def _write_forward(tap: Tap, x: Tensor) -> None:
    if tap.moments is not None:
        values = _moments(x, tap.channel)
        if values.shape == tap.moments.shape:
            tap.moments.copy_(values)
    if tap.head is not None:
        _write_head(tap.head, x)


def _write_gradient(
    norm: Tensor | None, tail: Tensor | None, gap: Tensor | None, g: Tensor
) -> None:
    if norm is not None:
        norm.copy_(_gradient(g))
    if tail is not None:
        _write_head(tail, g)
    if gap is not None:
        gap.copy_(g.reshape(-1, g.shape[-1]).sum(0).abs().amax().double().reshape(1))


def _write_head(target: Tensor, x: Tensor) -> None:
    head = x[: target.shape[0]]
    if head.shape == target.shape:
        target.copy_(head)


def _moments(x: Tensor, channel: int) -> Tensor:
    """Channel means, second moment, non-finite fraction: no look at a value, float64 throughout."""
    if x.dim() < 2:
        x, channel = x.reshape(1, -1), 1
    if kernels.serves(x):
        return kernels.moments(x, channel)
    wide = x.double()
    mean = wide.mean([d for d in range(x.dim()) if d != channel])
    rest = torch.stack([wide.square().mean(), x.isfinite().logical_not().double().mean()])
    return torch.cat([mean, rest])


def _gradient(g: Tensor) -> Tensor:
    """G2 and non-finite fraction, see `reductions.gradient`."""
    if kernels.serves(g):
        return kernels.gradient(g)
    size = g.double().square().sum().sqrt() * math.sqrt(g.shape[0] if g.dim() else 1)
    return torch.stack([size, g.isfinite().logical_not().double().mean()])
