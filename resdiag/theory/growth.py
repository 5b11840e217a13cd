"""Un-normalised residual sums (a, b): the second moment grows geometrically with the block.

s = E[H^2] and m = E[H] over batch and channels at each position; M, mu the moments of
`resdiag.theory.moments`; K the mean over the nine taps, zeros outside (`geometry`); k = 1, or 1/2
at a stage change, the share of the shortcut's channels that option A keeps.

    a:  q1 = 2k K s,     q2 = 2 K M(q1),  s' = k s + M(q2) + 2 k m mu(q2),  m' = k m + mu(q2)
    b:  q1 = 2k K M(s),  q2 = 2 K M(q1),  s' = k s + q2,                    m' = k m

The branch of a has a positive mean, so means add coherently: without border its factor tends to
2.90 per block (kappa = m / sqrt(s) = .80). b ends with a convolution of fresh weights, mean 0: its
factor tends to 2. Source: mean field, Yang & Schoenholz 2017, arXiv:1712.08969; the x2 of b is
Zhang et al. 2019, arXiv:1901.09321 (Fixup) and De & Smith 2020, arXiv:2002.10444.

Of few channels the typical network grows more slowly than the mean over networks: the logarithm of
a random factor is on average half its relative variance below that of the mean (Hanin 2018,
arXiv:1801.03744). The variance per block is (terms of order 1) / channels where all positions are
alike; where they are not it averages out, so it is multiplied by rho, the correlation of two
positions. Nothing is fitted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from resdiag.models.variants import STAGE_CHANNELS
from resdiag.theory.geometry import BlockShape, ConvTaps, uniform
from resdiag.theory.moments import (
    Array,
    elu_cubed,
    elu_fourth,
    elu_kernel,
    elu_mean,
    elu_second_moment,
)


@dataclass(frozen=True, kw_only=True)
class Level:
    """One block as the signal passes it; maps over positions unless said otherwise.

    Attributes:
        shape: The block's shape.
        into: ConvTaps of the first convolution.
        within: ConvTaps of the second.
        channels: Channels of the output, a number.
        s: E[H^2] at the input.
        m: E[H] at the input.
        q1: Variance of the first convolution's output.
        q2: Of the second's.
        skip_s: E[h^2] of the shortcut.
        skip_m: E[h] of the shortcut.
        branch: E[F^2].
        after_s: E[H'^2] of the typical network.
        after_m: E[H'].
        narrow: The factor on E[H'^2] that few channels cost, a number.
    """

    shape: BlockShape
    into: ConvTaps
    within: ConvTaps
    channels: float
    s: Array
    m: Array
    q1: Array
    q2: Array
    skip_s: Array
    skip_m: Array
    branch: Array
    after_s: Array
    after_m: Array
    narrow: float = 1.0


def grow(
    shapes: Sequence[BlockShape],
    s0: float,
    m0: float,
    *,
    pre: bool,
    width: float = 1.0,
    width_px: int = 32,
) -> list[Level]:
    """Carry s and m through all blocks of a or b.

    Args:
        shapes: The blocks.
        s0: E[H_0^2] at the stem's output.
        m0: E[H_0] there.
        pre: Whether the ELUs stand before the convolutions (b), not behind them (a).
        width: Multiple of the 16/32/64 channels; infinity is the mean over networks.
        width_px: Width of the images.
    """
    levels = list[Level]()
    size, channels = width_px, STAGE_CHANNELS[0] * width
    s, m, shared = uniform(size, s0), uniform(size, m0), m0**2
    for shape in shapes:
        stride = 2 if shape.transition else 1
        into = ConvTaps(size=size, stride=stride)
        size, channels = max(1, size // stride), channels * stride
        level = _pass(pre, shape, into, ConvTaps(size=size), channels, s, m)
        rho = shared / float(s.mean())
        shared = _shared(pre, level, shared)
        level = _narrowed(level, rho * _scatter(pre, level) / channels)
        shared *= level.narrow
        s, m = level.after_s, level.after_m
        levels.append(level)
    return levels


def columns(levels: Sequence[Level]) -> dict[str, Array]:
    """Means over positions, one value per block."""

    def means(name: str) -> Array:
        return np.array([float(getattr(level, name).mean()) for level in levels])

    return {
        "second_moment": means("after_s"),
        "mean": means("after_m"),
        "branch_ratio": np.sqrt(means("branch") / means("skip_s")),
    }


def _pass(
    pre: bool,
    shape: BlockShape,
    into: ConvTaps,
    within: ConvTaps,
    channels: float,
    s: Array,
    m: Array,
) -> Level:
    """One block, of infinitely many channels."""
    q1 = 2 * shape.kept * into.gather(elu_second_moment(s) if pre else s)
    q2 = 2 * shape.dose * within.gather(elu_second_moment(q1))
    kept = slice(None, None, into.stride)
    skip_s, skip_m = shape.kept * s[kept, kept], shape.kept * m[kept, kept]
    branch = q2 if pre else elu_second_moment(q2)
    mean = np.zeros_like(q2) if pre else elu_mean(q2)
    return Level(
        shape=shape, into=into, within=within, channels=channels, s=s, m=m, q1=q1, q2=q2,
        skip_s=skip_s, skip_m=skip_m, branch=branch,
        after_s=skip_s + branch + 2 * skip_m * mean, after_m=skip_m + mean,
    )  # fmt: skip


def _narrowed(level: Level, variance: float) -> Level:
    """The typical network: E[log x] = log E[x] - variance / 2."""
    factor = float(np.exp(-variance / 2))
    return replace(
        level,
        after_s=level.after_s * factor,
        after_m=level.after_m * np.sqrt(factor),
        narrow=factor,
    )


def _shared(pre: bool, level: Level, shared: float) -> float:
    """E[H(x) H(x')] of two far positions behind the block, at their mean scale."""
    s, q1, q2, skip_m = (float(getattr(level, n).mean()) for n in ("s", "q1", "q2", "skip_m"))
    arriving = elu_kernel(s, shared) if pre else shared
    first = q1 * arriving / float(elu_second_moment(s) if pre else s)
    second = q2 * elu_kernel(q1, first) / float(elu_second_moment(q1))
    if pre:
        return level.shape.kept * shared + second
    mean = float(elu_mean(q2))
    return level.shape.kept * shared + elu_kernel(q2, second) + 2 * skip_m * mean


def _scatter(pre: bool, level: Level) -> float:
    """Relative variance of E[H'^2] / E[H^2] over networks, times the channels.

    The first layer scatters E[F^2] by the relative variance of phi^2, the last one by that of
    (h + F)^2 given h. b's branch begins with phi(H), which scatters too, given E[H^2]: 2 of the
    relative variance of H^2 are E[H^2] itself.
    """
    q1, q2, s, m = (float(getattr(level, n).mean()) for n in ("q1", "q2", "skip_s", "skip_m"))
    after = float(level.after_s.mean())
    first = _relative_variance(q1)
    if pre:
        before = _relative_variance(float(level.s.mean())) - 2
        return ((q2**2 * (first + before)) + 2 * q2**2 + 4 * s * q2) / after**2
    mean, moment = float(elu_mean(q2)), float(elu_second_moment(q2))
    last = float(elu_fourth(q2)) - moment**2 + 4 * (s * moment - (m * mean) ** 2)
    last += 4 * m * (float(elu_cubed(q2)) - mean * moment)
    return ((moment + m * mean) ** 2 * first + last) / after**2


def _relative_variance(q: float) -> float:
    return float(elu_fourth(q) / elu_second_moment(q) ** 2) - 1
