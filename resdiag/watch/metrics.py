"""The measurements: pure functions from tensors to float64 scalars, each with formula and source.

Squares of float32 values overflow at 2e19 and vanish below 1e-23 although the values themselves are
finite. Every sum of squares here is exact in that range too: the fast float32 reduction is kept
where it can be trusted and redone in float64 where it cannot. On the CPU trust is a look at the
value, which is already in host memory; on an accelerator a look would stall the queue, so the
reduction runs in float64 there from the start.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

SATURATED_SLOPE = 0.05
"""An activation's output counts as saturated if its slope is below this."""

QUANTILES = (0.1, 0.5, 0.9)

STATISTICS = (
    "mean",
    "channel_mean_rms",
    "channel_std",
    "mean_q10",
    "mean_q50",
    "mean_q90",
    "nonfinite",
)
"""What `statistics` returns, in order: the suffixes of a site's columns."""

# outside these bounds a float32 norm may have lost its squares to overflow or underflow
_TRUSTED = (1e-15, 1e18)
# elements that one float32 sum of squares may take
_PIECE = 2**18
# below this share of the second moment, E[x^2] - mean^2 has cancelled too many float32 digits
_CANCELLED = 1e-2


def norm(x: Tensor) -> Tensor:
    """Euclidean norm sqrt(sum x^2), finite whenever every element of `x` is.

    Args:
        x: Any shape and floating dtype.

    Returns:
        0-d float64 tensor on the device of `x`, in units of `x`.

    >>> f"{norm(torch.full((4,), 1e30)).item():.4g}"  # although 1e60 is no float32
    '2e+30'
    """
    x = x.detach()
    if _is_fast(x):
        fast = _norm_by_pieces(x)
        value = _peek(fast)
        # NaN cannot come from overflowing squares: some element is NaN
        if _TRUSTED[0] < value < _TRUSTED[1] or math.isnan(value):
            return fast
    exact: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return exact


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """`norm` of many tensors of one device in a few kernels, float64 (n,)."""
    if not all(_is_fast(x) and x.numel() <= _PIECE for x in tensors):
        return torch.stack([norm(x) for x in tensors])
    fast = torch.stack(torch._foreach_norm([x.detach() for x in tensors])).double()
    for index, value in enumerate(fast.numpy()):
        if not (_TRUSTED[0] < value < _TRUSTED[1] or math.isnan(value)):
            fast[index] = norm(tensors[index])
    return fast


def statistics(x: Tensor) -> Tensor:
    """Moments of a site over channels: what B1, B2 and the signal propagation plot are made of.

    With mu_c and sigma_c^2 the mean and variance of channel c over batch and positions:
    mean_c mu_c; sqrt(mean_c mu_c^2); sqrt(mean_c sigma_c^2); the 10, 50 and 90 % quantiles of mu_c;
    the non-finite fraction.

    Args:
        x: (N, C), (N, C, H, W), (N, C, T, H, W) or (N, T, C): channels are dimension 1, but the
            last one of a 3-d tensor; (C,) is one sample.

    Returns:
        float64 tensor (7,), see `STATISTICS`; units of `x` but for the last, a fraction. NaN for an
        empty batch.

    References:
        Brock et al. 2021, arXiv:2101.08692; Clevert et al. 2015, arXiv:1511.07289.
    """
    return combine([reduce(x)])[0]


class Sums(NamedTuple):
    """What `statistics` needs of a tensor: all that must be read before the tensor changes.

    Attributes:
        per_channel: Sums over batch and positions, float64 (C,).
        size: Elements per channel.
        second: Second moment E[x^2], 0-d float64.
        spread: mean_c sigma_c^2 where the difference of the others would have cancelled.
        broken: Non-finite fraction; None if `x` is known to be finite.
    """

    per_channel: Tensor
    size: int
    second: Tensor
    spread: Tensor | None
    broken: Tensor | None


