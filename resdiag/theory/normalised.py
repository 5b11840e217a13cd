"""BatchNorm on the branch: its output has unit variance for any input, so growth is linear.

Backward, BatchNorm divides by the centred standard deviation of its input: a mean that is the same
for all samples does not count, so bias shift makes the branch's gradient gain larger. Source:
De & Smith 2020, arXiv:2002.10444; Yang et al. 2019, arXiv:1902.08129.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resdiag.theory.geometry import BlockShape, ConvTaps, uniform
from resdiag.theory.moments import ACTIVATIONS, Array, elu_second_moment, elu_slope_sq

# slope over centred second moment of BN-ReLU: (1/2) / (1/2 - 1/2pi) = pi / (pi - 1)
BN_RELU_GAIN = np.pi / (np.pi - 1)
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(60)


@dataclass(frozen=True, kw_only=True)
class NormalisedBranch:
    """A branch with BatchNorm in front of every activation, or one that ends with BatchNorm.

    Attributes:
        inner: Activation between the convolutions: relu behind a BatchNorm, or elu without one.
        first: Whether BatchNorm and activation stand before the convolutions (BN-ReLU-conv), so
            that BatchNorm meets the block's input itself; else BatchNorm ends the branch.
    """

    inner: str = "relu"
    first: bool = False

    def moments(self, shape: BlockShape) -> tuple[float, float]:
        """E[F^2] and its part within channels."""
        if not self.first:
            return 1.0, 1.0
        relu = ACTIVATIONS["relu"]
        return (
            shape.gain2 * float(relu.second_moment(1.0)),
            shape.gain2 * float(relu.variance(1.0)),
        )

    def gain(self, shape: BlockShape, s: float, mean_sq: float) -> float:
        """G = |dF/dx^T g|^2 / |g|^2.

        conv-BN-ReLU-conv-BN (original, no_relu):  G = (pi / (pi - 1)) / Var(x)
        conv-ELU-conv-BN (c, d):                   G = g1 D(g1 s) / Var[ELU(conv x)]
        BN-ReLU-conv-BN-ReLU-conv (relu_pre):      G = p_W (pi / (pi - 1)) / Var(x)

        Var = s - mean_sq is the variance within a channel, averaged over channels (harmonically for
        relu_pre, which normalises x channel by channel); the gains of convolutions cancel against
        the BatchNorm behind them. For c and d, g1 s is the variance of the inner pre-activation, of
        which g1 mean_sq lies between channels. For large s and no mean, d's gain is 1.47 / s.

        Args:
            shape: The block.
            s: E[x^2].
            mean_sq: Average channel squared mean of x, E[x^2] - Var.
        """
        variance = s - mean_sq
        if self.inner == "elu":
            inner = _elu_channel_variance(shape.gain1 * mean_sq, shape.gain1 * variance)
            return shape.gain1 * float(elu_slope_sq(shape.gain1 * s)) / inner
        return (shape.share2 if self.first else 1.0) * BN_RELU_GAIN / variance


@dataclass(frozen=True, kw_only=True)
class _Signal:
    """Moments of a block's input; one entry per group of channels that appeared at one stage."""

    s: float
    m: float
    shares: Array
    variances: Array

    def harmonic_variance(self) -> float:
        return float(1 / (self.shares / self.variances).sum())

    def after(self, kept: float, branch: float, centred: float) -> "_Signal":
        """The sum H' = k H + F; at a stage change a group of appended channels."""
        shares, variances = self.shares, self.variances
        if kept < 1:
            shares = np.append(shares * kept, 1 - kept)
            variances = np.append(variances, 0.0)
        return _Signal(
            s=kept * self.s + branch, m=kept * self.m, shares=shares, variances=variances + centred
        )


def sum_normalised(
    unit: NormalisedBranch,
    shapes: Sequence[BlockShape],
    s0: float,
    m0: float,
    variances: Sequence[float] = (),
) -> dict[str, Array]:
    """No activation on the skip path (d, no_relu, relu_pre): H_l = k H_{l-1} + F_l.

    s' = k s + q2 with q2 = 1 if the branch ends with BatchNorm (d: E[H^2] = s_0 + l in stage 1),
    q2 = 2 p_W M(1) = p_W if it ends with a convolution behind BN-ReLU; m' = k m.
    |g_{l-1}|^2 / |g_l|^2 = k + G, so a power of the depth. Images whose pixels are alike leave the
    stem's channels with very different variances; relu_pre divides the gradient of each by its
    own, so `variances`, those of the stem's channels, matter to it.
    """
    within = np.array(variances, float) if len(variances) else np.array([s0 - m0**2])
    signals = [_Signal(s=s0, m=m0, shares=np.full(len(within), 1 / len(within)), variances=within)]
    ratios = []
    for shape in shapes:
        branch, centred = unit.moments(shape)
        ratios.append(np.sqrt(branch / (shape.kept * signals[-1].s)))
        signals.append(signals[-1].after(shape.kept, branch, centred))
    return {
        "second_moment": np.array([signal.s for signal in signals[1:]]),
        "mean": np.array([signal.m for signal in signals[1:]]),
        "branch_ratio": np.array(ratios),
        "grad_growth": _backward(unit, shapes, signals),
    }


