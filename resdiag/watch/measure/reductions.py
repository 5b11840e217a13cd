"""The measurements: pure functions from tensors to scalars, each with formula and source.

Squares of float32 values overflow at 2e19 and vanish below 1e-23 although the values themselves are
finite. Every sum of squares here is exact in that range too: the fast float32 reduction is kept
where it can be trusted and redone in float64 where it cannot. On the CPU trust is a look at the
value, which is already in host memory; on an accelerator a look would stall the queue, so the
reduction runs in float64 there from the start. So a scalar is a plain number on the CPU, where
arithmetic on 0-d tensors costs more than many a measurement, and stays a tensor elsewhere.
"""

import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks

from resdiag.watch import fused
from resdiag.watch.calls import Call, compose
from resdiag.watch.saved import Gone, affine, kept

Scalar: TypeAlias = float | Tensor
"""A number for a tensor on the CPU, a 0-d float64 tensor for one on an accelerator."""

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

_Affine: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], float]

# outside these bounds a float32 norm may have lost its squares to overflow or underflow
_TRUSTED = (1e-15, 1e18)
# elements that one float32 sum of squares may take
_PIECE = 2**18
# numbers that one may take without a loss: 1e-7 of the result
_FEW = 2**12
# the dimensions behind the channels of a contiguous tensor
_BEHIND = (2, 3, 4)
# below this share of the second moment, E[x^2] - mean^2 has cancelled too many float32 digits
_CANCELLED = 1e-2
# sigma^2 / (sigma^2 + eps) of a BatchNorm: float32 keeps 1e-7 of it, less is a constant channel
_NO_VARIANCE = 1e-6


def norm(x: Tensor) -> Scalar:
    """Euclidean norm sqrt(sum x^2), finite whenever every element of `x` is.

    Args:
        x: Any shape and floating dtype.

    Returns:
        Scalar in units of `x`.

    >>> f"{norm(torch.full((4,), 1e30)):.4g}"  # although 1e60 is no float32
    '2e+30'
    """
    if x.requires_grad:
        x = x.detach()
    if is_fast(x):
        fast = _norm_by_pieces(x)
        # NaN cannot come from overflowing squares: some element is NaN
        if _TRUSTED[0] < fast < _TRUSTED[1] or math.isnan(fast):
            return fast
    exact: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return _look(exact) if on_host(x.device) else exact


def trusted_norm(x: Tensor) -> float | None:
    """`norm` in the fewest steps, None where float32 cannot be trusted with it."""
    if x.requires_grad or not is_fast(x):
        return None
    size = _norm_by_pieces(x)
    return size if _TRUSTED[0] < size < _TRUSTED[1] else None


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """`norm` of many tensors of one device in a few kernels, float64 (n,)."""
    if not all(is_fast(x) and x.numel() <= _PIECE for x in tensors):
        return stack([norm(x) for x in tensors], tensors[0].device)
    plain = [x.detach() for x in tensors]
    fast = torch.stack(torch._foreach_norm(plain)).double()
    values = fast.numpy()
    doubtful = np.flatnonzero(~((_TRUSTED[0] < values) & (values < _TRUSTED[1])))
    if doubtful.size:  # zeros are common: biases begin there
        exact = torch._foreach_norm([plain[i] for i in doubtful], 2, torch.float64)
        values[doubtful] = torch.stack(exact).numpy()
    return fast


def stack(values: Sequence[Scalar], device: torch.device) -> Tensor:
    """Scalars as one float64 tensor (n,) on a device, to which no number has to be sent."""
    if on_host(device):
        return torch.tensor(values, dtype=torch.float64)
    return torch.stack([v if isinstance(v, Tensor) else _constant(v, device) for v in values])


@functools.lru_cache(maxsize=64)
def _constant(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float64, device=device)


def on_host(device: torch.device) -> bool:
    """Whether tensors of this device lie in host memory, where looking at them costs nothing."""
    return device.type == "cpu"


def quotient(a: Scalar, b: Scalar) -> Scalar:
    """The quotient a / b as IEEE 754 has it: x / 0 is infinite, 0 / 0 is NaN."""
    if isinstance(a, Tensor) or isinstance(b, Tensor) or b:
        return a / b
    return math.nan if math.isnan(a) or not a else math.copysign(math.inf, a)


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
    """What `statistics` needs of a tensor: all that must be read before the tensor changes.

    Attributes:
        per_channel: Sums over batch and positions (C,).
        size: Elements per channel.
        second: Second moment E[x^2].
        spread: mean_c sigma_c^2 where the difference of the others would have cancelled.
        broken: Non-finite fraction.
    """

    per_channel: Tensor
    size: int
    second: Scalar
    spread: Scalar | None
    broken: Scalar


