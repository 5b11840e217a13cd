"""From runs to a view: read them, refuse what cannot be drawn, group the rest."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from resdiag.catalog.table import METRICS
from resdiag.errors import UsageError
from resdiag.plots.grouping import group_runs
from resdiag.plots.kinds import PlotKind
from resdiag.plots.view import Record, View

if TYPE_CHECKING:
    from resdiag.runs.folder import Run


def open_view(kind: PlotKind, runs: "Sequence[Run]", *, step: int | None, theory: bool) -> View:
    """Read the runs, check that they have what the plot needs, and group them into series.

    Raises:
        UsageError: A run without records, or without a metric that the plot needs.
    """
    records = [Record(run, run.metrics(_read_for(kind)), run.curve()) for run in runs]
    for record in records:
        _check(kind, record)
        if step is not None:
            record.place(step)
    return View(kind, tuple(group_runs(records)), step, theory)


_START = ("input_mean", "input_second_moment", "grad_output")  # what theory starts from


def _read_for(kind: PlotKind) -> set[str]:
    """The metrics that a plot looks at: reading all of a long run takes longer than drawing it."""
    health = {name for name in METRICS if name.endswith("_nonfinite")}
    sides = {f"{name}_{q}" for name in kind.needs for q in ("q10", "q50", "q90")}
    return {*kind.needs, *sides, *health, *_START, "output_second_moment"}


def _check(kind: PlotKind, record: Record) -> None:
    """Refuse a run that cannot be drawn, in one line."""
    if record.metrics.empty or not record.n_blocks:
        raise UsageError(
            f"{record.run.label} has no recorded step yet", "wait, or choose another run"
        )
    known = {*record.metrics.columns, *record.curve.columns}
    missing = [name for name in kind.needs if name not in known]
    if missing:
        columns = ", ".join(missing)
        raise UsageError(
            f"{record.run.label} has no column {columns}, which plot '{kind.name}' needs",
            "record the run again with this version",
        )
