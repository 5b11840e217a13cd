"""The first place where differences exceed a tolerance, and the table of the largest ones."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from resdiag.agreement.differences import Differences
from resdiag.agreement.result import Parting, Row
from resdiag.agreement.tolerance import Tolerance


def find_first(
    tables: Mapping[str, Differences], allowed: Tolerance, names: Mapping[int, str]
) -> Parting | None:
    """The first place in the order of computation with more than the tolerance, or None.

    Args:
        tables: Differences by metric.
        allowed: The tolerance.
        names: The blocks' names by index.
    """
    found = [
        parting
        for table in tables.values()
        if table.place.decides and (parting := _first_of(table, allowed, names)) is not None
    ]
    if not found:
        return None
    first = min(found, key=lambda parting: (parting.step, _rank(tables[parting.metric], parting)))
    return replace(first, before=_step_before(first.step, tables))


def _first_of(table: Differences, allowed: Tolerance, names: Mapping[int, str]) -> Parting | None:
    """The first place at which one metric exceeds the tolerance, or None."""
    limits = allowed.of(table)
    beyond = table.relative > limits
    if not beyond.any():
        return None
    row = int(beyond.any(axis=1).argmax())
    place = table.place
    column = min(np.flatnonzero(beyond[row]), key=lambda at: place.rank(int(table.blocks[at])))
    block = int(table.blocks[column]) if place.per_block else None
    shown = [
        float(np.fmax.reduce(one.relative[one.steps <= table.steps[row]], axis=None, initial=0.0))
        for one in allowed.noise(place.metric)
    ]
    return Parting(
        step=int(table.steps[row]), block=block, name="" if block is None else names.get(block, ""),
        metric=place.metric, direction=place.direction, site=place.words,
        difference=float(table.relative[row, column]), tolerance=float(limits[row, column]),
        a=float(table.a[row, column]), b=float(table.b[row, column]),
        noise=max(shown, default=None), previous=_largest(table, row - 1),
    )  # fmt: skip


def _largest(table: Differences, row: int) -> float | None:
    """The largest difference at one step; None before the first one."""
    return float(np.fmax.reduce(table.relative[row], initial=0.0)) if row >= 0 else None


def _rank(table: Differences, parting: Parting) -> tuple[int, int, int]:
    return table.place.rank(parting.block or 0)


def _step_before(step: int, tables: Mapping[str, Differences]) -> int | None:
    """The last step before at which anything was compared that decides."""
    places = [
        (table, int(np.searchsorted(table.steps, step)))
        for table in tables.values()
        if table.place.decides
    ]
    return max((int(table.steps[at - 1]) for table, at in places if at), default=None)


def table_rows(
    tables: Mapping[str, Differences], allowed: Tolerance, names: Mapping[int, str]
) -> Iterator[Row]:
    """Each metric's largest difference, and where it first exceeds the tolerance."""
    for metric, table in tables.items():
        at = int(np.nanargmax(table.relative))
        step, column = np.unravel_index(at, table.relative.shape)
        noise = [float(np.nanmax(one.relative)) for one in allowed.noise(metric)]
        decides = table.place.decides
        yield Row(
            metric=metric,
            direction=table.place.direction,
            largest=float(table.relative[step, column]),
            step=int(table.steps[step]),
            block=int(table.blocks[column]) if table.place.per_block else None,
            noise=max(noise, default=None),
            decides=decides,
            first=_first_of(table, allowed, names) if decides else None,
        )
