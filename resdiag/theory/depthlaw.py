"""How a sum grows with depth, from the measured gain of its branches: by a factor or by an amount.

In a stage of blocks H' = h + F with E[H'^2] = E[h^2] + E[F^2], what counts is whether E[F^2]
follows E[h^2]. The elasticity d log E[F^2] / d log E[h^2] is 1 without normalisation, where E[H^2]
is multiplied per block (Zhang et al. 2019, arXiv:1901.09321), and 0 where a normalisation ends or
begins the branch, where it grows by an amount per block (De & Smith 2020, arXiv:2002.10444).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_BLOCKS = 4  # of a stage: an exponent from fewer is noise
_GROWTH = 1.3  # of E[h^2] over the stage


@dataclass(frozen=True, kw_only=True)
class DepthLaw:
    """What one stage of a network would do if it were deeper.

    Attributes:
        kind: "geometric", "additive", "between", or "unknown".
        elasticity: d log E[F^2] / d log E[h^2]; NaN if unknown.
        growth_at_twice: E[H^2] behind the stage over E[h^2] before it, if it had twice the blocks.
        reason: Why it is unknown, or "".
    """

    kind: str
    elasticity: float = math.nan
    growth_at_twice: float = math.nan
    reason: str = ""


def depth_law(second_moments: Sequence[float], branch_ratios: Sequence[float]) -> DepthLaw:
    """The law of one stage.

    Args:
        second_moments: E[H^2] behind each of its blocks.
        branch_ratios: sqrt(E[F^2] / E[h^2]) of the same blocks.

    >>> depth_law([2.0, 4.0, 8.0, 16.0], [1.0, 1.0, 1.0, 1.0]).kind
    'geometric'
    >>> depth_law([2.0, 3.0, 4.0, 5.0], [1.0, 0.707, 0.577, 0.5]).kind
    'additive'
    """
    after, ratios = np.array(second_moments, float), np.array(branch_ratios, float)
    if len(after) < _BLOCKS:
        return DepthLaw(kind="unknown", reason=f"no stage of {_BLOCKS} blocks")
    if not (np.isfinite(after).all() and np.isfinite(ratios).all() and (ratios > 0).all()):
        return DepthLaw(kind="unknown", reason="a moment is missing, or a branch is 0")
    before = np.append(after[0] / (1 + ratios[0] ** 2), after[:-1])
    branch = ratios**2 * before
    if not before[-1] > _GROWTH * before[0]:
        reason = f"E[h^2] grows by less than {_GROWTH} over the stage"
        return DepthLaw(kind="unknown", reason=reason)
    slope = float(np.polyfit(np.log(before), np.log(branch), 1)[0])
    kind = "geometric" if slope > 0.75 else "additive" if slope < 0.25 else "between"
    total = float(after[-1] / before[0])
    twice = {"geometric": total**2, "additive": 2 * total - 1}.get(kind, math.nan)
    return DepthLaw(kind=kind, elasticity=slope, growth_at_twice=twice)
