"""The critical learning rate: 2 / the largest curvature of a loss, or by trying the first step.

The curvature is the largest eigenvalue of the Hessian, estimated by Hessian-vector products.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """Largest eigenvalue of a loss's Hessian, estimated from below.

    Attributes:
        value: The estimate; NaN where there is none.
        steps: Hessian-vector products used.
        converged: Whether the last one changed it by less than the tolerance.
        reason: Why there is none, or "".
    """

    value: float
    steps: int
    converged: bool
    reason: str = ""

    @property
    def critical_lr(self) -> float:
        """2 / lambda_max: above it plain gradient descent leaves a quadratic bowl; NaN if unknown.

        The estimate of lambda_max comes from below, so this one from above. With Polyak momentum m
        the bound is (1 + m) times as large, with Nesterov's (1 + m) / (1 + 2 m) times. Source:
        Cohen et al. 2021, arXiv:2103.00065, section 2 and appendix B. A network is not quadratic
        bowl: up to about twice the bound the loss can rise first and recover (Lewkowycz et al.
        2020, arXiv:2003.02218).
        """
        return 2 / self.value if self.value > 0 else math.nan


def largest_curvature(
    loss: Tensor,
    parameters: Sequence[Tensor],
    *,
    steps: int = 12,
    tolerance: float = 0.02,
    seed: int = 0,
) -> Curvature:
    """Largest eigenvalue of d2 loss / d parameters2, by Lanczos iteration.

    Two vectors of the size of the parameters are kept, without reorthogonalisation, which only
    repeats eigenvalues that have converged. It begins halfway between the gradient, which lies
    mostly in the directions of large curvature, and a random vector.

    Args:
        loss: A scalar with a graph; the graph is used up.
        parameters: What it is differentiated by.
        steps: Hessian-vector products at most.
        tolerance: Relative change of the estimate at which it stops.
        seed: Of the random half; the global random state is not touched.

    >>> x = torch.tensor([1.0, 1.0, 1.0], requires_grad=True)
    >>> found = largest_curvature((torch.tensor([1.0, 3.0, 10.0]) * x**2).sum() / 2, [x])
    >>> round(found.value, 4), found.converged
    (10.0, True)
    """
    try:
        gradient = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        pairs = [(g, p) for g, p in zip(gradient, parameters, strict=True) if g is not None]
        used = [(g, p) for g, p in pairs if g.requires_grad]
        if not used:
            return Curvature(value=math.nan, steps=0, converged=False, reason="the loss is linear")
        found = _lanczos([g for g, _ in used], [p for _, p in used], steps, tolerance, seed)
    except (RuntimeError, NotImplementedError) as error:
        reason = " ".join(f"no second derivative: {error}".split())[:200]
        return Curvature(value=math.nan, steps=0, converged=False, reason=reason)
    if not found.reason and not found.value > 0:
        reason = "no positive curvature was found, or an operation hides its second derivative"
        return replace(found, reason=reason)
    return found


def _lanczos(
    gradient: list[Tensor], parameters: list[Tensor], steps: int, tolerance: float, seed: int
) -> Curvature:
    vector, before = _begin(gradient, seed), list[Tensor]()
    alphas, betas, estimate = list[float](), list[float](), math.nan
    for step in range(1, steps + 1):
        product = torch.autograd.grad(
            gradient, parameters, vector, retain_graph=True, allow_unused=True
        )
        image = [
            torch.zeros_like(v) if h is None else h for h, v in zip(product, vector, strict=True)
        ]
        alphas.append(_dot(image, vector))
        torch._foreach_add_(image, vector, alpha=-alphas[-1])
        if before:
            torch._foreach_add_(image, before, alpha=-betas[-1])
        size = math.sqrt(_dot(image, image)) if math.isfinite(alphas[-1]) else math.nan
        if not math.isfinite(size):
            reason = "its numbers are beyond the range of the weights' type"
            return Curvature(value=math.nan, steps=step, converged=False, reason=reason)
        last, estimate = estimate, _top(alphas, betas)
        change = abs(estimate - last) if step > 1 else math.inf
        if change <= tolerance * abs(estimate) or size <= 1e-6 * abs(estimate):
            return Curvature(value=estimate, steps=step, converged=True)
        betas.append(size)
        before, vector = vector, [x / size for x in image]
    return Curvature(value=estimate, steps=steps, converged=False)


def _begin(gradient: list[Tensor], seed: int) -> list[Tensor]:
    """A unit vector, half the gradient's direction and half a random one."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(g.shape, generator=generator).to(g) for g in gradient]
    start = [g.detach().clone() for g in gradient]
    length = math.sqrt(_dot(start, start))
    if 0 < length < math.inf:
        scale = math.sqrt(_dot(noise, noise))
        start = [g / length + n / scale for g, n in zip(start, noise, strict=True)]
    else:
        start = noise
    length = math.sqrt(_dot(start, start))
    return [x / length for x in start]


def _dot(left: list[Tensor], right: list[Tensor]) -> float:
    """Inner product in float64: squares of float32 overflow early."""
    return float(sum((a.double() * b.double()).sum() for a, b in zip(left, right, strict=True)))


def _top(alphas: list[float], betas: list[float]) -> float:
    """Largest eigenvalue of the tridiagonal matrix."""
    matrix = np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1)
    return float(np.linalg.eigvalsh(matrix)[-1])


RISE = 1.5
"""Factor on the loss of the batch, by its own first step, at which the rate is called critical.

Observed on runs of a and b at depths 20 and 56, two seeds each, not derived: at half the rate every
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
    start = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def move(size: float) -> None:
        for p, before, g in zip(parameters, start, gradient, strict=True):
            p.copy_(before - size * g)

    @torch.no_grad()
    def stays_below(rate: float) -> bool:
        move(rate * (1 + momentum))
        return float(F.cross_entropy(model(images), labels)) < limit  # NaN is not

    try:
        return _bisect(stays_below, 2.0**-8 / norm)
    finally:
        move(0.0)


def _bisect(stays_below: Callable[[float], bool], low: float) -> float:
    """The smallest rate that does not stay below the limit, from a far too small one upwards."""
    for _ in range(_SPAN):
        if not stays_below(2 * low):
            break
        low *= 2
    else:
        return math.inf
    high = 2 * low
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        if stays_below(middle):
            low = middle
        else:
            high = middle
    return high
