"""Moments of a tensor over its channels: means, deviations and quantiles, read in two passes.

Those of a BatchNorm's output follow from what the layer keeps for its backward pass, without a look
at it.
"""

import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import Node

from resdiag.watch.measure import kernels
from resdiag.watch.measure.reductions import (
    TRUSTED,
    Scalar,
    channel_dimension,
    is_fast,
    look,
    nonfinite_fraction,
    norm,
    on_host,
    stack,
)

QUANTILES = (0.1, 0.5, 0.9)

STATISTICS = (
    *("mean", "channel_mean_rms", "channel_std", "mean_q10", "mean_q50", "mean_q90"),
    "nonfinite",
)
"""What `statistics` returns, in order: the suffixes of a site's columns."""

# below this share of the second moment, E[x^2] - mean^2 has lost too many float32 digits
CANCELLED = 1e-2
# sigma^2 / (sigma^2 + eps) of a BatchNorm: float32 keeps 1e-7 of it, less is a constant channel
_NO_VARIANCE = 1e-6
_BEHIND = (2, 3, 4)  # the dimensions behind the channels of a contiguous tensor


def statistics(x: Tensor) -> Tensor:
    """Moments of a site over channels: what B1, B2 and the signal propagation plot are made of.

    With mu_c and sigma_c^2 the mean and variance of channel c over batch and positions:
    mean_c mu_c; sqrt(mean_c mu_c^2); sqrt(mean_c sigma_c^2); the 10, 50 and 90 % quantiles of mu_c;
    the non-finite fraction.

    Args:
        x: (N, C), (N, C, H, W), (N, C, T, H, W) or (N, T, C): channels are dimension 1, but the
            last one of a 3-d tensor; (C,) is one sample. A monitor knows other places from the
            operations that made a tensor, e.g. (N, H, W, C).

    Returns:
        float64 tensor (7,), see `STATISTICS`; units of `x` but for the last, a fraction. NaN for an
        empty batch.

    References:
        Brock et al. 2021, arXiv:2101.08692; Clevert et al. 2015, arXiv:1511.07289.
    """
    return combine([reduce(x)])[0]


class Sums(NamedTuple):
    """What `statistics` needs of a tensor: all that must be read before the tensor changes."""

    per_channel: Tensor  # sums over batch and positions (C,)
    size: Scalar  # elements per channel
    second: Scalar  # second moment E[x^2]
    spread: Scalar | None  # mean_c sigma_c^2 where the difference of the others had cancelled
    broken: Scalar  # non-finite fraction


def reduce(x: Tensor, per_channel: Tensor | None = None, features: int | None = None) -> Sums:
    """Read a tensor once for its channel sums and once for its norm; the rest can wait.

    Channel sums (C,) that are known are used while `x` is finite; `features` is the dimension of
    the channels, None for the usual place.
    """
    if x.requires_grad:
        x = x.detach()
    if x.dim() < 2:
        x = x.reshape(1, -1)
    at = channel_dimension(x.dim(), features)
    channels = x.shape[at]
    if not x.numel():
        nan = torch.full((channels,), math.nan, dtype=torch.float64, device=x.device)
        return Sums(nan, 1, math.nan, None, math.nan)
    if kernels.serves(x):
        read = kernels.moments(x, at)
        return Sums(read[:-2], 1, read[-2], None, read[-1])
    size = norm(x)
    count = x.numel() // channels
    sums = per_channel
    if sums is None or not is_fast(x) or not size < TRUSTED[1]:
        sums = _channel_sums(x, size, at)
    second = size * size / x.numel()
    if not isinstance(second, float) or not math.isfinite(second):
        return Sums(sums, count, second, None, nonfinite_fraction(x))
    squared = look(torch.linalg.vector_norm(sums)) ** 2 / (channels * count**2)
    cancelled = second - squared < CANCELLED * second
    return Sums(sums, count, second, _centred_second_moment(x, at) if cancelled else None, 0.0)


def combine(parts: Sequence[Sums]) -> Tensor:
    """`statistics` of several tensors of equally many channels, in a few kernels: (n, 7)."""
    device = parts[0].per_channel.device
    if on_host(device):
        return torch.from_numpy(_combine_on_host(parts))
    mu = torch.stack([part.per_channel.double() / part.size for part in parts])
    squared = mu.square().mean(1)
    spread = (stack([part.second for part in parts], device) - squared).clamp_min(0)
    for index, part in enumerate(parts):
        if part.spread is not None:
            spread[index] = part.spread
    return describe(mu, squared, spread, stack([part.broken for part in parts], device))


