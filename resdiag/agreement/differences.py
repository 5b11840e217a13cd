"""Relative differences of what two runs recorded, by step and block."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from resdiag.agreement.places import PLACES, Place, custom_place
from resdiag.catalog.table import RECORDED_PER_STEP
from resdiag.diagnose.rundata import RunData

Floats = NDArray[np.float64]

DOUBLES = ("loss", "grad_norm")
"""Columns that files hold in float64."""


@dataclass(frozen=True, eq=False)
class Differences:
    """One metric in two runs, at the steps and blocks that both have.

    Attributes:
        place: Where the metric arises.
        steps: Steps (S,), rising.
        blocks: Indices (B,) of the blocks in forward order; one 0 for a number of the whole step.
        a: Values (S, B) of the first run.
        b: Values (S, B) of the second run.
        relative: |a - b| in the unit of the place (S, B); 0 for equal values, infinite where one
            run is no longer finite, NaN where a value is missing.
    """

    place: Place
    steps: NDArray[np.int64]
    blocks: NDArray[np.int64]
    a: Floats
    b: Floats
    relative: Floats


def compare_tables(a: RunData, b: RunData) -> dict[str, Differences]:
    """The differences of every metric that both runs have, by metric, in the order of `PLACES`."""
    custom = {
        entry["id"]: custom_place(entry["id"], str(entry.get("site", "")))
        for entry in a.run.custom_metrics
        if entry["id"] not in PLACES
    }
    sides = _Side(a, b), _Side(b, a)
    pairs = ((place, _compare(place, *sides)) for place in (*PLACES.values(), *custom.values()))
    return {place.metric: found for place, found in pairs if found is not None}


class _Side:
    """One of two runs: its numbers at the steps and blocks that both have."""

    def __init__(self, seen: RunData, other: RunData) -> None:
        self._seen = seen
        self._steps = sorted(set(seen.steps) & set(other.steps))
        self._blocks = sorted(set(seen.indices) & set(other.indices))
        self._have_records = bool(seen.steps and other.steps)

    def table(self, place: Place) -> pd.DataFrame:
        """A metric as steps x blocks; that of the whole step as a table of one column."""
        if place.per_block:
            return self._at_blocks(place.metric)
        series = self._seen.series(place.metric)
        if place.metric in RECORDED_PER_STEP and self._have_records:
            return series[series.index.isin(self._steps)].to_frame(0)
        return (series if place.metric == "loss" else series.dropna()).to_frame(0)

    def _at_blocks(self, metric: str) -> pd.DataFrame:
        return self._seen.table(metric).reindex(index=self._steps, columns=self._blocks)

    def lost(self, place: Place, steps: pd.Index) -> NDArray[np.bool_]:
        """Where a missing number is one that was not finite, and not one that was not recorded."""
        if place.per_block:
            return self._broken
        told = place.metric == "loss" and self._seen.run.status == "diverged"
        return np.full((len(steps), 1), told)

    @cached_property
    def _broken(self) -> NDArray[np.bool_]:
        """Blocks (S, B) in which something was not finite."""
        lost = np.zeros((len(self._steps), len(self._blocks)), dtype=bool)
        for name in self._seen.metrics.columns:
            if str(name).endswith("_nonfinite"):
                lost |= self._at_blocks(str(name)).to_numpy(dtype=np.float64) > 0
        return lost

    def rms(self, place: Place, steps: pd.Index) -> Floats:
        """RMS (S, B) of the tensor that a moment is of."""
        if place.per_block:
            names = [f"{place.site}_{part}" for part in ("channel_mean_rms", "channel_std")]
            parts = [self._at_blocks(name) for name in names]
        else:
            names = ["data_mean", "data_std"]
            parts = [self._seen.series(name).to_frame(0).reindex(steps) for name in names]
        mean, std = (part.to_numpy(dtype=np.float64) for part in parts)
        return np.asarray(np.hypot(mean, std))


def _compare(place: Place, left: _Side, right: _Side) -> Differences | None:
    """The differences of one metric; None if one of the runs does not have it."""
    tables = left.table(place), right.table(place)
    steps = tables[0].index.intersection(tables[1].index)
    blocks = tables[0].columns
    x, y = (table.reindex(index=steps).to_numpy(dtype=np.float64) for table in tables)
    if place.metric not in DOUBLES:
        # what comes from a file was float32, what a monitor still holds need not be
        with np.errstate(over="ignore"):
            x, y = (values.astype(np.float32).astype(np.float64) for values in (x, y))
    lost = left.lost(place, steps), right.lost(place, steps)
    if any((np.isnan(one) & ~gone).all() for one, gone in zip((x, y), lost, strict=True)):
        return None
    relative = relative_difference(x, y, _unit(place, x, y, (left, right), steps))
    for one, gone in zip((x, y), lost, strict=True):
        relative[np.isnan(one) & ~gone] = np.nan
    if np.isnan(relative).all():
        return None
    return Differences(
        place, steps.to_numpy(dtype=np.int64), blocks.to_numpy(dtype=np.int64), x, y, relative
    )


def relative_difference(a: Floats, b: Floats, unit: Floats) -> Floats:
    """|a - b| / unit; 0 for equal values, infinite where one of both is not finite.

    Args:
        a: Values of any shape.
        b: Values of the same shape.
        unit: Positive numbers of the same shape; where one is 0 or not finite, it is the larger
            of both values.

    Returns:
        Numbers of the same shape; NaN where both values are NaN.

    >>> one = np.array([1.0, np.inf, np.nan, 2.0])
    >>> relative_difference(one, np.array([1.0, np.inf, 1.0, 1.0]), np.ones(4)).tolist()
    [0.0, 0.0, inf, 1.0]
    """
    with np.errstate(all="ignore"):
        larger = np.maximum(np.abs(a), np.abs(b))
        found = np.abs(a - b) / np.where((unit > 0) & np.isfinite(unit), unit, larger)
    found = np.where(np.isfinite(a) & np.isfinite(b), found, np.inf)
    found = np.where(a == b, 0.0, found)
    return np.where(np.isnan(a) & np.isnan(b), np.nan, found)


def _unit(
    place: Place, a: Floats, b: Floats, sides: tuple[_Side, _Side], steps: pd.Index
) -> Floats:
    """What differences of a metric are divided by, see `Place.unit`."""
    with np.errstate(all="ignore"):
        larger = np.fmax(np.abs(a), np.abs(b))
        if place.unit == "one":
            return np.fmax(larger, 1.0)
        if place.unit == "largest":
            finite = np.where(np.isfinite(larger), larger, 0.0)
            return np.asarray(np.maximum.accumulate(finite, axis=0))
        if place.unit == "rms":
            return np.fmax(*(side.rms(place, steps) for side in sides))
    return larger


def differing_settings(
    a: Mapping[str, object], b: Mapping[str, object]
) -> dict[str, tuple[object, object]]:
    """The keys with different values, nested ones joined by dots, each with both values.

    >>> differing_settings({"lr": 0.1, "data": {"n": 1}}, {"lr": 0.1, "data": {"n": 2}})
    {'data.n': (1, 2)}
    """
    left, right = _flat(a), _flat(b)
    names = dict.fromkeys([*left, *right])
    return {
        name: (left.get(name), right.get(name))
        for name in names
        if left.get(name) != right.get(name)
    }


def _flat(document: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found
