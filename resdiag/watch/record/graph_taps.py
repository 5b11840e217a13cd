"""What hooks write of a tensor that passes through a graph, and of its gradient.

A graph that torch.compile makes, or that CUDA replays, runs no Python: what is to be known of it
must be a part of it. Everything here is traced into the graph, or runs in a hook while it is
captured; it is a pure function of tensors and of numbers that stay the same, and writes into
tensors made beforehand. It may not look at a value, as the shortcuts of `measure` on a CPU do.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resdiag.watch.base.safety import never_alone, plain
from resdiag.watch.measure import kernels
from resdiag.watch.plan.ports import Port, Trail
from resdiag.watch.record.operations import Arguments, Handler, Keywords, Where

Function = Callable[[Tensor], Tensor]
Side = tuple[bool, int]
"""Whether it is the output, and the number of the module's call."""

Place = int | str | None
"""A position or a keyword; None for all of a result."""

MEANS = slice(None, -3)
SECOND, BROKEN, COUNT = -3, -2, -1
"""Where a tensor's sums hold channel means, E[x^2], non-finite fraction, elements a channel."""


@dataclass(eq=False)
class Written:
    """What is written of a tensor or of its gradient: tensors that are made beforehand, or None.

    `sums` are of a tensor its moments, float64 (C + 3,), see `MEANS`; of a gradient G2, non-finite
    fraction and batch size, float64 (3,).
    """

    sums: Tensor | None = None
    head: Tensor | None = None  # the first samples
    total: Tensor | None = None  # the sum over the batch, float64 (K,)
    values: Tensor | None = None  # custom metrics, float64 (n,), one for each of `functions`
    functions: tuple[Function, ...] = ()

    def tensors(self) -> list[Tensor]:
        """All that are there."""
        parts = self.sums, self.head, self.total, self.values
        return [part for part in parts if part is not None]

    def write(self, x: Tensor) -> None:
        """Write all but `sums`."""
        if self.head is not None and x[: self.head.shape[0]].shape == self.head.shape:
            self.head.copy_(x[: self.head.shape[0]])
        if self.total is not None:
            self.total.copy_(x.reshape(-1, x.shape[-1]).sum(0).double())
        if self.values is not None:
            self.values.copy_(torch.stack([f(x).double() for f in self.functions]))


class Tap:
    """What is written at one port, of the tensor there and of its gradient.

    The sums are over `samples` at the head of the batch, None for all; `separate` says that the
    gradient of this use alone is wanted, not of the whole tensor.
    """

    def __init__(self, port: Port, samples: int | None) -> None:
        self.port, self.samples = port, samples
        self.channel, self.separate = 1, False
        self.forward, self.gradient = Written(), Written()

    def tensors(self) -> list[Tensor]:
        """All tensors that are written into."""
        return [*self.forward.tensors(), *self.gradient.tensors()]


Taps = list[tuple[Place, Tap]]


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
    """The identity, whose backward writes something of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tap: Tap) -> Tensor:  # noqa: ANN401
        """A copy, which the compiler drops: an in-place operation may not overwrite a view."""
        ctx.tap = tap
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        """Write what the gradient is."""
        _write_gradient(ctx.tap, g)
        return g, None


class Hook:
    """The forward hooks of one module, which is called several times in a pass if `repeated`."""

    def __init__(self, switch: Switch, taps: dict[Side, Taps], *, repeated: bool) -> None:
        self.switch, self.taps, self.repeated = switch, taps, repeated
        self.calls = 0

    @never_alone
    def before(self, module: nn.Module, args: Arguments, kwargs: Keywords) -> Any:  # noqa: ANN401
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


class TappedOperations(Handler):
    """An `operations.Handler`: the taps of one module at operands, and for None at the result."""

    def __init__(self, switch: Switch, taps: Mapping[Where, Taps]) -> None:
        self.switch, self.taps = switch, dict(taps)

    @never_alone
    def before(
        self, where: Where, func: object, args: Arguments, kwargs: Keywords
    ) -> tuple[Arguments, Keywords]:
        """Tap operands."""
        taps = self.taps.get(where) if self.switch.is_on() else None
        return (args, kwargs) if taps is None else _tap_arguments(taps, args, kwargs)

    @never_alone
    def after(self, where: Where, func: object, args: object, kwargs: object, result: Any) -> Any:  # noqa: ANN401
        """Tap the result."""
        if self.switch.is_on():
            for place, tap in self.taps.get(where, ()):
                result = tapped(tap, result) if place is None else result
        return result


@never_alone
def _tap_arguments(taps: Taps, args: Arguments, kwargs: Keywords) -> tuple[Arguments, Keywords]:
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
    if x.requires_grad and tap.gradient.tensors():
        passed: Tensor = _Gradient.apply(x, tap)
        return passed
    return x


@plain
def _pass_eager(tap: Tap, x: Tensor) -> Tensor:
    """The same for a hook outside of every graph: a tensor hook leaves the tensor as it is."""
    with torch.no_grad():
        _write_forward(tap, x.detach())
    if x.requires_grad and tap.gradient.tensors():
        x = x.view_as(x) if tap.separate else x
        x.register_hook(lambda g: _write_gradient(tap, g.detach()))
    return x


def _write_forward(tap: Tap, x: Tensor) -> None:
    if (sums := tap.forward.sums) is not None:
        values = moments_of(x if tap.samples is None else x[: tap.samples], tap.channel)
        if values.shape == sums.shape:
            sums.copy_(values)
    tap.forward.write(x)


def _write_gradient(tap: Tap, g: Tensor) -> None:
    if tap.gradient.sums is not None:
        tap.gradient.sums.copy_(gradient_of(g, tap.samples))
    tap.gradient.write(g)


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
