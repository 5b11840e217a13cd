"""Statistics of a tensor on a CUDA device in two launches instead of a dozen.

The plain operations of torch (`moments`, `reductions`, `taps`) are the reference, and what
everything else uses. No GPU was at hand when these kernels were written: they are tested in
Triton's interpreter and compiled for one, and are used only if requested, by
RESDIAG_KERNELS=triton.
"""

import functools
import importlib.util
import os

import torch
from torch import Tensor

CHOICE = "RESDIAG_KERNELS"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TILE = 1024  # elements that a program reads at a time
_STEPS = 8  # such tiles per program
_WIDEST = 64  # channels in a tile where they lie next to each other
_LARGEST = 2**31 - 1  # of places in memory: the kernels count in 32 bits


def serves(x: Tensor) -> bool:
    """Whether a tensor is read by these kernels."""
    if not x.is_cuda or torch.compiler.is_compiling() or not _is_chosen():
        return False
    return x.dtype in _DTYPES and x.numel() > 0 and _reach(x) <= _LARGEST


def moments(x: Tensor, channel: int) -> Tensor:
    """Channel means, second moment and non-finite fraction, float64 (C + 2,), in one pass."""
    out = torch.empty(x.shape[channel] + 2, dtype=torch.float64, device=x.device)
    return _launch(x, channel, out, samples=0)


def gradient(g: Tensor) -> Tensor:
    """G2 and the non-finite fraction of a gradient, float64 (2,), in one pass."""
    out = torch.empty(2, dtype=torch.float64, device=g.device)
    if g.dim() == 4 and g.is_contiguous(memory_format=torch.channels_last):
        g = g.permute(0, 2, 3, 1)  # as the elements lie: a norm does not care for their order
    return _launch(g.reshape(-1, 1), 1, out, samples=g.shape[0] if g.dim() else 1)


def _launch(x: Tensor, channel: int, out: Tensor, *, samples: int) -> Tensor:
    """Moments, or the norm where there is a number of samples to multiply it with."""
    from resdiag.watch.measure import triton_kernels

    places = _places(x, channel)
    if places is None:
        return _launch(x.contiguous(), channel, out, samples=samples)
    inner, *strides = places
    channels, rows = x.shape[channel], x.numel() // x.shape[channel]
    wide = min(_WIDEST, _power(channels)) if strides[1] == 1 else 1
    tall = _TILE // wide
    programs = -(-rows // (tall * _STEPS)), -(-channels // wide)
    parts = torch.empty((programs[0], channels, 3), dtype=torch.float64, device=x.device)
    triton_kernels.read[programs](
        x, parts, rows, channels, inner, *strides, TALL=tall, WIDE=wide, STEPS=_STEPS
    )
    triton_kernels.finish[(1,)](
        parts, out, programs[0], channels, rows, samples,
        WIDE=_power(channels), IS_NORM=samples > 0,
    )  # fmt: skip
    return out


def _places(x: Tensor, channel: int) -> tuple[int, int, int, int] | None:
    """Positions inside a sample, and the strides of samples, channels and positions.

    None where the dimensions before or behind the channels do not lie in one row.
    """
    before = _collapse(x.shape[:channel], x.stride()[:channel])
    behind = _collapse(x.shape[channel + 1 :], x.stride()[channel + 1 :])
    if before is None or behind is None:
        return None
    return behind[0], before[1], x.stride(channel), behind[1]


def _collapse(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, int] | None:
    """Size and stride of several dimensions taken as one.

    >>> _collapse(torch.Size((4, 3)), (30, 10)), _collapse(torch.Size((4, 3)), (10, 40))
    ((12, 10), None)
    """
    size, step = 1, 0
    for count, stride in zip(reversed(shape), reversed(strides), strict=True):
        if count == 1:
            continue
        if size > 1 and stride != size * step:
            return None
        size, step = size * count, step or stride
    return size, step


def _reach(x: Tensor) -> int:
    """The last place in memory, counted from the first."""
    return sum((count - 1) * stride for count, stride in zip(x.shape, x.stride(), strict=True))


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


@functools.cache
def _is_chosen() -> bool:
    return os.environ.get(CHOICE) == "triton" and importlib.util.find_spec("triton") is not None