def reduce(x: Tensor, per_channel: Tensor | None = None) -> Sums:
    """Read a tensor once for its channel sums and once for its norm; the rest can wait.

    Args:
        x: The tensor.
        per_channel: Its channel sums if they are known, float64 (C,); used while `x` is finite.
    """
    x = x.detach() if x.dim() > 1 else x.detach().reshape(1, -1)
    if not x.numel():
        nan = torch.full((x.shape[channel_dimension(x)],), math.nan, dtype=torch.float64)
        nothing = nan.new_full((), math.nan)
        return Sums(nan.to(x.device), 1, nothing.to(x.device), None, nothing.to(x.device))
    sums, second, finite = _moments(x, per_channel)
    size = x.numel() // max(1, sums.numel())
    spread = None
    if finite and x.is_cpu:
        squared = _peek(torch.dot(sums, sums)) / (sums.numel() * size**2)
        if _peek(second) - squared < _CANCELLED * _peek(second):
            spread = _centred_second_moment(x)
    return Sums(sums, size, second, spread, None if finite else nonfinite_fraction(x))


def combine(parts: Sequence[Sums]) -> Tensor:
    """`statistics` of several tensors of equally many channels, in a few kernels: (n, 7)."""
    mu = torch.stack([part.per_channel / part.size for part in parts])
    second = torch.stack([part.second for part in parts])
    squared = mu.square().mean(1)
    spread = (second - squared).clamp_min(0)
    for index, part in enumerate(parts):
        if part.spread is not None:
            spread[index] = part.spread
    zero = torch.zeros((), dtype=torch.float64, device=mu.device)
    broken = torch.stack([zero if part.broken is None else part.broken for part in parts])
    return describe(mu, squared, spread, broken)


def describe(mu: Tensor, squared: Tensor, spread: Tensor, broken: Tensor) -> Tensor:
    """`statistics` from mu_c (n, C), and per tensor mean_c mu_c^2, mean_c sigma_c^2, non-finite."""
    moments = torch.stack([mu.mean(1), squared.sqrt(), spread.sqrt()], dim=1)
    return torch.cat([moments, _quantiles(mu), broken.unsqueeze(1)], dim=1)


def nonfinite_fraction(x: Tensor) -> Tensor:
    """Share of NaN and infinite elements, a 0-d float64 tensor."""
    return x.detach().isfinite().logical_not_().sum(dtype=torch.float64) / max(1, x.numel())


def gradient(g: Tensor) -> tuple[Tensor, Tensor]:
    """G2, the batch-size free gradient norm sqrt(B) ||g||_F, and the non-finite fraction of `g`.

    For a mean loss over B samples this is B times the RMS over samples of the per-sample norm.

    Args:
        g: Gradient of the mean loss, batch first.

    References:
        He et al. 2016, arXiv:1603.05027, eq. 5.
    """
    g = g.detach()
    size = norm(g)
    finite = g.is_cpu and math.isfinite(_peek(size))
    broken = torch.zeros_like(size) if finite else nonfinite_fraction(g)
    return size * math.sqrt(g.shape[0] if g.dim() else 1), broken


def relative_change(changed: Tensor, reference: Tensor) -> Tensor:
    """||changed - reference||_F / ||reference||_F: P1 of (H, u), P2 of (f(h), h), P4 of f^(n).

    0 when both are 0; a 0-d float64 tensor.

    References:
        Shah et al. 2016, arXiv:1604.04112, section 3.2.3.

    >>> relative_change(torch.tensor([0.0, 4.0]), torch.tensor([3.0, 4.0])).item()
    0.6
    """
    return relative_changes([changed], [reference])[0]


def relative_changes(changed: Iterable[Tensor], references: Sequence[Tensor]) -> Tensor:
    """`relative_change` of many pairs, float64 (n,); `changed` is read one by one."""
    pairs = zip(changed, references, strict=True)
    differences = torch.stack([norm(a.detach() - b.detach()) for a, b in pairs])
    return torch.where(differences == 0, differences, differences / norms(references))