def _combine_on_host(parts: Sequence[Sums]) -> NDArray[np.float64]:
    """`combine` by NumPy: on a few hundred numbers a call of PyTorch costs several of its own."""
    with np.errstate(all="ignore"):
        sizes = np.array([[part.size] for part in parts], dtype=np.float64)
        mu = np.array([part.per_channel.numpy() for part in parts], dtype=np.float64) / sizes
        squared = np.square(mu).mean(1)
        spread = np.maximum([part.second for part in parts] - squared, 0)
        for index, part in enumerate(parts):
            if part.spread is not None:
                spread[index] = part.spread
        low, high, weight = _quantile_places(mu.shape[1])
        ordered = np.sort(mu, 1)
        quantiles = ordered[:, low] + weight * (ordered[:, high] - ordered[:, low])
        quantiles += 0 * mu.sum(1, keepdims=True)  # NaN if a channel mean is not finite
        moments = [mu.mean(1), np.sqrt(squared), np.sqrt(spread), *quantiles.T]
        table: NDArray[np.float64] = np.array([*moments, [part.broken for part in parts]]).T
    return table


def describe(mu: Tensor, squared: Tensor, spread: Tensor, broken: Tensor) -> Tensor:
    """`statistics` from mu_c (n, C), and per tensor mean_c mu_c^2, mean_c sigma_c^2, non-finite."""
    moments = torch.stack([mu.mean(1), squared.sqrt(), spread.sqrt()], dim=1)
    return torch.cat([moments, _quantiles(mu), broken.unsqueeze(1)], dim=1)


def _channel_sums(x: Tensor, size: Scalar, at: int) -> Tensor:
    """Sums over all but the channels (C,), in float64 where float32 could overflow."""
    reduced = tuple(d for d in range(x.dim()) if d != at)
    if not on_host(x.device):
        return x.sum(reduced, dtype=torch.float64)
    if is_fast(x) and not size >= TRUSTED[1]:
        if at == 1 and 3 < x.dim() < 6 and x.is_contiguous():
            # first over what lies together: half the time on tensors that no cache holds
            return x.sum(_BEHIND[: x.dim() - 2]).sum(0)
        return x.sum(reduced)
    return x.double().sum(reduced)


def _centred_second_moment(x: Tensor, at: int) -> Scalar:
    """mean_c sigma_c^2 by the two-pass formula, for means far larger than the spread."""
    wide = x.double()
    reduced = tuple(d for d in range(x.dim()) if d != at)
    spread = (wide - wide.mean(reduced, keepdim=True)).square().mean()
    return look(spread) if on_host(x.device) else spread


def _quantiles(mu: Tensor) -> Tensor:
    """Linear-interpolated quantiles (n, 3) of (n, C); NaN if a channel mean is not finite."""
    ordered = mu.sort(1).values
    # by columns and numbers, not by tensors of them: those would have to be sent to the device
    places = zip(*(numbers.tolist() for numbers in _quantile_places(mu.shape[1])), strict=True)
    columns = [torch.lerp(ordered[:, low], ordered[:, high], at) for low, high, at in places]
    return torch.stack(columns, dim=1) + 0 * mu.sum(1, keepdim=True)


