"""Scalars of one tensor: norms and fractions, safe from overflow; how numbers reach a device."""

import functools
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from resdiag.watch.measure import kernels

Scalar: TypeAlias = float | Tensor
"""A number for a tensor on the CPU, a 0-d float64 tensor for one on an accelerator."""

TRUSTED = (1e-15, 1e18)
"""Outside these bounds a float32 norm may have lost its squares to overflow or underflow."""

PIECE = 2**18  # elements that one float32 sum of squares may take
_FEW = 2**12  # numbers that one may take without a loss: 1e-7 of the result


def norm(x: Tensor) -> Scalar:
    """Euclidean norm sqrt(sum x^2), finite whenever every element of `x` is.

    >>> f"{norm(torch.full((4,), 1e30)):.4g}"  # although 1e60 is no float32
    '2e+30'
    """
    if x.requires_grad:
        x = x.detach()
    if is_fast(x):
        fast = _norm_by_pieces(x)
        # NaN cannot come from overflowing squares: some element is NaN
        if TRUSTED[0] < fast < TRUSTED[1] or math.isnan(fast):
            return fast
    exact: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return look(exact) if on_host(x.device) else exact


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """`norm` of many tensors of one device in a few kernels, float64 (n,)."""
    if not all(is_fast(x) and x.numel() <= PIECE for x in tensors):
        return stack([norm(x) for x in tensors], tensors[0].device)
    plain = [x.detach() for x in tensors]
    fast = torch.stack(torch._foreach_norm(plain)).double()
    values = fast.numpy()
    doubtful = np.flatnonzero(~((TRUSTED[0] < values) & (values < TRUSTED[1])))
    if doubtful.size:  # zeros are common: biases begin there
        exact = torch._foreach_norm([plain[i] for i in doubtful], 2, torch.float64)
        values[doubtful] = torch.stack(exact).numpy()
    return fast


def stack(values: Sequence[Scalar], device: torch.device) -> Tensor:
    """Scalars as one float64 tensor (n,) on a device, to which no number has to be sent."""
    if on_host(device):
        return torch.tensor(values, dtype=torch.float64)
    blank = torch.empty((), dtype=torch.float64, device=device)
    return torch.stack([v if isinstance(v, Tensor) else blank.new_full((), v) for v in values])


def on_host(device: torch.device) -> bool:
    """Whether tensors of this device lie in host memory, where looking at them costs nothing."""
    return device.type == "cpu"


def quotient(a: Scalar, b: Scalar) -> Scalar:
    """The quotient a / b as IEEE 754 has it: x / 0 is infinite, 0 / 0 is NaN."""
    if isinstance(a, Tensor) or isinstance(b, Tensor) or b:
        return a / b
    return math.nan if math.isnan(a) or not a else math.copysign(math.inf, a)


def nonfinite_fraction(x: Tensor) -> Scalar:
    """Share of NaN and infinite elements."""
    share = x.detach().isfinite().logical_not_().sum(dtype=torch.float64) / max(1, x.numel())
    return look(share) if on_host(x.device) else share


def gradient(g: Tensor, samples: int | None = None) -> tuple[Scalar, Scalar]:
    """G2, the batch-size free gradient norm sqrt(B) ||g||_F, and the non-finite fraction of `g`.

    For a mean loss over B samples this is B times the RMS over samples of the per-sample norm.

    Args:
        g: Gradient of the mean loss, batch first.
        samples: Estimate both from so many samples at the head of the batch; None for all.

    References:
        He et al. 2016, arXiv:1603.05027, eq. 5.
    """
    if g.requires_grad:
        g = g.detach()
    batch = g.shape[0] if g.dim() else 1
    scale = 1.0
    if samples is not None and samples < batch:
        g, scale = g[:samples], batch / samples
    if kernels.serves(g):
        read = kernels.gradient(g)
        return read[0] * scale, read[1]
    size = norm(g)
    broken = 0.0 if isinstance(size, float) and math.isfinite(size) else nonfinite_fraction(g)
    return size * math.sqrt(min(batch, samples or batch)) * scale, broken


def channel_dimension(dims: int, known: int | None = None) -> int:
    """The dimension that holds channels: the known one, else 1 of 2, 4 or 5, else the last."""
    if known is not None and 0 < known < dims:
        return known
    return 1 if dims in (2, 4, 5) else max(0, dims - 1)


def is_fast(x: Tensor) -> bool:
    """Whether a float32 reduction is worth trying: on the CPU, where its result can be checked."""
    return x.dtype is torch.float32 and on_host(x.device)


def _norm_by_pieces(x: Tensor) -> float:
    """Norm from float32 norms of pieces: one float32 sum over 1e7 squares is off by 1e-3."""
    inside = _inside_pieces(x.shape)
    if inside is None:
        return look(torch.linalg.vector_norm(x, dtype=torch.float64))
    if len(inside) == x.dim():
        return look(torch.linalg.vector_norm(x))
    rows: Tensor = torch.linalg.vector_norm(x, dim=inside)
    # the same operation once more: its code is in the caches now, NumPy's is not
    wide = torch.float64 if rows.numel() > _FEW else None
    return look(torch.linalg.vector_norm(rows, dtype=wide))


@functools.lru_cache(maxsize=1024)
def _inside_pieces(shape: torch.Size) -> tuple[int, ...] | None:
    """The last dimensions that one float32 sum may take together; None if one is too many."""
    dims = len(shape)
    kept = next((d for d in range(dims) if math.prod(shape[d:]) <= PIECE), dims)
    return tuple(range(kept, dims)) if kept < dims or not dims else None


def look(value: Tensor) -> float:
    """A CPU scalar as it lies in host memory: no kernel, no copy, no queue to wait for."""
    return float(value.item())
