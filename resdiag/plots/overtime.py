"""Lines over steps: a column of the curve, or a metric at one block."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes

from resdiag.plots.lines import draw_line
from resdiag.plots.scale import finish_scale, whole_ticks
from resdiag.plots.style import ALARM, ONE_RUN, Look
from resdiag.plots.view import Bools, Floats, Record, Series, View

Points = tuple[Floats, Floats, Bools]
"""Steps, values, which of them are non-finite."""


def trace_steps(
    axes: Axes, view: View, column: str, *, log: bool = False, light: bool = False,
    look: Look | None = None, label: str = "{}", window: int = 0,
) -> None:  # fmt: skip
    """Draw a column of the curve against the step, one line per series.

    Args:
        axes: Where.
        view: The series.
        column: Column of the curve.
        log: Whether the axis is logarithmic.
        light: Thin and pale.
        look: Replaces the look of the series.
        label: Replaces its label; `{}` stands for it.
        window: Of so many finite values before each the mean is drawn: the trend under the noise.
    """

    def points(record: Record) -> Points:
        found = curve_points(record, column)
        return _running_mean(found, window) if window else found

    _trace(axes, view.series, points, look=look, label=label, log=log, light=light)


def _running_mean(points: Points, window: int) -> Points:
    steps, values, broken = points
    steps, values = steps[~broken], values[~broken]
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return steps, (sums[ends] - sums[starts]) / (ends - starts), np.zeros(len(steps), bool)


def trace_block_steps(
    axes: Axes, view: View, metric: str, block: int, *, log: bool = False, silent: bool = False
) -> None:
    """Draw a metric of one block (-1: the last) against the step.

    `silent` is for a single run: its line is not in the legend, and has the look of such lines.
    """

    def points(record: Record) -> Points:
        values, broken = record.grid(metric)[block], record.broken(metric)[block]
        return record.steps.astype(np.float64), values, broken

    look, label = (ONE_RUN, "_{}") if silent else (None, "{}")
    _trace(axes, view.series, points, look=look, label=label, log=log)


def curve_points(record: Record, column: str) -> Points:
    """The values of a column of the curve that were recorded.

    NaN is "not evaluated at this step" but for what every step has, the loss and the batch error,
    and what every recorded step has.
    """
    steps = record.curve["step"].to_numpy(dtype=np.float64)
    values = record.curve[column].to_numpy(dtype=np.float64)
    due = np.isin(steps, record.steps) if column.startswith(("grad_", "head_")) else steps >= 0
    if column.startswith(("train_", "test_")):
        due = np.zeros(len(steps), dtype=bool)
    if not np.isfinite(values).any() and not np.isinf(values).any():
        due[:] = column in ("loss", "error")
    broken = np.isinf(values) | (np.isnan(values) & due)
    kept = np.isfinite(values) | broken
    return steps[kept], values[kept], broken[kept]


def _trace(
    axes: Axes, lines: Sequence[Series], points: Callable[[Record], Points], *,
    look: Look | None = None, label: str, log: bool, light: bool = False,
) -> None:  # fmt: skip
    """Draw each series on the union of its runs' steps."""
    for rank, series in enumerate(lines):
        parts = [points(record) for record in series.records]
        steps = np.unique(np.concatenate([part[0] for part in parts]))
        values = np.full((len(parts), len(steps)), np.nan)
        broken = np.zeros(values.shape, dtype=bool)
        for row, (x, y, bad) in enumerate(parts):
            values[row, np.searchsorted(steps, x)] = y
            broken[row, np.searchsorted(steps, x)] = bad
        if len(steps):
            name = label.format(series.label)
            draw_line(
                axes, steps, values, broken, look or series.look, name,
                log=log, rank=rank, light=light,
            )  # fmt: skip


def finish_steps(axes: Axes, view: View, *, log: bool = False) -> None:
    """The axis of steps, and the scale."""
    axes.set_xlabel("step")
    last = max(float(record.curve["step"].max()) for record in view.records)
    axes.set_xlim(*((-0.03 * last, 1.03 * last) if last > 0 else (-0.5, 0.5)))
    whole_ticks(axes)
    finish_scale(axes, log=log)


def first_breakdown(record: Record) -> int | None:
    """First step with a non-finite loss, gradient norm or block; None if all is finite."""
    curves = [curve_points(record, column) for column in ("loss", "grad_norm")]
    found = [int(step) for steps, _, broken in curves for step in steps[broken][:1]]
    sick = record.broken("grad_output") | record.broken("output_second_moment")
    found += [int(s) for s in record.steps[sick.any(axis=0)][:1]]
    return min(found, default=None)


def mark_breakdown(axes: Axes, view: View, *, words: bool = False) -> None:
    """A vertical line per series at the first non-finite step; with words for a single run."""
    for series in view.series:
        steps = [s for s in map(first_breakdown, series.records) if s is not None]
        for step in sorted(set(steps)):
            colour = ALARM if view.single else series.look.colour
            axes.axvline(step, color=colour, lw=0.9, ls=(0, (1, 1)), zorder=1)
        if steps and words and view.single:
            right = steps[0] <= np.mean(axes.get_xlim())
            axes.annotate(
                f"non-finite from step {steps[0]}", (steps[0], 0.5), rotation=90, size=7,
                xycoords=axes.get_xaxis_transform(), xytext=(3 if right else -3, 0), color=ALARM,
                textcoords="offset points", ha="left" if right else "right", va="center",
            )  # fmt: skip
