"""The gradient of a and b at initialisation: a recursion of its part along the signal and the rest.

At large scale such a network is positively homogeneous, H' (c H) = c H' (H), hence
<g_{l-1}, H_{l-1}> = <g_l, H_l> in every block (Euler; Zhang et al. 2019, arXiv:1901.09321, theorem
1): the gradient's component along H grows backwards as fast as ||H|| grows forwards, and feeds the
rest. So the gradient at a block's output is split, position by position, into

    g = a H + b 1 + e

and (a, b, |e|^2) is carried back. Through the shortcut H' = h + F: a and b stay, F's mean adds to
b, its scatter to e. Through the branch, given the signal, a row w of a convolution is z x/|x|^2
plus a part across x, so that the branch returns x times a number (the component of phi'(z) g along
phi(z), over |x|^2) and spreads the rest evenly: gates and weights independent of it, as
everywhere in mean field. For b, whose branch begins with phi(H), x phi'(H) is projected on H and 1.
Nothing is fitted. Two idealisations: logits are Gaussian given the pooled features, and the
fluctuations of |e| average out over samples and positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from resdiag.models.variants import STAGE_CHANNELS
from resdiag.theory.geometry import BlockShape
from resdiag.theory.growth import Level
from resdiag.theory.moments import (
    Array,
    elu_mean,
    elu_second_moment,
    elu_slope_sq,
    elu_sq_times_slope_sq,
    elu_times_slope,
    elu_times_slope_along,
    elu_times_slope_sq,
)
from resdiag.theory.sobol import sobol_points

_HALF_TAPS = 4.5
"""|x|^2 of a patch of nine taps over C q, under He's initialisation: 9 / 2."""
_LOG2_SAMPLES = 13
_TAPS = 9


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """g = a H + b 1 + e at each position.

    Attributes:
        along: a.
        level: b.
        rest: |e|^2, sum over channels.
    """

    along: Array
    level: Array
    rest: Array

    def energy(self, channels: float, s: Array, m: Array) -> float:
        """Mean over positions of |g|^2, for an H of these moments."""
        a, b = self.along, self.level
        return float((channels * (a * a * s + 2 * a * b * m + b * b) + self.rest).mean())


def grow_back(levels: Sequence[Level], *, pre: bool, classes: int = 10) -> Array:
    """|g_{l-1}|^2 / |g_l|^2 of every block, from the last to the first.

    Args:
        levels: Of `resdiag.theory.growth.grow`, of finite or infinite width.
        pre: Whether the ELUs stand before the convolutions (b), not behind them (a).
        classes: Of the classifier, whose weights are U(+-1/sqrt(C)) (PyTorch's default).
    """
    back = _back_pre if pre else _back_post
    # alone in infinitely many channels, and in the limit of an image without border
    alone = np.isinf(levels[-1].channels) or len(levels[-1].s) == 1
    if alone:
        levels = [replace(level, channels=1.0) for level in levels]
    last = levels[-1]
    gradient = _head(pre, last, classes, 0.0 if alone else 1.0)
    energy = gradient.energy(last.channels, last.after_s, last.after_m)
    growth = np.empty(len(levels))
    for index in range(len(levels) - 1, -1, -1):
        level = levels[index]
        inputs = level.channels * level.shape.kept
        # energies are means over positions and channels' sums; a stride quarters the positions
        gradient = back(level, _uncorrected(level, gradient))
        before = gradient.energy(inputs, level.s, level.m)
        growth[index] = before * level.into.stride**2 / energy
        energy = before
    return growth


def _uncorrected(level: Level, g: Gradient) -> Gradient:
    """As a function of the sum of an infinitely wide block: <g, H'> is what is kept."""
    return Gradient(
        along=g.along * level.narrow, level=g.level * np.sqrt(level.narrow), rest=g.rest
    )


def _back_post(level: Level, g: Gradient) -> Gradient:
    """Through H' = h + ELU(conv(ELU(conv H)))."""
    a, b, s, m, q2 = g.along, g.level, level.skip_s, level.skip_m, level.q2
    channels, inputs = level.channels, level.channels * level.shape.kept
    mean, moment = elu_mean(q2), elu_second_moment(q2)
    gated = a * a * elu_sq_times_slope_sq(q2) + 2 * a * (a * m + b) * elu_times_slope_sq(q2)
    gated = gated + elu_slope_sq(q2) * (a * a * s + 2 * a * b * m + b * b)
    inner = _Branch(
        along=channels * (a * (moment + mean * m) + b * mean),
        energy=channels * gated + elu_slope_sq(q2) * g.rest,
    )
    along, energy = inner.through(level)
    spread = inputs * a * a * (moment - mean**2)
    return Gradient(
        along=level.into.place(a) + along,
        level=level.into.place(b + a * mean),
        rest=level.into.place(level.shape.kept * g.rest + spread) + energy,
    )


def _back_pre(level: Level, g: Gradient) -> Gradient:
    """Through H' = h + conv(ELU(conv(ELU H)))."""
    a, b, q2 = g.along, g.level, level.q2
    channels, inputs = level.channels, level.channels * level.shape.kept
    coherent = a * a * (level.skip_s + q2) + 2 * a * b * level.skip_m + b * b
    inner = _Branch(along=channels * a * q2, energy=channels * coherent + g.rest)
    along, energy = inner.through(level)
    # along: coefficient of ELU(H) ELU'(H); on H, on 1, across both
    slope, offset = elu_times_slope_along(level.s), elu_times_slope(level.s)
    across = elu_sq_times_slope_sq(level.s) - slope**2 * level.s - offset**2
    rest = elu_slope_sq(level.s) * energy + inputs * along**2 * np.maximum(across, 0.0)
    return Gradient(
        along=level.into.place(a) + along * slope,
        level=level.into.place(b) + along * offset,
        rest=level.into.place(level.shape.kept * g.rest + inputs * a * a * q2) + rest,
    )


