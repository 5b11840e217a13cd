"""What theory predicts for a network at initialisation, before any training: no constant is fitted.

`predict` asks the law that a variant names (`resdiag.theory.laws`); laws hold for Gaussian
pre-activations and He's initialisation, the normalised ones for wide layers.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from resdiag.errors import UsageError
from resdiag.models.variants import STAGE_CHANNELS, Variant, find_variant
from resdiag.theory.geometry import block_shapes, padding_share
from resdiag.theory.laws import LAWS, Law, Start
from resdiag.theory.moments import ACTIVATIONS, Array

CRITICAL = 0.6
"""lr ||g_0|| below which 28 of 28 runs of a and b lived 50 steps, and above which 7 of 68 did.

Runs of the study explosion. The 7 had 0.75 to 4.3; a branch that is scaled down at a high learning
rate can die below it."""

_STEM_FAN_RATIO = 3 / STAGE_CHANNELS[0]  # input over output channels of the stem's convolution


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """Predicted statistics at initialisation; arrays of one value per block, NaN where unknown.

    Attributes:
        variant: Id in the variants table.
        depth: 6n+2.
        branch_scale: Factor on the second convolution's weights.
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
        basis: The law and its source, one sentence; or why there is none.
    """

    variant: str
    depth: int
    branch_scale: float
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
    branch_scale: float = 1.0,
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
        branch_scale: Factor on the second convolution's weights; a and b only, of the others
            nothing is predicted unless it is 1.

    Raises:
        UsageError: Unknown variant, a depth other than 6n+2, or an s0 that no stem gives.

    >>> b = predict("b", 110)
    >>> round(b.growth_per_block, 2), f"{b.second_moment[-1]:.0e}"
    (1.83, '5e+13')
    """
    row = find_variant(variant)
    law = LAWS.get(row.law)
    scaled = branch_scale != 1
    if law and scaled and not law.holds_scaled:
        law = None
    shapes = block_shapes(depth, width_px, branch_scale=branch_scale)
    if s0 is None:
        s0 = stem_second_moment(row, width_px)
    largest = law.largest if law else sys.float_info.max
    if not 0 < s0 <= largest:
        raise UsageError(f"second moment {s0:g} at the stem must be in (0, {largest:g}]")
    if m0 is None:
        m0 = _stem_mean(row, s0)
    start = Start(
        shapes=shapes, s0=s0, m0=m0, variances=variances, width=width, width_px=width_px
    )  # fmt: skip
    arrays = _columns(law, start)
    return Prediction(
        variant=row.id,
        depth=depth,
        branch_scale=branch_scale,
        s0=s0,
        m0=m0,
        growth_per_block=float(np.exp(np.log(arrays["forward_growth"]).mean())),
        gradient_ratio=float(np.exp(np.log(arrays["grad_growth"]).sum() / 2)),
        basis=law.basis if law else _no_law(row, scaled=scaled),
        **arrays,
    )


def predict_run(
    config: Any,  # noqa: ANN401 - of a run of ours or of any other model
    blocks: Sequence[Mapping[str, Any]],
    *,
    s0: float = math.nan,
    m0: float = math.nan,
) -> Prediction | None:
    """Predict the statistics of a run's network at initialisation, on the run's own input.

    Args:
        config: The run's settings; read are its variant, its depth, its width and the scale of its
            branches.
        blocks: The run's descriptions of its blocks; the first one's shape is that of the images.
        s0: E[H_0^2] measured at the stem's output at step 0; NaN if the run has none.
        m0: E[H_0] measured there; NaN if the run has none.

    Returns:
        None where theory says nothing: another model, a depth other than 6n+2, a variant without
        a law, or scaled branches where its law does not hold for them.
    """
    shape = blocks[0].get("shape") if blocks else None
    width_px = int(shape[-1]) if isinstance(shape, list | tuple) and len(shape) == 3 else 32
    known = math.isfinite(s0) and s0 > 0
    try:
        row = find_variant(str(config.variant))
        law, scale = LAWS.get(row.law), float(getattr(config, "branch_scale", 1.0))
        if law is None or not (scale == 1 or law.holds_scaled):
            return None
        return _predict_once(
            row,
            int(config.depth),
            s0 if known else None,
            m0 if known and math.isfinite(m0) else None,
            float(getattr(config, "width", 1.0)),
            width_px,
            scale,
            law,
        )
    except UsageError:
        return None


@lru_cache(maxsize=256)
def _predict_once(
    row: Variant,
    depth: int,
    s0: float | None,
    m0: float | None,
    width: float,
    width_px: int,
    branch_scale: float,
    law: Law,
) -> Prediction:
    """`predict`, whose cache tells apart what was registered under the same name."""
    return predict(
        row.id, depth, s0=s0, m0=m0, width=width, width_px=width_px, branch_scale=branch_scale
    )


def gradient_norm(theory: Prediction, width_px: int = 32, classes: int = 10) -> float | None:
    """||g_0||, the root of all squared parameter gradients; None where the law does not say it.

    It takes images for alike and logits for large, which they are not where branches are scaled.

    Args:
        theory: Of the network.
        width_px: Width of the images.
        classes: Of the classifier.
    """
    law = LAWS.get(find_variant(theory.variant).law)
    if law is None or law.gradient_norm is None or theory.branch_scale != 1:
        return None
    moments = np.append(theory.s0, theory.second_moment)
    shapes = block_shapes(theory.depth, width_px)
    return law.gradient_norm(shapes, moments, theory.grad_growth, classes)


def stem_second_moment(row: Variant, width_px: int = 32) -> float:
    """E[H_0^2] behind the stem, a 3x3 convolution from 3 to 16 channels with He's fan_out init.

    q = 2 (3/16) p_W for E[x^2] = 1, then M(q) if an activation follows; q = 1 behind BatchNorm.
    """
    steps = row.stem.split("-")
    q = 1.0 if "bn" in steps else 2 * _STEM_FAN_RATIO * padding_share(width_px)
    return float(ACTIVATIONS[steps[-1]].second_moment(q)) if steps[-1] in ACTIVATIONS else q


def critical_lr(grad_norm: float) -> float:
    """0.6 / ||g_0||, a rule of thumb: see `CRITICAL`.

    Observed, not derived: on a and b with He's initialisation.

    >>> critical_lr(1.2e6)
    5e-07
    """
    return CRITICAL / grad_norm if grad_norm > 0 else math.inf


_ARRAYS = tuple(
    name for name, kind in Prediction.__annotations__.items() if kind is Array or kind == "Array"
)


def _columns(law: Law | None, start: Start) -> dict[str, Array]:
    """All arrays of a prediction, NaN where the law does not say them."""
    found = law.columns(start) if law else {}
    arrays = {name: found.get(name, start.constant(math.nan)) for name in _ARRAYS}
    if "forward_growth" not in found:
        before = np.append(start.s0, arrays["second_moment"][:-1])
        arrays["forward_growth"] = arrays["second_moment"] / before
    return arrays


def _no_law(row: Variant, *, scaled: bool) -> str:
    """Why there is no prediction."""
    if scaled and row.law in LAWS:
        return f"the law '{row.law}' of variant {row.id} does not hold for scaled branches"
    if not row.law:
        return f"variant {row.id} names no law of resdiag.theory: nothing is predicted"
    return f"variant {row.id} names the law '{row.law}', which is not registered"


def _stem_mean(row: Variant, s0: float) -> float:
    """E[H_0] of phi(N(0, q)) with second moment s0."""
    activation = ACTIVATIONS.get(row.stem.split("-")[-1])
    return float(activation.mean(activation.input_variance(s0))) if activation else 0.0
