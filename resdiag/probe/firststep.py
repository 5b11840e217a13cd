"""The first step tried out: from which learning rate on it blows the loss of its own batch up."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RISE = 1.5
"""Factor on the loss of the batch, by its own first step, at which the rate is called critical.

RunData on runs of a and b at depths 20 and 56, two seeds each, not derived: at half the rate every
run lived for 24 steps, at double every one died within 50; values from 1.41 to 1.85 do that too.
"""

_HALVINGS = 6  # of a factor 2: 1 %
_SPAN = 40  # factors of 2 tried upwards, from far below any critical rate


def critical_rate(
    model: nn.Module, images: Tensor, labels: Tensor, *, momentum: float = 0.9, rise: float = RISE
) -> float:
    """The smallest learning rate at which the first step of SGD multiplies its batch's loss.

    The step is that of Nesterov momentum, lr (1 + momentum) g, without weight decay. The weights
    are put back.

    Args:
        model: In train mode; BatchNorm's running statistics are moved by the passes.
        images: A batch.
        labels: Its labels.
        momentum: Of Nesterov's method, 0 for plain SGD.
        rise: Factor on the loss.

    Returns:
        The rate; NaN without a finite loss and gradient, infinity if no rate does it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = F.cross_entropy(model(images), labels)
    gradient = torch.autograd.grad(loss, parameters)
    # in float64: squares of finite float32 numbers overflow
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient))
    limit = rise * float(loss.detach())
    if not math.isfinite(norm) or not math.isfinite(limit) or norm == 0:
        return math.nan
    line = _Line(model, parameters, gradient, images, labels)
    low = 2.0**-8 / norm
    try:
        for _ in range(_SPAN):
            if not line.loss(low * 2 * (1 + momentum)) < limit:
                break
            low *= 2
        else:
            return math.inf
        high = 2 * low
        for _ in range(_HALVINGS):
            middle = math.sqrt(low * high)
            if line.loss(middle * (1 + momentum)) < limit:
                low = middle
            else:
                high = middle
    finally:
        line.restore()
    return high


class _Line:
    """The loss along the gradient."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        gradient: Sequence[Tensor],
        images: Tensor,
        labels: Tensor,
    ) -> None:
        self._model, self._parameters, self._gradient = model, parameters, gradient
        self._images, self._labels = images, labels
        self._before = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def loss(self, size: float) -> float:
        """Loss of the batch after a step of this size; NaN is above any limit."""
        for p, before, g in zip(self._parameters, self._before, self._gradient, strict=True):
            p.copy_(before - size * g)
        return float(F.cross_entropy(self._model(self._images), self._labels))

    @torch.no_grad()
    def restore(self) -> None:
        """The weights as they were."""
        for p, before in zip(self._parameters, self._before, strict=True):
            p.copy_(before)