@dataclass(frozen=True, kw_only=True)
class _Branch:
    """A gradient at the second convolution's output.

    Attributes:
        along: <g, z>, its component along that output, sum over channels.
        energy: |g|^2.
    """

    along: Array
    energy: Array

    def through(self, level: Level) -> tuple[Array, Array]:
        """Back through conv(ELU(conv x)): coefficient of x, and the energy across it."""
        patch = _HALF_TAPS * level.channels
        dose = level.shape.dose
        # coefficient of ELU(z1): each position is seen by nine patches
        inner = 9 * level.within.scatter(self.along * dose / (patch * level.q2))
        moment = level.channels * elu_second_moment(level.q1)
        first = 9 * level.into.scatter(inner * moment / (patch * level.q1))
        gated = elu_slope_sq(level.q1) * 2 * dose * level.within.scatter(self.energy)
        gated = gated + inner**2 * level.channels * elu_sq_times_slope_sq(level.q1)
        return first, 2 * level.shape.kept * level.into.scatter(gated)


def _head(pre: bool, level: Level, classes: int, share: float) -> Gradient:
    """Back through pooling and classifier, split along the last block's output.

    `share` is 0 to leave out the part along it, else 1.

    The gradient of the pooled features hbar is W^T (p - y): its part along hbar is
    (p - y) . logits / |hbar|^2, the rest has 1 / 3C per channel and unit of |p - y|^2. Positions
    are taken as alike, as they are in a deep network.
    """
    s, channels = level.after_s, level.channels
    pooled = float((elu_second_moment(s) if pre else s).mean())
    pull, error = pull_of_logits(pooled / 3, classes)
    rest = np.full_like(s, error / 3)
    along = share * np.sqrt(pull) / (channels * pooled)
    if not pre:
        return Gradient(along=np.full_like(s, along), level=np.zeros_like(s), rest=rest)
    slope, offset = elu_times_slope_along(s), elu_times_slope(s)
    across = elu_sq_times_slope_sq(s) - slope**2 * s - offset**2
    return Gradient(
        along=along * slope,
        level=along * offset,
        rest=elu_slope_sq(s) * rest + channels * along**2 * np.maximum(across, 0.0),
    )


def pull_of_logits(variance: float, classes: int) -> tuple[float, float]:
    """E[((p - y) . z)^2] and E[|p - y|^2] for Gaussian logits z of this variance, by quadrature."""
    points = sobol_points(classes, _LOG2_SAMPLES)
    z = special.ndtri((points + 0.5 / 2**_LOG2_SAMPLES) % 1.0) * np.sqrt(variance)
    error = special.softmax(z, axis=1)
    error[:, 0] -= 1.0  # the label is independent of the weights: any class will do
    return float(((error * z).sum(axis=1) ** 2).mean()), float((error**2).sum(axis=1).mean())


def parameter_gradient_norm(
    shapes: Sequence[BlockShape], moments: Array, growth: Array, classes: int, *, pre: bool
) -> float:
    """||g_0||, the root of all squared parameter gradients of a or b.

    Deep in an un-normalised network images and positions have become alike, so that a convolution's
    gradient is one outer product, |dL/dW|^2 = 9 C p_W E[input^2] |G|^2 with G the gradient summed
    over images and positions; going back a block multiplies |G|^2 like the gradient's energy. The
    logits are large, hence all images get one class: |p - y|^2 = .9^2 + 9 x .1^2 for ten classes.

    Of the right power, and within a factor of a few, as the gradient's growth in a is a lower
    bound and images are not wholly alike at depth 20.

    Args:
        shapes: The blocks.
        moments: E[H^2] at the stem and behind every block.
        growth: |g_{l-1}|^2 / |g_l|^2 of every block.
        classes: Of the classifier, whose weights are U(+-1/sqrt(C)), of variance 1 / 3C.
        pre: Whether the ELUs stand before the convolutions (b), not behind them (a).
    """
    channels = STAGE_CHANNELS[-1]
    pooled = float(moments[-1])
    head = float(elu_slope_sq(pooled)) if pre else 1.0
    if pre:
        pooled = float(elu_second_moment(pooled))
    kick = (1 - 1 / classes) ** 2 + (classes - 1) / classes**2
    total = kick * channels * pooled
    energy = kick / 3 * head
    for index in range(len(shapes) - 1, -1, -1):
        shape, s = shapes[index], float(moments[index])
        outputs = STAGE_CHANNELS[shape.stage]
        inputs = outputs * shape.kept
        first = float(elu_second_moment(s)) if pre else s
        q1 = shape.gain1 * first
        second = float(elu_second_moment(q1))
        arriving = energy
        if not pre:
            arriving *= float(elu_slope_sq(shape.gain2 * second))
        total += _TAPS * outputs * shape.share2 * second * arriving
        inner = arriving * shape.gain2 * float(elu_slope_sq(q1))
        total += _TAPS * inputs * shape.share1 * first * inner
        energy *= float(growth[index])
    return float(np.sqrt(total))