def share(part: Tensor, total: Tensor) -> Tensor:
    """Projection share <part, total> / ||total||^2; the shares of the parts of `total` sum to 1.

    Args:
        part: One addend of `total`, same shape.
        total: E.g. dL/dx, the sum of what came through the shortcut and through the branch.

    Returns:
        0-d float64 tensor; outside 0..1 where the parts partly cancel.

    >>> round(share(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])).item(), 6)
    0.5
    """
    part, total = part.detach(), total.detach()
    size = norm(total)
    a, b = _flat(part), _flat(total)
    same = part.stride() == total.stride() and _is_fast(part) and _is_fast(total)
    if same and a is not None and b is not None and _TRUSTED[0] < _peek(size) < _TRUSTED[1]:
        inner = torch.dot(a, b).double()
        if math.isfinite(_peek(inner)):
            return inner / size.square()
    # normalised before the product: squares of a large float64 norm stay finite, products do too
    return (part.double() * (total.double() / size)).sum() / size


def slope(function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """Derivative f'(u) of an elementwise function, same shape as `u`.

    >>> slope(torch.relu, torch.tensor([-1.0, 2.0])).tolist()
    [0.0, 1.0]
    """
    # own saved-tensor hooks: those around us (activation checkpointing) would count our tensors
    with torch.enable_grad(), saved_tensors_hooks(_itself, _itself):
        at = u.detach().requires_grad_()
        (derivative,) = torch.autograd.grad(function(at).sum(), at)
    return derivative


def _itself(x: Tensor) -> Tensor:
    return x


def channel_dimension(x: Tensor) -> int:
    """The dimension that holds channels: 1 of a 2-d, 4-d or 5-d tensor, else the last."""
    return 1 if x.dim() in (2, 4, 5) else x.dim() - 1


def _is_fast(x: Tensor) -> bool:
    """Whether a float32 reduction is worth trying: on the CPU, where its result can be checked."""
    return x.is_cpu and x.dtype == torch.float32


def _norm_by_pieces(x: Tensor) -> Tensor:
    """Norm from float32 norms of pieces: one float32 sum over 1e7 squares is off by 1e-3."""
    kept = next((d for d in range(x.dim()) if math.prod(x.shape[d:]) <= _PIECE), x.dim())
    if kept == x.dim() > 0:
        kept, x = 0, x.double()
    rows: Tensor = torch.linalg.vector_norm(x, dim=tuple(range(kept, x.dim())))
    return rows.double() if not kept else torch.linalg.vector_norm(rows.double())


def _flat(x: Tensor) -> Tensor | None:
    """The elements in the order in which they lie in memory, if they lie densely."""
    if x.is_contiguous():
        return x.view(-1)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).reshape(-1)
    return None


def _peek(value: Tensor) -> float:
    """A CPU scalar as it lies in host memory: no kernel, no copy, no queue to wait for."""
    return float(value.numpy())


def _moments(x: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor, bool]:
    """Channel sums (C,), second moment, and whether `x` is known to be finite."""
    reduced = tuple(d for d in range(x.dim()) if d != channel_dimension(x))
    size = norm(x)
    if known is not None and _is_fast(x) and _peek(size) < _TRUSTED[1]:
        sums = known
    elif _is_fast(x) and not _peek(size) >= _TRUSTED[1]:
        sums = x.sum(reduced).double()
    else:
        sums = x.double().sum(reduced) if x.is_cpu else x.sum(reduced, dtype=torch.float64)
    finite = x.is_cpu and math.isfinite(_peek(size))
    return sums, size.square() / x.numel(), finite


def _centred_second_moment(x: Tensor) -> Tensor:
    """mean_c sigma_c^2 by the two-pass formula, for means far larger than the spread."""
    wide = x.double()
    reduced = tuple(d for d in range(x.dim()) if d != channel_dimension(x))
    return (wide - wide.mean(reduced, keepdim=True)).square().mean()


def _quantiles(mu: Tensor) -> Tensor:
    """Linear-interpolated quantiles (n, 3) of (n, C); NaN if a channel mean is not finite."""
    low, high, weight = _quantile_positions(mu.shape[1], mu.device)
    ordered = mu.sort(1).values
    return torch.lerp(ordered[:, low], ordered[:, high], weight) + 0 * mu.sum(1, keepdim=True)


@functools.lru_cache(maxsize=64)
def _quantile_positions(count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    at = torch.tensor([q * (count - 1) for q in QUANTILES], dtype=torch.float64)
    low = at.floor().long()
    high = (low + 1).clamp_max(count - 1)
    return low.to(device), high.to(device), (at - low).to(device)
