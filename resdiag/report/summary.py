"""Numbers of cells that differ in their seed only: their mean, their spread, and both in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resdiag.report.words import ERRORS, number


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Numbers of cells that differ in their seed only.

    Attributes:
        mean: Arithmetic, or geometric for what is compared by a factor; NaN if there is none.
        deviation: Sample standard deviation, of the logarithms for a geometric mean; NaN below two.
        low: Smallest.
        high: Largest.
        n: How many there are.
    """

    mean: float = math.nan
    deviation: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: int = 0


def summarise(values: Sequence[float], *, geometric: bool = False) -> Summary:
    """Mean and spread of the finite values.

    >>> summarise([1.0, 3.0]).mean, round(summarise([1.0, 100.0], geometric=True).mean, 9)
    (2.0, 10.0)
    """
    known = np.array([value for value in values if math.isfinite(value)])
    if geometric:
        known = known[known > 0]
    if not known.size:
        return Summary()
    scale = np.log(known) if geometric else known
    mean = float(np.mean(scale))
    return Summary(
        mean=float(np.exp(mean)) if geometric else mean,
        deviation=float(np.std(scale, ddof=1)) if known.size > 1 else math.nan,
        low=float(known.min()),
        high=float(known.max()),
        n=int(known.size),
    )


def spread_words(found: Summary, name: str) -> str:
    """Mean and deviation of a measure; without the latter if there is one number only.

    >>> spread_words(summarise([0.0826, 0.085]), "test_error")
    '8.38 ± 0.17 %'
    """
    if found.n < 2:
        return number(found.mean, name)
    mean, spread = (number(v, name).removesuffix(" %") for v in (found.mean, found.deviation))
    return f"{mean} ± {spread}" + (" %" if name in ERRORS else "")
