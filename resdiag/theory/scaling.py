"""How a quantity changes with the depth or the width of a network: the law, and its exponent.

Residual networks multiply or add (Zhang et al. 2019, arXiv:1901.09321; De & Smith 2020,
arXiv:2002.10444): by the number of blocks L a root mean square grows as r^L without normalisation,
and as L^0.5 with it, which branches scaled by 1/sqrt(L) undo (Hayou et al. 2021, arXiv:2010.12859).
By the width n, outputs and their first changes should not depend on n (Yang & Hu 2021,
arXiv:2011.14522: the coordinate check of maximal update parametrisation).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resdiag.theory.intervals import t_quantile
from resdiag.theory.moments import Array

FLAT = 0.15
"""Exponent below which a quantity is called independent: it changes by 1.5 over a factor of 16."""


@dataclass(frozen=True, kw_only=True)
class Trend:
    """A quantity y as a function of a size x: y = c x^p, or y = c r^x.

    Attributes:
        kind: "power", "exponential", "flat", or "unknown".
        slope: p, or log r; NaN if unknown.
        low: Lower end of its 95 % interval; NaN with fewer than three points.
        high: Upper end.
        offset: log c.
        reason: Why it is unknown, or "".
    """

    kind: str
    slope: float = math.nan
    low: float = math.nan
    high: float = math.nan
    offset: float = math.nan
    reason: str = ""

    def at(self, size: float) -> float:
        """The fitted y at a size.

        >>> round(fit_trend([2, 4, 8, 16], [2.0, 4.0, 8.0, 16.0]).at(32), 6)
        32.0
        """
        x = size if self.kind == "exponential" else math.log(size)
        return math.exp(self.offset + self.slope * x)


def fit_trend(
    sizes: Sequence[float], values: Sequence[float], *, exponential: bool = True
) -> Trend:
    """The law of least squares of log y in log x, or in x where that leaves less.

    Args:
        sizes: x of each point; two different ones or more, positive.
        values: y of each point, positive.
        exponential: Whether y = c r^x is considered.

    >>> found = fit_trend([2, 4, 8, 16], [1.5**2, 1.5**4, 1.5**8, 1.5**16])
    >>> found.kind, round(math.exp(found.slope), 6)
    ('exponential', 1.5)
    >>> fit_trend([2, 4, 8], [5.0, 5.0, 5.0]).kind
    'flat'
    """
    x, y = np.asarray(sizes, float), np.asarray(values, float)
    if not (np.isfinite(y).all() and (y > 0).all()):
        return Trend(kind="unknown", reason="a value is not finite and positive")
    power = _line(np.log(x), np.log(y))
    if abs(power.slope) < FLAT:
        return _named(power, "flat")
    if exponential and len(set(sizes)) > 2:
        grown = _line(x, np.log(y))
        if grown.left < power.left:
            return _named(grown, "exponential")
    return _named(power, "power")


@dataclass(frozen=True)
class _Line:
    """A straight line; `left` is the sum of squares that it leaves."""

    slope: float
    offset: float
    half: float
    left: float


def _line(x: Array, y: Array) -> _Line:
    """Least squares, with half of the slope's interval."""
    slope, offset = (float(value) for value in np.polyfit(x, y, 1))
    left = float(((y - offset - slope * x) ** 2).sum())
    freedom = len(x) - 2
    half = math.nan
    if freedom > 0:
        error = math.sqrt(left / freedom / float(((x - x.mean()) ** 2).sum()))
        half = t_quantile(freedom) * error
    return _Line(slope, offset, half, left)


def _named(line: _Line, kind: str) -> Trend:
    return Trend(
        kind=kind, slope=line.slope, offset=line.offset,
        low=line.slope - line.half, high=line.slope + line.half,
    )  # fmt: skip
