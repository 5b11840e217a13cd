"""Differences between networks of one depth, and how they change with the depth."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from resdiag.diagnose.degraded import points
from resdiag.report.comparisons import asks_of_errors, group_networks
from resdiag.report.parts import Entry, Mark, Part, Table, Text
from resdiag.report.results import Group, Results
from resdiag.report.words import count
from resdiag.theory.intervals import LEVEL, PERCENT, Interval, mean_interval

MOST_NETWORKS = 4
"""Of more networks, each is held against the first one only."""

Errors: TypeAlias = Mapping[int, float]
"""Final test errors by seed."""


def contrast_parts(results: Results) -> list[Part]:
    """How to read them, and a table of the differences; nothing where no two can be compared."""
    networks = group_networks(results) if asks_of_errors(results) else {}
    errors = {name: {_depth(g): g.test_errors for g in lot} for name, lot in networks.items()}
    depths = sorted({depth for by_depth in errors.values() for depth in by_depth})
    names = list(errors)
    pairs = list(itertools.combinations(names, 2))
    if len(names) > MOST_NETWORKS:
        pairs = [(name, names[0]) for name in names[1:]]
    found = {pair: _contrasts(errors[pair[0]], errors[pair[1]], depths) for pair in pairs}
    amount = sum(math.isfinite(one.low) for row in found.values() for one in row)
    if not amount:
        return []
    header = ["networks", *(f"depth {depth}" for depth in depths)]
    header += [f"change from {depths[0]} to {depths[-1]}"] if len(depths) > 1 else []
    rows = [[f"{a} - {b}", *map(_entry, row)] for (a, b), row in found.items()]
    rule = (
        f"Each number is the mean over seeds of the difference in one seed, in points, with its "
        f"{PERCENT} t interval; one without 0 is marked ✓. Of {count(amount, 'interval')}, "
        f"{(1 - LEVEL) * amount:.1f} would be marked by chance if nothing differed."
    )
    caption = "Difference of the final test errors of two networks"
    numeric = range(1, len(header))
    return [Text(rule), Table(caption=caption, header=header, rows=rows, numeric=numeric)]


def _depth(group: Group) -> int:
    return group.members[0].cell.request.depth


def _contrasts(
    one: Mapping[int, Errors], other: Mapping[int, Errors], depths: Sequence[int]
) -> list[Interval]:
    """The difference at each depth and, of several, the last one's minus the first one's."""
    at_depth = [_paired(one.get(depth, {}), other.get(depth, {})) for depth in depths]
    found = [mean_interval(list(gaps.values())) for gaps in at_depth]
    if len(depths) > 1:
        change = _paired(at_depth[-1], at_depth[0])
        found.append(mean_interval(list(change.values())))
    return found


def _paired(one: Errors, other: Errors) -> Errors:
    """The differences in the seeds that both have."""
    return {seed: value - other[seed] for seed, value in one.items() if seed in other}


def _entry(interval: Interval) -> Entry:
    if not interval.n:
        return "-"
    return Mark(points(interval), "good") if interval.excludes_zero else points(interval)
