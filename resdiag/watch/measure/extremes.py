"""How far single numbers and channels of a tensor stick out, and how large logits are."""

import torch
from torch import Tensor

from resdiag.watch.measure.reductions import channel_dimension

OUTLIER = 6.0
"""An outlier channel's RMS over that of the median channel; 6 is the magnitude from which on
Dettmers et al. 2022 keep a feature out of 8 bits, where ordinary ones are about 1."""

_NUMBERS = 2**17
"""Most logits that the head is measured on: the first rows."""


@torch.no_grad()
def extremes(x: Tensor, features: int | None) -> dict[str, Tensor]:
    """Largest magnitude, kurtosis over channels and number of outlier channels, 0-d tensors.

    Args:
        x: Any tensor, batch first.
        features: The dimension of its channels, if it is known.

    >>> x = torch.ones(3, 8)
    >>> x[:, 2] = 20
    >>> {name: round(value.item(), 3) for name, value in extremes(x, 1).items()}
    {'largest': 20.0, 'kurtosis': 7.728, 'outliers': 1.0}
    """
    wide = x.detach().double()
    channels = channel_dimension(wide.dim(), features)
    squares = wide.movedim(channels, 0).flatten(1).square().mean(1) if wide.dim() else wide.square()
    sizes = squares.sqrt()
    return {
        "largest": wide.abs().amax(),
        "kurtosis": squares.square().mean() / squares.mean().square(),
        "outliers": (sizes > OUTLIER * sizes.median()).sum().double() + 0 * sizes.sum(),
    }


@torch.no_grad()
def root_z(logits: Tensor) -> Tensor:
    """sqrt(mean_n (ln sum_k exp z_nk)^2) of logits (..., K): the root of the z-loss, 0-d float64.

    >>> round(root_z(torch.zeros(3, 4)).exp().item(), 6)
    4.0
    """
    z: Tensor = logits.detach().double().logsumexp(-1).square().mean().sqrt()
    return z


@torch.no_grad()
def describe_logits(logits: Tensor) -> dict[str, Tensor]:
    """The columns of the head, from logits (..., K)."""
    classes = max(1, logits.shape[-1])
    rows = logits.detach().reshape(-1, classes)[: max(1, _NUMBERS // classes)]
    return {"head_logit": rows.abs().amax().double(), "head_z": root_z(rows)}
