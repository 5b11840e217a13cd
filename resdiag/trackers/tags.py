"""From the two tables of a run to the numbers of a step by tag, which is what trackers take."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resdiag.catalog.table import METRICS, derive
from resdiag.errors import unknown

Columns = Mapping[str, NDArray[Any]]
"""A table: one array of shape (rows,) per column."""

SHOWN = (
    "grad_output", "grad_param", "grad_nonfinite", "forward_growth", "output_bias",
    "output_nonfinite", "skip_gain", "branch_ratio", "update_ratio",
)  # fmt: skip
"""Block-level metrics that trackers get: all of them would be thousands of series per run."""


def check_metrics(names: Sequence[str]) -> None:
    """Refuse a block-level metric that the catalogue does not have.

    Raises:
        UsageError: Naming the nearest one.
    """
    known = [name for name, metric in METRICS.items() if metric.site != "run"]
    for name in names:
        if name not in known:
            raise unknown("metric", name, known)


def by_step(
    metrics: Columns, curve: Columns, shown: Sequence[str] = SHOWN
) -> Iterator[tuple[int, dict[str, float]]]:
    """The numbers of each step by tag, steps in order.

    Block-level tags are `<metric>/block_<index>`; they hold NaN and infinities as recorded, except
    that a number that was not recorded at all (NaN in the whole step) is left out, as are gaps of
    the step-level table.

    Args:
        metrics: Rows per step and block; may be empty.
        curve: Rows per step; may be empty.
        shown: Block-level metrics to take.
    """
    steps: dict[int, dict[str, float]] = {}
    curve = {**curve, **derive(dict(curve), per_step=True)}
    for row, step in enumerate(np.asarray(curve.get("step", ())).tolist()):
        values = {name: float(curve[name][row]) for name in curve if name != "step"}
        steps.setdefault(step, {}).update(
            (name, value) for name, value in values.items() if not math.isnan(value)
        )
    at = np.asarray(metrics.get("step", np.empty(0, np.int32)))
    columns = {**metrics, **derive(dict(metrics))} if at.size else {}
    for step in np.unique(at).tolist():
        rows = at == step
        blocks = np.asarray(metrics["block"])[rows].tolist()
        for name in shown:
            found = np.asarray(columns.get(name, np.full(at.shape, np.nan)), np.float64)[rows]
            if not np.isnan(found).all():
                steps.setdefault(step, {}).update(
                    (f"{name}/block_{block:03d}", value)
                    for block, value in zip(blocks, found.tolist(), strict=True)
                )
    yield from sorted(steps.items())