def _backward(
    unit: NormalisedBranch, shapes: Sequence[BlockShape], signals: Sequence[_Signal]
) -> Array:
    """Squared gradient per unit and channel group, carried from the last block to the first."""
    growth = np.empty(len(shapes))
    energy = np.ones(len(signals[-1].shares))
    for index in range(len(shapes) - 1, -1, -1):
        shape, before, after = shapes[index], signals[index], signals[index + 1]
        total = float(after.shares @ energy)
        # per unit: at a transition one position of four is kept and units halve in number
        kept, units = (0.25, 2.0) if shape.transition else (1.0, 1.0)
        if unit.first:
            # BatchNorm meets x itself: each channel's gradient is divided by its own variance
            mean_variance = before.harmonic_variance()
            spread = mean_variance / before.variances
        else:
            mean_variance = float(before.shares @ before.variances)
            spread = np.ones(len(before.shares))
        gain = unit.gain(shape, before.s, before.s - mean_variance)
        energy = kept * energy[: len(spread)] + gain * total * spread / units
        growth[index] = units * float(before.shares @ energy) / total
    return growth


def stack_plain(shapes: Sequence[BlockShape], width_px: int = 32) -> dict[str, Array]:
    """No shortcut: BatchNorm resets the signal in every block, H = ReLU(N(0, 1)).

    E[H^2] = 1/2 and E[H] = 1/sqrt(2 pi) in every block; the squared gradient grows by
    (pi / (pi - 1))^2 = 2.15 per block, by pi / (pi - 1) per BN-ReLU layer
    (Yang et al. 2019, arXiv:1902.08129: batch normalisation makes plain networks' gradients
    explode), at infinite width and batch and without a border. With one it is less, 1.88 on 8 x 8:
    where taps see zeros they miss the positive mean of the ReLU, a pattern over positions that
    BatchNorm counts as variance.

    All samples are taken to keep the same energy. They do not: one of energy q among others of 1
    goes to q + (sqrt(q) - 1)^2 / (pi - 1) per layer, so the largest comes to dominate the batch and
    the divisor. At depth 110 the predicted ratio ||g_0|| / ||g_L|| is 7 times too large for it.
    """
    layers = list[tuple[ConvTaps, float]]()
    size = width_px
    s, m = uniform(size, 0.5), uniform(size, np.sqrt(0.5 / np.pi))
    for shape in shapes:
        for stride in (2 if shape.transition else 1, 1):
            taps = ConvTaps(size=size, stride=stride)
            size = max(1, size // stride)
            variance, normed = _normalise(taps, s, m)
            layers.append((taps, variance))
            s, m = normed / 2, np.sqrt(normed / (2 * np.pi))
    growth, energy = np.empty(len(shapes)), uniform(size, 1.0)
    for index in range(len(shapes) - 1, -1, -1):
        total, transition = float(energy.mean()), shapes[index].transition
        for taps, variance in (layers[2 * index + 1], layers[2 * index]):
            energy = taps.scatter(energy / 2) / variance
        # sums over channels, means over positions: there are four times as many before a transition
        growth[index] = float(energy.mean()) / total * (4.0 if transition else 1.0)
    ones = np.ones(len(shapes))
    relu = ACTIVATIONS["relu"]
    return {
        "second_moment": float(relu.second_moment(1.0)) * ones,
        "mean": float(relu.mean(1.0)) * ones,
        "grad_growth": growth,
    }


def _normalise(taps: ConvTaps, s: Array, m: Array) -> tuple[float, Array]:
    """A convolution behind which BatchNorm stands, of weights with mean square 1 / fan-in.

    Returns:
        Its variance within a channel, over positions and samples, and the map of E[z^2] once
        it has been divided by it. The mean over samples differs from position to position.
    """
    means = taps.seen(m)
    centres = [float(mean.mean()) for mean in means]
    moment = taps.gather(s)
    pattern = sum(mean * centre for mean, centre in zip(means, centres, strict=True)) / 9
    centre = sum(c**2 for c in centres) / 9
    variance = float(moment.mean()) - centre
    return variance, (moment - 2 * pattern + centre) / variance


def _elu_channel_variance(between: float, within: float) -> float:
    """Var[ELU(a + sqrt(within) z)] over z, averaged over channel means a ~ N(0, between)."""
    means = ACTIVATIONS["elu"].shifted_mean(np.sqrt(between) * _NODES, within)
    squared_mean = float((_WEIGHTS * means**2).sum() / _WEIGHTS.sum())
    return float(elu_second_moment(between + within)) - squared_mean
