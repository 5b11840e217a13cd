"""Un-normalised residual sums (a, b): the second moment grows geometrically with the block.

s = E[H^2] and m = E[H] over batch, channels and positions; M, mu, D the moments of
`resdiag.explain.moments`; g1, g2 the gains of the two convolutions (2 p_W each under He's
initialisation, the first p_W at a stage change); k = 1, or 1/2 at a stage change, the share of the
shortcut's channels that option A keeps. Source: mean field, Yang & Schoenholz 2017,
arXiv:1712.08969; the large-scale limit x2 per block of b is Zhang et al. 2019, arXiv:1901.09321
(Fixup) and De & Smith 2020, arXiv:2002.10444.
"""

from collections.abc import Sequence

import numpy as np

from resdiag.explain.geometry import BlockShape
from resdiag.explain.moments import Array, elu_mean, elu_second_moment, elu_slope_sq


def grow_elu_nobn(shapes: Sequence[BlockShape], s0: float, m0: float) -> dict[str, Array]:
    """Variant a, F = ELU(conv(ELU(conv(H)))).

    q1 = g1 s,  q2 = g2 M(q1),  s' = k s + M(q2) + 2 k m mu(q2),  m' = k m + mu(q2)
    |g_{l-1}|^2 / |g_l|^2 = k + g1 g2 D(q1) D(q2)

    The branch's mean is positive, so means add coherently; without padding the factor tends to
    2.90 per block (kappa = m / sqrt(s) = .80). The backward ratio takes gates and gradient as
    independent. It is a lower bound: at large scale the network is positively homogeneous in H,
    the component of g along H then grows backwards as ||H|| grows forwards (Fixup, theorem 1), and
    measured ratios lie between the two (2.4 against 1.8 at depth 110).
    """
    rows = []
    s, m = s0, m0
    for shape in shapes:
        q1 = shape.gain1 * s
        q2 = shape.gain2 * float(elu_second_moment(q1))
        mu, moment = float(elu_mean(q2)), float(elu_second_moment(q2))
        s = shape.kept * s + moment + 2 * shape.kept * m * mu
        m = shape.kept * m + mu
        slopes = float(elu_slope_sq(q1) * elu_slope_sq(q2))
        rows.append((s, m, shape.kept + shape.gain1 * shape.gain2 * slopes, moment))
    return _columns(rows, shapes, s0)


def grow_elu_pre(shapes: Sequence[BlockShape], s0: float, m0: float) -> dict[str, Array]:
    """Variant b, F = conv(ELU(conv(ELU(H)))).

    q1 = g1 M(s),  q2 = g2 M(q1),  s' = k s + q2,  m' = k m
    |g_{l-1}|^2 / |g_l|^2 = k + g1 g2 D(s) D(q1)

    The last operation is a convolution with fresh weights, so the branch has mean 0 and nothing
    adds coherently: b grows more slowly than a. Without padding the factor tends to 2 per block.
    """
    rows = []
    s, m = s0, m0
    for shape in shapes:
        slope = float(elu_slope_sq(s))
        q1 = shape.gain1 * float(elu_second_moment(s))
        q2 = shape.gain2 * float(elu_second_moment(q1))
        s, m = shape.kept * s + q2, shape.kept * m
        slope *= float(elu_slope_sq(q1))
        rows.append((s, m, shape.kept + shape.gain1 * shape.gain2 * slope, q2))
    return _columns(rows, shapes, s0)


def _columns(
    rows: Sequence[tuple[float, float, float, float]], shapes: Sequence[BlockShape], s0: float
) -> dict[str, Array]:
    """Columns of (second moment, mean, backward growth, branch second moment) rows."""
    second_moment, mean, grad_growth, branch = np.array(rows).T
    kept = np.array([shape.kept for shape in shapes])
    before = np.concatenate([[s0], second_moment[:-1]])
    return {
        "second_moment": second_moment,
        "mean": mean,
        "grad_growth": grad_growth,
        "branch_ratio": np.sqrt(branch / (kept * before)),
    }