@functools.lru_cache(maxsize=64)
def _quantile_places(size: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Between which two of so many sorted numbers each quantile lies, and where."""
    at = np.array(QUANTILES) * (size - 1)
    low = np.floor(at).astype(np.int64)
    return low, np.minimum(low + 1, size - 1), at - low


class Gone(Exception):
    """A tensor cannot be had from a graph, or not without running somebody's code."""


def kept(node: Node, name: str) -> Tensor:
    """A tensor that a node keeps, detached; `name` without its prefix.

    Raises:
        Gone: It was overwritten since, or unpacking it runs a hook of somebody's: activation
            checkpointing would compute the pass again.
    """
    try:
        hook = getattr(node, f"_raw_saved_{name}").unpack_hook
        found: Tensor | None = None if hook is not None else getattr(node, f"_saved_{name}")
    except (AttributeError, RuntimeError) as error:  # no such thing; its version is another one
        raise Gone(str(error)) from error
    if found is None:
        raise Gone(name)
    return found.detach()


class Normalised(NamedTuple):
    """What a BatchNorm in training has just returned: its moments need not be read off it.

    Its channel means are beta_c, its variances gamma_c^2 sigma_c^2 / (sigma_c^2 + eps), and sigma_c
    is among the few numbers that the layer keeps for its backward pass. They can wait until the
    forward pass has ended: a dozen small operations cost a tenth there of what they cost between
    two convolutions, which leave nothing of them in the caches.

    References:
        Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1.
    """

    node: Any  # in the autograd graph; what it keeps is not in its type
    scale: Tensor  # gamma (C,)
    shift: Tensor  # beta (C,)
    tensor: Callable[[], Tensor | None]  # gives the output itself, None if it is not there any more
    numel: int

    @property
    def per_channel(self) -> Tensor:
        """Sums over batch and positions (C,), float64."""
        shift = self.shift.detach().numpy()
        return torch.from_numpy(np.multiply(shift, self.numel // len(shift), dtype=np.float64))

    def sums(self) -> Sums | None:
        """What `reduce` would have read; None where a batch variance over- or underflowed."""
        return normalised_sums([self])[0]


def normalised(x: Tensor) -> Normalised | None:
    """The moments of `x` without reading it.

    None where `x` is not on the CPU, or not of a BatchNorm with affine parameters that used the
    batch's statistics.
    """
    node: Any = x.grad_fn if is_fast(x) else None  # what a node keeps is not in its type
    if node is None or node.name() != "NativeBatchNormBackward0" or not node._saved_training:
        return None
    scale, shift = (getattr(ahead, "variable", None) for ahead, _ in node.next_functions[1:])
    if scale is None or shift is None:
        return None
    try:
        kept(node, "result2")
    except Gone:  # reading it would compute the layer again
        return None
    reference, version = weakref.ref(x), x._version

    def unchanged() -> Tensor | None:
        x = reference()
        return x if x is not None and x._version == version else None

    return Normalised(node, scale, shift, unchanged, x.numel())


def normalised_sums(layers: Sequence[Normalised]) -> list[Sums | None]:
    """`Normalised.sums` of many layers, those of equally many channels at once."""
    found: list[Sums | None] = [None] * len(layers)
    for channels in {len(layer.shift) for layer in layers}:
        which = [i for i, layer in enumerate(layers) if len(layer.shift) == channels]
        for i, one in zip(which, _normalised_sums([layers[i] for i in which]), strict=True):
            found[i] = one
    return found


def _normalised_sums(layers: Sequence[Normalised]) -> Iterator[Sums | None]:
    """The sums of BatchNorms of equally many channels."""
    # inverse: 1 / sqrt(sigma^2 + eps)
    vectors = zip(*((one.scale, one.shift, one.node._saved_result2) for one in layers), strict=True)
    gamma, beta, inverse = (
        np.array([x.detach().numpy() for x in same], dtype=np.float64) for same in vectors
    )
    channels, eps = beta.shape[1], np.array([[float(one.node._saved_eps)] for one in layers])
    count = np.array([one.numel // channels for one in layers])
    with np.errstate(all="ignore"):
        square = inverse * inverse
        broken = ~np.isfinite(gamma + beta) | np.isnan(square)
        usable = (square > 0).all(1) & np.isfinite(square.sum(1))
        share = 1 - eps * square
        share[share < _NO_VARIANCE] = 0
        spread = (gamma * gamma * share).mean(1)
        second = np.square(beta).mean(1) + spread
        usable &= np.isfinite(second) & (np.sqrt(second * count * channels) < TRUSTED[1])
        # a variance is NaN where a mean was not finite: so is every element then
        totals = np.where(broken, math.nan, beta * count[:, None])
    cancelled, shares = spread < CANCELLED * second, broken.mean(1)
    for i, size in enumerate(count.tolist()):
        total = torch.from_numpy(totals[i])
        if shares[i]:
            yield Sums(total, size, math.nan, None, float(shares[i]))
        elif not usable[i]:
            yield None
        else:
            own = float(spread[i]) if cancelled[i] else None
            yield Sums(total, size, float(second[i]), own, 0.0)
