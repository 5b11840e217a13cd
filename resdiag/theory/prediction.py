"""What theory predicts for a network at initialisation, before any training: no constant is fitted.

The laws are in `growth` and `coherence` (a, b), `normalised` (d, no_relu, relu_pre, plain) and
`walk` (original, c, relu_nobn); they hold for Gaussian pre-activations and He's initialisation, the
normalised ones for wide layers.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resdiag.errors import UsageError
from resdiag.models.variants import Variant, find_variant
from resdiag.theory.coherence import grow_back
from resdiag.theory.geometry import BlockShape, block_shapes, padding_share
from resdiag.theory.growth import columns as growth_columns
from resdiag.theory.growth import grow
from resdiag.theory.moments import ACTIVATIONS, Array
from resdiag.theory.normalised import stack_plain, sum_normalised
from resdiag.theory.walk import walk

CRITICAL = 0.6
"""lr ||g_0|| above which no run has survived (28 runs of a and b, none in .6 ... 1.07)."""

_LARGEST_WALK = 1e3  # the grid grows with its root; a stem on normalised images gives .1 ... 1
_STEM_FAN_RATIO = 3 / 16  # input channels over output channels of the stem's convolution

_UNNORMALISED = (
    "un-normalised residual sum: the second moment is multiplied in every block by the recursion "
    "of resdiag.theory.growth (Zhang et al. 2019 (Fixup); De & Smith 2020), the gradient by that "
    "of resdiag.theory.coherence, which keeps its part along the signal"
)
_NORMALISED = (
    "BatchNorm ends the branch and nothing stands on the skip path: E[H^2] grows by a constant per "
    "block (De & Smith 2020)"
)
_WALK = (
    "scalar walk per unit with an activation after the addition, evolved exactly "
    "(resdiag.theory.walk; Sparre Andersen 1954 for its skip gain)"
)
_BASIS = {
    "elu_nobn": _UNNORMALISED,
    "elu_pre": _UNNORMALISED,
    "relu_nobn": _WALK + "; its step grows with the signal, so E[H^2] grows geometrically",
    "relu_pre": _NORMALISED,
    "plain": "BatchNorm and no shortcut: E[H^2] is 1/2 in every block, the squared gradient grows "
    "by (pi/(pi-1))^2 per block, less at the border (Yang et al. 2019, mean field of BatchNorm), "
    "if all samples keep the same energy: in deep networks one comes to dominate, and it is less",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """Predicted statistics at initialisation; arrays of one value per block, NaN where unknown.

    Attributes:
        variant: Id in the variants table.
        depth: 6n+2.
        s0: E[H_0^2] at the stem's output.
        m0: E[H_0] at the stem's output.
        second_moment: E[H^2] of the block's output.
        mean: E[H].
        forward_growth: E[H^2] / E[x^2].
        grad_growth: |g_{l-1}|^2 / |g_l|^2, squared norms of the gradient at input and output.
        skip_gain: P3 (ii), since the first block, on the channels that reach the stem.
        skip_gain_stage: P3 (i), since the stage's first block.
        perturbation: P1.
        identity_defect: P2.
        identity_drift: P4.
        attenuation: G5.
        branch_ratio: ||F|| / ||h||.
        negative_fraction: Share of u < 0.
        slope_mean: E[f'(u)].
        slope_mean_sq: E[f'(u)^2].
        growth_per_block: Geometric mean of forward_growth over all blocks, (s_L / s_0)^(1 / 3n);
            transitions, which append zeros and so halve E[H^2], are in it.
        gradient_ratio: ||g_0|| / ||g_L||, gradient at the first block's input over that at the last
            block's output.
        basis: The law and its source, one sentence.
    """

    variant: str
    depth: int
    s0: float
    m0: float
    second_moment: Array
    mean: Array
    forward_growth: Array
    grad_growth: Array
    skip_gain: Array
    skip_gain_stage: Array
    perturbation: Array
    identity_defect: Array
    identity_drift: Array
    attenuation: Array
    branch_ratio: Array
    negative_fraction: Array
    slope_mean: Array
    slope_mean_sq: Array
    growth_per_block: float
    gradient_ratio: float
    basis: str

    def series(self, metric: str) -> Array | None:
        """The prediction of a metric of `resdiag.catalog.table`, or None.

        >>> predict("d", 20).series("output_second_moment").shape
        (9,)
        >>> predict("d", 20).series("grad_param") is None
        True
        """
        name = {"output_second_moment": "second_moment", "output_mean": "mean"}.get(metric, metric)
        values = getattr(self, name, None)
        if not isinstance(values, np.ndarray) or np.isnan(values).all():
            return None
        return values


def predict(
    variant: str,
    depth: int,
    *,
    s0: float | None = None,
    m0: float | None = None,
    variances: Sequence[float] = (),
    width: float = 1.0,
    width_px: int = 32,
) -> Prediction:
    """Predict the statistics of a freshly initialised network.

    Args:
        variant: Id or letter.
        depth: 6n+2.
        s0: E[H_0^2] measured at the stem's output; None computes it for inputs of unit variance, 3
            channels and 16 stem channels.
        m0: E[H_0] measured there; None: 0 behind a convolution, else the mean that belongs to s0.
        variances: Of each of the stem's channels, over batch and positions, if they are known:
            relu_pre normalises the channels one by one.
        width: Multiple of the 16/32/64 channels; a and b only, the others do not depend on it.
            Infinity is the mean field.
        width_px: Width of the images.

    Raises:
        UsageError: Unknown variant, a depth other than 6n+2, or an s0 that no stem gives.

    >>> b = predict("b", 110)
    >>> round(b.growth_per_block, 2), f"{b.second_moment[-1]:.0e}"
    (1.83, '5e+13')
    """
    row = find_variant(variant)
    shapes = block_shapes(depth, width_px)
    if s0 is None:
        s0 = stem_second_moment(row, width_px)
    largest = _LARGEST_WALK if row.norm and row.after_add != "none" else sys.float_info.max
    if not 0 < s0 <= largest:
        raise UsageError(f"second moment {s0:g} at the stem must be in (0, {largest:g}]")
    if m0 is None:
        m0 = _stem_mean(row, s0)
    columns = _columns(row, shapes, s0, m0, variances, width, width_px)
    columns["forward_growth"] = columns["second_moment"] / np.append(
        s0, columns["second_moment"][:-1]
    )
    arrays = {name: columns.get(name, np.full(len(shapes), math.nan)) for name in _ARRAYS}
    return Prediction(
        variant=row.id,
        depth=depth,
        s0=s0,
        m0=m0,
        growth_per_block=float(np.exp(np.log(arrays["forward_growth"]).mean())),
        gradient_ratio=float(np.exp(np.log(arrays["grad_growth"]).sum() / 2)),
        basis=_BASIS.get(row.id, _NORMALISED if row.after_add == "none" else _WALK),
        **arrays,
    )


def stem_second_moment(row: Variant, width_px: int = 32, input_second_moment: float = 1.0) -> float:
    """E[H_0^2] behind the stem, a 3x3 convolution from 3 to 16 channels with He's fan_out init.

    q = 2 (3/16) p_W E[x^2], then M(q) if an activation follows; q = 1 behind BatchNorm.
    """
    steps = row.stem.split("-")
    q = 2 * _STEM_FAN_RATIO * padding_share(width_px) * input_second_moment
    if "bn" in steps:
        q = 1.0
    return float(ACTIVATIONS[steps[-1]].second_moment(q)) if steps[-1] in ACTIVATIONS else q


def head_kick(lr: float, momentum: float, mean: float, channels: int, gap: float) -> float:
    """How far the first SGD step with Nesterov momentum moves a mean logit.

    lr (1 + momentum) (||E_n hbar||^2 + 1) gap, with ||E_n hbar||^2 = channels mean^2: linear in
    depth for original and c, whose mean grows as the root of the depth. A heuristic for the first
    step only. Source: one step of SGD on the classifier.

    Args:
        lr: Learning rate.
        momentum: Nesterov momentum.
        mean: Mean of the pooled features.
        channels: Number of pooled features.
        gap: max_k |p_k - y_k|, batch means of probabilities and one-hot labels.

    >>> round(head_kick(0.1, 0.9, 3.8, 64, 0.1), 1)
    17.6
    """
    return lr * (1 + momentum) * (channels * mean**2 + 1) * gap


def critical_lr(grad_norm: float) -> float:
    """0.6 / ||g_0||: every run above it died, a necessary and not a sufficient condition.

    RunData, not derived: 28 runs of a and b with He's initialisation.

    >>> critical_lr(1.2e6)
    5e-07
    """
    return CRITICAL / grad_norm if grad_norm > 0 else math.inf


_ARRAYS = tuple(
    name for name, kind in Prediction.__annotations__.items() if kind is Array or kind == "Array"
)
_NO_ACTIVATION = {
    "skip_gain": 1.0,
    "skip_gain_stage": 1.0,
    "perturbation": 0.0,
    "identity_defect": 0.0,
    "identity_drift": 0.0,
    "attenuation": 1.0,
    "slope_mean": 1.0,
    "slope_mean_sq": 1.0,
}
"""Exact where nothing stands after the addition."""


def _columns(
    row: Variant,
    shapes: Sequence[BlockShape],
    s0: float,
    m0: float,
    variances: Sequence[float],
    width: float,
    width_px: int,
) -> dict[str, Array]:
    """The law of a variant, by the variants table."""
    if not row.shortcut:
        return stack_plain(shapes, width_px)
    if row.after_add != "none":
        return walk(row, shapes, s0)
    exact = {name: np.full(len(shapes), value) for name, value in _NO_ACTIVATION.items()}
    if row.norm:
        return exact | sum_normalised(row, shapes, s0, m0, variances)
    levels = grow(row.id, shapes, s0, m0, width=width, width_px=width_px)
    return exact | growth_columns(levels) | {"grad_growth": grow_back(row.id, levels)}


def _stem_mean(row: Variant, s0: float) -> float:
    """E[H_0] of phi(N(0, q)) with second moment s0."""
    activation = ACTIVATIONS.get(row.stem.split("-")[-1])
    return float(activation.mean(activation.input_variance(s0))) if activation else 0.0
