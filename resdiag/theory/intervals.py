"""Confidence intervals of means and of differences between networks, over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95
"""Share of such intervals that hold the true value, if errors scatter normally over seeds."""
PERCENT = f"{100 * LEVEL:.0f} %"
"""The level in words."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its `LEVEL` confidence interval, in the unit of the values.

    Attributes:
        value: The mean, or the difference of two means.
        low: Lower end; NaN if there are too few values.
        high: Upper end; likewise.
        n: Values, or pairs of values, or the smaller of the two numbers of values.
        is_paired: Whether differences were taken seed by seed.
    """

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    is_paired: bool = False

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign is certain at the level; False without an interval."""
        return self.low > 0 or self.high < 0


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean and its t interval: mean ± t(n - 1) s / sqrt(n).

    >>> found = mean_interval([1.0, 2.0, 3.0])
    >>> found.value, round(found.low, 3), round(found.high, 3)
    (2.0, -0.484, 4.484)
    """
    known = np.asarray(values, dtype=float)
    if not known.size:
        return Interval()
    mean, n = float(known.mean()), int(known.size)
    if n < 2:
        return Interval(mean, n=n)
    half = half_length(float(known.std(ddof=1)), n)
    return Interval(mean, mean - half, mean + half, n)


def half_length(deviation: float, n: int) -> float:
    """Half of the interval of a mean: t(n - 1) s / sqrt(n).

    Args:
        deviation: Sample standard deviation s, of n - 1 degrees of freedom.
        n: Values, two or more.
    """
    return t_quantile(n - 1) * deviation / math.sqrt(n)


def difference(
    one: Sequence[float],
    other: Sequence[float],
    seeds: tuple[Sequence[int], Sequence[int]] | None = None,
) -> Interval:
    """Mean of `one` minus mean of `other`.

    Where both were run with the same seeds, differences are taken seed by seed: runs of one seed
    see the same batches in the same order, and what those do to both cancels. Else it is Welch's
    interval, for two unequal variances.

    Args:
        one: Finite values, one per run.
        other: Likewise; may differ in number.
        seeds: The seeds of both, in the order of the values; None if they are not known.

    >>> found = difference([2.0, 4.1, 6.0], [1.0, 3.0, 5.1], ([0, 1, 2], [0, 1, 2]))
    >>> found.is_paired, round(found.low, 2), round(found.high, 2)
    (True, 0.75, 1.25)
    >>> found = difference([2.0, 4.1, 6.0], [1.0, 3.0, 5.1])
    >>> found.is_paired, round(found.low, 2), round(found.high, 2)
    (False, -3.59, 5.59)
    """
    a, b = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    if seeds is not None and _are_pairs(*seeds):
        place = dict(zip(seeds[1], b, strict=True))
        pairs = mean_interval([x - place[s] for s, x in zip(seeds[0], a, strict=True)])
        return Interval(pairs.value, pairs.low, pairs.high, pairs.n, is_paired=True)
    if not min(a.size, b.size):
        return Interval()
    gap, n = float(a.mean() - b.mean()), int(min(a.size, b.size))
    if n < 2:
        return Interval(gap, n=n)
    u, v = float(a.var(ddof=1)) / a.size, float(b.var(ddof=1)) / b.size
    freedom = (u + v) ** 2 / (u**2 / (a.size - 1) + v**2 / (b.size - 1)) if u + v > 0 else 1.0
    half = t_quantile(freedom) * math.sqrt(u + v)
    return Interval(gap, gap - half, gap + half, n)


def _are_pairs(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether each seed stands once on both sides."""
    return bool(one) and len(set(one)) == len(one) and sorted(one) == sorted(other)


def t_quantile(freedom: float) -> float:
    """Of Student's t distribution, two-sided at `LEVEL`."""
    return float(stdtrit(freedom, (1 + LEVEL) / 2))
