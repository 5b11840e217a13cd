"""The gradient of relu_nobn: a reflected walk whose steps grow with the signal is homogeneous too.

As in `resdiag.theory.gradient_recursion`, g = a H + b 1 + e is carried back, here on the walk's law
of H and without maps over positions: through u = h + F, F ~ N(0, sigma^2), H' = ReLU(u), a gradient
a H' + b on open gates is E[a ReLU(u) + b 1(u > 0) | h], projected on h and 1; what is across them,
and e where gates are open, is the new e. <g_l, H_l> is the same in every block. Nothing is fitted.
"""

from collections.abc import Sequence

import numpy as np
from scipy import special

from resdiag.models.variants import STAGE_CHANNELS
from resdiag.theory.geometry import BlockShape
from resdiag.theory.gradient_recursion import pull_of_logits
from resdiag.theory.moments import Array


def grow_back_reflected(
    laws: Sequence[tuple[Array, Array]],
    shapes: Sequence[BlockShape],
    sigmas: Sequence[float],
    gates: Array,
    classes: int = 10,
) -> Array:
    """|g_{l-1}|^2 / |g_l|^2 of every block of conv-ReLU-conv with a ReLU after the addition.

    Args:
        laws: Values of H and their masses: at the stem, then behind every block.
        shapes: The blocks.
        sigmas: Standard deviation of every block's branch.
        gates: Share of |e|^2 that passes the ReLU after the addition, from the walk.
        classes: Of the classifier.
    """
    values, masses = laws[-1]
    s, m = _moments(values, masses)
    pull, error = pull_of_logits(s / 3, classes)
    channels = STAGE_CHANNELS[-1]
    a, b, e = np.sqrt(pull) / (channels * s), 0.0, error / (3 * channels)
    energy = a * a * s + e
    growth = np.empty(len(shapes))
    for index in range(len(shapes) - 1, -1, -1):
        shape, law = shapes[index], laws[index]
        a, b, e = _through(law, shape, sigmas[index], float(gates[index]), (a, b, e))
        s, m = _moments(*law)
        before = a * a * s + 2 * a * b * m + b * b + e
        growth[index] = before / energy * (2.0 if shape.transition else 1.0)
        energy = before
    return growth


def _moments(values: Array, masses: Array) -> tuple[float, float]:
    return float(masses @ values**2), float(masses @ values)


def _through(
    law: tuple[Array, Array],
    shape: BlockShape,
    sigma: float,
    gate: float,
    gradient: tuple[float, float, float],
) -> tuple[float, float, float]:
    """(a, b, |e|^2 per unit) before a block from those behind it."""
    (h, masses), (a, b, e) = law, gradient
    s, m = _moments(h, masses)
    t = h / sigma
    opened, density = special.ndtr(t), np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi)
    mean = a * (h * opened + sigma * density) + b * opened  # E[(a u + b) 1(u > 0) | h]
    square = a * a * ((h**2 + sigma**2) * opened + h * sigma * density)
    square = square + 2 * a * b * (h * opened + sigma * density) + b * b * opened

    def everywhere(conditional: Array, appended: float) -> float:
        """Mean over all channels, of which option A appends some that are 0."""
        return shape.kept * float(masses @ conditional) + (1 - shape.kept) * appended

    none = 1 / np.sqrt(2 * np.pi)  # density of t at h = 0
    at_zero = a * a * sigma**2 / 2 + 2 * a * b * sigma * none + b * b / 2
    arriving = everywhere(square, at_zero) + gate * e
    along = everywhere(
        a * sigma**2 * opened + b * sigma * density, a * sigma**2 / 2 + b * sigma * none
    )
    right = np.array([masses @ (h * mean), masses @ mean])
    skip_a, skip_b = np.linalg.solve(np.array([[s, m], [m, 1.0]]), right)
    coherent = skip_a**2 * s + 2 * skip_a * skip_b * m + skip_b**2
    across = float(masses @ square) - coherent
    places = 4.0 if shape.transition else 1.0  # of so many positions the shortcut keeps one
    inner = shape.gain2 * along / sigma**2
    q1 = shape.gain1 * s
    branch = 2 * shape.share1 / places * (0.5 * shape.gain2 * arriving + inner**2 * q1 / 2)
    spread = coherent * (1 / places - 1 / places**2)  # of a and b over positions
    return (
        float(skip_a / places + shape.share1 * inner / places),
        float(skip_b / places),
        float((gate * e + across) / places + spread + branch),
    )