def reduce(x: Tensor, per_channel: Tensor | None = None, features: int | None = None) -> Sums:
    """Read a tensor once for its channel sums and once for its norm; the rest can wait.

    Args:
        x: The tensor.
        per_channel: Its channel sums (C,) if they are known; used while `x` is finite.
        features: The dimension of the channels, None for the usual place.
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
    if fused.serves(x):
        read = fused.moments(x, at)
        return Sums(read[:-2], 1, read[-2], None, read[-1])
    size = norm(x)
    count = x.numel() // channels
    sums = per_channel
    if sums is None or not is_fast(x) or not size < _TRUSTED[1]:
        sums = _channel_sums(x, size, at)
    second = size * size / x.numel()
    if not isinstance(second, float) or not math.isfinite(second):
        return Sums(sums, count, second, None, nonfinite_fraction(x))
    squared = _look(torch.linalg.vector_norm(sums)) ** 2 / (channels * count**2)
    cancelled = second - squared < _CANCELLED * second
    return Sums(sums, count, second, _centred_second_moment(x, at) if cancelled else None, 0.0)


class Normalised(NamedTuple):
    """What a BatchNorm in training has just returned: its moments need not be read off it.

    Its channel means are beta_c, its variances gamma_c^2 sigma_c^2 / (sigma_c^2 + eps), and sigma_c
    is among the few numbers that the layer keeps for its backward pass. They can wait until the
    forward pass has ended: a dozen small operations cost a tenth there of what they cost between
    two convolutions, which leave nothing of them in the caches.

    Attributes:
        node: The layer in the autograd graph.
        scale: gamma (C,).
        shift: beta (C,).
        tensor: Gives the output itself, None if it is not there any more.
        numel: Elements of the output.

    References:
        Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1.
    """

    node: Node
    scale: Tensor
    shift: Tensor
    tensor: Callable[[], Tensor | None]
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
    """The moments of `x` without reading it; None where `x` is not a BatchNorm's on the CPU."""
    node = x.grad_fn if is_fast(x) else None
    terms = None if node is None else affine(node)
    if node is None or terms is None:
        return None
    try:
        kept(node, "result2")
    except Gone:  # reading it would compute the layer again
        return None
    return Normalised(node, *terms, _unchanged(x), x.numel())


def _unchanged(x: Tensor) -> Callable[[], Tensor | None]:
    """What gives a tensor as long as it is there and nobody has written to it."""
    reference, version = weakref.ref(x), x._version

    def get() -> Tensor | None:
        x = reference()
        return x if x is not None and x._version == version else None

    return get


def normalised_sums(layers: Sequence[Normalised]) -> list[Sums | None]:
    """`Normalised.sums` of many layers, those of equally many channels at once."""
    found: list[Sums | None] = [None] * len(layers)
    affine = [_affine(layer) for layer in layers]
    for channels in {len(beta) for _, beta, _, _ in affine}:
        which = [i for i, (_, beta, _, _) in enumerate(affine) if len(beta) == channels]
        sums = _normalised_sums([affine[i] for i in which], [layers[i].numel for i in which])
        for i, one in zip(which, sums, strict=True):
            found[i] = one
    return found


