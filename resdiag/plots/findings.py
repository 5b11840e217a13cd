"""What the titles of plots say: numbers of the lines that are drawn."""

import math
import re
from collections.abc import Sequence

import numpy as np

from resdiag.plots.view import Floats, Trace


def when_words(traces: Sequence[Trace]) -> str:
    """At which step, for the end of a sentence: ", at step 0"; empty where runs differ in it."""
    steps = {int(r.steps[p]) for t in traces for r, p in zip(t.records, t.places, strict=True)}
    return f", at step {steps.pop()}" if len(steps) == 1 else ""


def growth_of(trace: Trace) -> float:
    """The factor of E[H^2] per block, a geometric mean as in verdicts; NaN of none.

    The median over the runs of a line. Of frozen results, which lack the input of a block, it is
    the factor from block to block within the stages.
    """
    whole = middle([geometric_mean(values) for values in trace.values("forward_growth")])
    if math.isfinite(whole):
        return whole
    metric, found = "output_second_moment", []
    for record, values in zip(trace.records, trace.values(metric), strict=True):
        inner = [i for i in range(1, record.n_blocks) if i not in record.boundaries]
        with np.errstate(all="ignore"):
            found.append(geometric_mean(values[inner] / values[[i - 1 for i in inner]]))
    return middle(found)


def end_ratios(trace: Trace, metric: str) -> list[float]:
    """The value at the last block over that at the first, by run; NaN where one is not positive."""
    values = trace.values(metric)
    with np.errstate(all="ignore"):
        ratios = values[:, -1] / values[:, 0]
    return [float(ratio) if 0 < ratio < math.inf else math.nan for ratio in ratios]


def lost_words(traces: Sequence[Trace], metric: str) -> str:
    """Why the values of a metric have no ratio: "is zero in every block", "is not finite"."""
    values = np.concatenate([trace.values(metric).ravel() for trace in traces])
    if not values[np.isfinite(values)].any() and np.isfinite(values).all():
        return "is zero in every block"
    return "is zero in some blocks" if np.isfinite(values).all() else "is not finite"


def geometric_mean(values: Floats) -> float:
    """Of the positive finite values; NaN of none."""
    kept = values[np.isfinite(values) & (values > 0)]
    return float(np.exp(np.log(kept).mean())) if kept.size else math.nan


def middle(values: Sequence[float]) -> float:
    """The median of the finite values; NaN of none."""
    kept = [value for value in values if math.isfinite(value)]
    return float(np.median(kept)) if kept else math.nan


def for_words(label: str) -> str:
    """A line in a title, without the number of its seeds.

    >>> for_words("elu (d) (5 seeds)")
    ' for elu (d)'
    """
    return f" for {re.sub(r' [(][0-9]+ seeds[)]', '', label)}"


def extremes(found: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """The names with the largest and the smallest value; none where nothing is finite."""
    known = [pair for pair in found if math.isfinite(pair[1])]
    if not known:
        return []
    most, least = max(known, key=lambda pair: pair[1]), min(known, key=lambda pair: pair[1])
    return [most] if most == least else [most, least]


def largest(trace: Trace, metric: str) -> tuple[int, float] | None:
    """The block with the largest finite value, in the median over the runs, and that value."""
    values = trace.values(metric)
    known = np.isfinite(values).all(axis=0)
    if not known.any():
        return None
    medians = np.where(known, np.median(np.where(known, values, 0.0), axis=0), -np.inf)
    return int(medians.argmax()), float(medians.max())
