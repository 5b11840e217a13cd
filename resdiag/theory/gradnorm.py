"""The norm of all parameter gradients of a and b at initialisation, and the learning rate above it.

Deep in an un-normalised network images and positions have become alike, so that a convolution's
gradient is one outer product, |dL/dW|^2 = 9 C p_W E[input^2] |G|^2 with G the gradient summed over
images and positions; going back a block multiplies |G|^2 like the gradient's energy. The logits are
large, hence all images get one class: |p - y|^2 = .9^2 + 9 x .1^2 for ten classes. Classifier:
U(+-1/sqrt(C)), variance 1 / 3C (PyTorch's default).
"""

import numpy as np

from resdiag.theory.geometry import STAGES, block_shapes
from resdiag.theory.moments import elu_second_moment, elu_slope_sq
from resdiag.theory.prediction import Prediction

_WIDTHS = (16, 32, 64)
_TAPS = 9


def gradient_norm(theory: Prediction, width_px: int = 32, classes: int = 10) -> float | None:
    """||g_0||, the root of all squared parameter gradients; None except for a and b.

    Of the right power, and within a factor of a few, as the gradient's growth in a is a lower
    bound and images are not wholly alike at depth 20.
    """
    if theory.variant not in ("elu_nobn", "elu_pre"):
        return None
    pre = theory.variant == "elu_pre"
    shapes = block_shapes(theory.depth, width_px)
    channels = _WIDTHS[STAGES - 1]
    pooled = float(theory.second_moment[-1])
    head = float(elu_slope_sq(pooled)) if pre else 1.0
    if pre:
        pooled = float(elu_second_moment(pooled))
    kick = (1 - 1 / classes) ** 2 + (classes - 1) / classes**2
    total = kick * channels * pooled
    energy = kick / 3 * head
    before = np.append(theory.s0, theory.second_moment[:-1])
    for index in range(len(shapes) - 1, -1, -1):
        shape, s = shapes[index], float(before[index])
        outputs = _WIDTHS[shape.stage]
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
        energy *= float(theory.grad_growth[index])
    return float(np.sqrt(total))