def _normalised_sums(affine: Sequence[_Affine], sizes: Sequence[int]) -> Iterator[Sums | None]:
    """The sums of BatchNorms of equally many channels."""
    gamma, beta, inverse = (
        np.array([one[at] for one in affine], dtype=np.float64) for at in range(3)
    )
    channels, eps = beta.shape[1], np.array([[one[3]] for one in affine])
    count = np.array([size // channels for size in sizes])
    with np.errstate(all="ignore"):
        square = inverse * inverse
        broken = ~np.isfinite(gamma + beta) | np.isnan(square)
        usable = (square > 0).all(1) & np.isfinite(square.sum(1))
        squared = np.square(beta).mean(1)
        kept = 1 - eps * square
        kept[kept < _NO_VARIANCE] = 0
        spread = (gamma * gamma * kept).mean(1)
        second = squared + spread
        usable &= np.isfinite(second) & (np.sqrt(second * count * channels) < _TRUSTED[1])
        # a variance is NaN where a mean was not finite: so is every element then
        totals = np.where(broken, math.nan, beta * count[:, None])
    cancelled, shares = spread < _CANCELLED * second, broken.mean(1)
    for i, size in enumerate(count.tolist()):
        total = torch.from_numpy(totals[i])
        if shares[i]:
            yield Sums(total, size, math.nan, None, float(shares[i]))
        elif not usable[i]:
            yield None
        else:
            yield Sums(
                total, size, float(second[i]), float(spread[i]) if cancelled[i] else None, 0.0
            )


def _affine(layer: Normalised) -> _Affine:
    """A BatchNorm's scale, shift, 1 / sqrt(sigma^2 + eps) (C,) and eps."""
    inverse, eps = layer.node._saved_result2, layer.node._saved_eps  # type: ignore[attr-defined]
    gamma, beta, inverse = (t.detach().numpy() for t in (layer.scale, layer.shift, inverse))
    return gamma, beta, inverse, float(eps)


def combine(parts: Sequence[Sums]) -> Tensor:
    """`statistics` of several tensors of equally many channels, in a few kernels: (n, 7)."""
    device = parts[0].per_channel.device
    if on_host(device):
        return torch.from_numpy(_combine_on_host(parts))
    mu = torch.stack([part.per_channel.double() / part.size for part in parts])
    second = stack([part.second for part in parts], device)
    squared = mu.square().mean(1)
    spread = (second - squared).clamp_min(0)
    for index, part in enumerate(parts):
        if part.spread is not None:
            spread[index] = part.spread
    broken = stack([part.broken for part in parts], device)
    return describe(mu, squared, spread, broken)


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


def nonfinite_fraction(x: Tensor) -> Scalar:
    """Share of NaN and infinite elements."""
    share = x.detach().isfinite().logical_not_().sum(dtype=torch.float64) / max(1, x.numel())
    return _look(share) if on_host(x.device) else share


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
    if fused.serves(g):
        read = fused.gradient(g)
        return read[0] * scale, read[1]
    size = norm(g)
    finite = isinstance(size, float) and math.isfinite(size)
    broken = 0.0 if finite else nonfinite_fraction(g)
    return size * math.sqrt(min(batch, samples or batch)) * scale, broken


def relative_change(changed: Tensor, reference: Tensor) -> Scalar:
    """||changed - reference||_F / ||reference||_F: P1 of (H, u), P2 of (f(h), h), P4 of f^(n).

    0 when both are 0.

    References:
        Shah et al. 2016, arXiv:1604.04112, section 3.2.3.

    >>> round(relative_change(torch.tensor([0.0, 4.0]), torch.tensor([3.0, 4.0])), 6)
    0.6
    """
    difference = norm(changed.detach() - reference.detach())
    if isinstance(difference, Tensor):
        return torch.where(difference == 0, difference, difference / norm(reference))
    return quotient(difference, norm(reference)) if difference else 0.0


def change_by(calls: Sequence[Call], u: Tensor) -> Scalar:
    """`relative_change` of u to what activations make of it; a cache holds `u`, on the CPU.

    >>> round(change_by([Call(torch.relu, (), {})], torch.tensor([-3.0, 4.0])), 6)
    0.6
    """
    u = u.detach()
    # u - max(u, 0) in one operation
    difference = u.clamp(max=0) if is_relu(calls) else compose(tuple(calls))(u) - u
    size = _size(difference)
    return quotient(size, _size(u)) if size else 0.0


def relative_changes(changed: Sequence[Tensor], reference: Sequence[Tensor]) -> list[Scalar]:
    """`relative_change` of many pairs; of pairs on the CPU in a few kernels."""
    if not all(map(is_fast, (*changed, *reference))):
        return [relative_change(a, b) for a, b in zip(changed, reference, strict=True)]
    if not changed:
        return []
    before = [x.detach() for x in reference]
    differences = torch._foreach_sub([x.detach() for x in changed], before)
    pairs = zip(norms(differences).tolist(), norms(before).tolist(), strict=True)
    return [quotient(difference, size) if difference else 0.0 for difference, size in pairs]


def share(part: Tensor, total: Tensor) -> Scalar:
    """Projection share <part, total> / ||total||^2; the shares of the parts of `total` sum to 1.

    Args:
        part: One addend of `total`, same shape.
        total: E.g. dL/dx, the sum of what came through the shortcut and through the branch.

    Returns:
        Scalar; outside 0..1 where the parts partly cancel.

    >>> round(share(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])), 6)
    0.5
    """
    part, total = part.detach(), total.detach()
    a, b = _flat(part), _flat(total)
    same = part.stride() == total.stride() and is_fast(part) and is_fast(total)
    if same and a is not None and b is not None:
        square, inner = _dot(b, b), _dot(a, b)
        if _TRUSTED[0] ** 2 < square < _TRUSTED[1] ** 2 and math.isfinite(inner):
            return inner / square
    # normalised before the product: squares of a large float64 norm stay finite, products do too
    size = norm(total)
    if isinstance(size, Tensor):
        return (part.double() * (total.double() / size)).sum() / size
    return quotient(_look((part.double() * (total.double() / size)).sum()), size)


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


def slope_at(calls: Sequence[Call], u: Tensor, output: Tensor) -> Tensor:
    """`slope` of activations applied one after the other, given what they made of `u`.

    For ReLU and ELU the derivative is read off: 1 where u > 0, elsewhere 0 and H + 1.
    """
    if is_relu(calls):
        return (u > 0).to(u.dtype)
    plain = len(calls) == 1 and not calls[0].args
    name, kwargs = calls[0].name, {k: v for k, v in calls[0].kwargs.items() if k != "inplace"}
    if plain and name == "elu" and kwargs.get("alpha", 1.0) == 1.0 and len(kwargs) <= 1:
        return (output + 1).clamp_max(1)
    return slope(compose(tuple(calls)), u)


def is_relu(calls: Sequence[Call]) -> bool:
    """Whether calls are one ReLU, in place or not."""
    return (
        len(calls) == 1
        and calls[0].name == "relu"
        and not calls[0].args
        and set(calls[0].kwargs) <= {"inplace"}
    )


def _itself(x: Tensor) -> Tensor:
    return x


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
        return _look(torch.linalg.vector_norm(x, dtype=torch.float64))
    if len(inside) == x.dim():
        return _look(torch.linalg.vector_norm(x))
    rows: Tensor = torch.linalg.vector_norm(x, dim=inside)
    # the same operation once more: its code is in the caches now, NumPy's is not
    wide = torch.float64 if rows.numel() > _FEW else None
    return _look(torch.linalg.vector_norm(rows, dtype=wide))


@functools.lru_cache(maxsize=1024)
def _inside_pieces(shape: torch.Size) -> tuple[int, ...] | None:
    """The last dimensions that one float32 sum may take together; None if one is too many."""
    dims = len(shape)
    kept = next((d for d in range(dims) if math.prod(shape[d:]) <= _PIECE), dims)
    return tuple(range(kept, dims)) if kept < dims or not dims else None


def _dot(a: Tensor, b: Tensor) -> float:
    """Inner product from float32 products of pieces."""
    if len(a) <= _PIECE:
        return _look(torch.dot(a, b))
    pairs = zip(a.split(_PIECE), b.split(_PIECE), strict=True)
    return math.fsum(_look(torch.dot(p, q)) for p, q in pairs)


def _size(x: Tensor) -> float:
    """`norm` of a tensor on the CPU that a cache holds."""
    flat = _flat(x) if is_fast(x) else None
    square = 0.0 if flat is None else _dot(flat, flat)
    return math.sqrt(square) if _TRUSTED[0] ** 2 < square < _TRUSTED[1] ** 2 else float(norm(x))


def _flat(x: Tensor) -> Tensor | None:
    """The elements in the order in which they lie in memory, if they lie densely."""
    if x.is_contiguous():
        return x.view(-1)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).reshape(-1)
    return None


def _look(value: Tensor) -> float:
    """A CPU scalar as it lies in host memory: no kernel, no copy, no queue to wait for."""
    return float(value.item())


def _channel_sums(x: Tensor, size: Scalar, at: int) -> Tensor:
    """Sums over all but the channels (C,), in float64 where float32 could overflow."""
    reduced = tuple(d for d in range(x.dim()) if d != at)
    if not on_host(x.device):
        return x.sum(reduced, dtype=torch.float64)
    if is_fast(x) and not size >= _TRUSTED[1]:
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
    return _look(spread) if on_host(x.device) else spread


def _quantiles(mu: Tensor) -> Tensor:
    """Linear-interpolated quantiles (n, 3) of (n, C); NaN if a channel mean is not finite."""
    low, high, weight = _quantile_positions(mu.shape[1], mu.device)
    ordered = mu.sort(1).values
    return torch.lerp(ordered[:, low], ordered[:, high], weight) + 0 * mu.sum(1, keepdim=True)


@functools.lru_cache(maxsize=64)
def _quantile_positions(count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    low, high, weight = (torch.from_numpy(numbers) for numbers in _quantile_places(count))
    return low.to(device), high.to(device), weight.to(device)


@functools.lru_cache(maxsize=64)
def _quantile_places(
    count: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Between which two of so many sorted numbers each quantile lies, and where."""
    at = np.array(QUANTILES) * (count - 1)
    low = np.floor(at).astype(np.int64)
    return low, np.minimum(low + 1, count - 1), at - low
