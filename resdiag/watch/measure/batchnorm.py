"""What a BatchNorm keeps for its backward pass, and the moments of its output that follow from it.

What nodes of an autograd graph keep is looked at without a trace.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import Node

from resdiag.watch.measure.moments import CANCELLED, Sums
from resdiag.watch.measure.reductions import TRUSTED, is_fast

_Affine: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], float]

# sigma^2 / (sigma^2 + eps) of a BatchNorm: float32 keeps 1e-7 of it, less is a constant channel
_NO_VARIANCE = 1e-6


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


def affine(node: Node) -> tuple[nn.Parameter, nn.Parameter] | None:
    """Scale and shift (C,) of a BatchNorm on the CPU that used the batch's statistics.

    None for any other node, and for a layer that is frozen or has no affine parameters.
    """
    layer: Any = node  # what a node keeps is not in its type
    if layer.name() != "NativeBatchNormBackward0" or not layer._saved_training:
        return None
    scale, shift = (getattr(ahead, "variable", None) for ahead, _ in layer.next_functions[1:])
    return None if scale is None or shift is None else (scale, shift)


class Normalised(NamedTuple):
    """What a BatchNorm in training has just returned: its moments need not be read off it.

    Its channel means are beta_c, its variances gamma_c^2 sigma_c^2 / (sigma_c^2 + eps), and sigma_c
    is among the few numbers that the layer keeps for its backward pass. They can wait until the
    forward pass has ended: a dozen small operations cost a tenth there of what they cost between
    two convolutions, which leave nothing of them in the caches.

    References:
        Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1.
    """

    node: Node
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
            yield Sums(
                total, size, float(second[i]), float(spread[i]) if cancelled[i] else None, 0.0
            )


def _affine(layer: Normalised) -> _Affine:
    """A BatchNorm's scale, shift, 1 / sqrt(sigma^2 + eps) (C,) and eps."""
    inverse, eps = layer.node._saved_result2, layer.node._saved_eps  # type: ignore[attr-defined]
    gamma, beta, inverse = (t.detach().numpy() for t in (layer.scale, layer.shift, inverse))
    return gamma, beta, inverse, float(eps)
