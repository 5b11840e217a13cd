"""The results of a study from its folder: each run with a few telling steps."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from resdiag.catalog.table import inputs_of
from resdiag.errors import ResdiagError
from resdiag.plots.kinds import KINDS
from resdiag.plots.view import telling_places
from resdiag.report.outcomes import measure
from resdiag.report.results import CellResult, Results
from resdiag.runs.folder import read_run
from resdiag.study.grid import Cell
from resdiag.study.ledger import Entry, read_entry
from resdiag.study.spec import OUTCOMES, StudyFile
from resdiag.study.study import Study

if TYPE_CHECKING:
    import pandas as pd

    from resdiag.runs.folder import Run

STEPS = 12
"""Recorded steps of a run that a report draws from."""


def collect(study: Study, runs: Path, *, steps: int = STEPS) -> Results:
    """Read what a study's cells came to; the study may be running, or not begun.

    Args:
        study: The study.
        runs: Folder that holds the study's folder.
        steps: Recorded steps to keep of each run, about.
    """
    folder = study.folder(runs)
    wanted = {item.step for item in study.file.expected if item.step is not None}
    metrics = {item.measure for item in study.file.expected if item.measure not in OUTCOMES}
    columns = columns_of({figure.plot for figure in study.file.figure}, metrics)
    cells = [
        _collect_cell(cell, read_entry(folder / cell.id), study.file, steps, wanted, columns)
        for cell in study.cells
    ]
    return Results(study=study, cells=cells, source=str(folder))


def _collect_cell(
    cell: Cell,
    entry: Entry,
    file: StudyFile,
    steps: int,
    wanted: Collection[int],
    columns: Collection[str],
) -> CellResult:
    """One cell; a run that cannot be read is one that failed, and says why."""
    if entry.run is None:
        return CellResult(cell=cell, state=entry.state, message=entry.message, outcomes={})
    try:
        run = read_run(entry.run)
        expected = [item for item in file.expected if cell.matches(item.cells.given)]
        outcomes = measure(run, expected)
        small, size = thin(run, steps=steps, wanted=wanted, columns=columns)
    except ResdiagError as error:
        return CellResult(cell=cell, state="failed", message=error.message, outcomes={})
    return CellResult(
        cell=cell,
        state=entry.state,
        message=entry.message,
        run=small,
        outcomes=outcomes,
        thinned=size,
    )


MOST_ROWS = 400
"""Rows of a curve that are all kept; of a longer one about as many are."""

CORE = (
    "grad_output", "grad_input", "grad_param", "grad_nonfinite", "output_nonfinite",
    "input_second_moment", "input_mean", "output_second_moment", "skip_gain",
)  # fmt: skip
"""Metrics that are always kept: where a run broke, and what theory starts from."""

_MEANS = ("loss", "error", "images_per_s")


def thin(
    run: "Run", *, steps: int, wanted: Collection[int], columns: Collection[str]
) -> "tuple[Run, int]":
    """A run in memory with some of a run's steps and columns.

    Args:
        run: A run.
        steps: Recorded steps to keep, about.
        wanted: Steps to keep in any case.
        columns: Recorded metrics to keep.

    Returns:
        The smaller run, and the number of steps that a row of its curve stands for.
    """
    metrics = run.metrics(columns)
    kept = keep_steps(metrics, steps, wanted)
    curve, size = _thin_curve(run.curve(), kept)
    frame = metrics[metrics["step"].isin(kept)].reset_index(drop=True)
    return replace(run, metrics_frame=frame, curve_frame=curve), size


def columns_of(plots: Collection[str], metrics: Collection[str]) -> set[str]:
    """The recorded metrics that some kinds of plots and some metrics are made of."""
    drawn = {name for plot in plots if plot in KINDS for name in KINDS[plot].needs}
    return set().union(*(inputs_of(name) for name in {*drawn, *metrics, *CORE}))


def keep_steps(metrics: "pd.DataFrame", count: int, wanted: Collection[int]) -> list[int]:
    """First, early, last finite, the one after it, last; those wanted; others, denser early."""
    steps = np.unique(metrics["step"].to_numpy(dtype=np.int64))
    if not len(steps):
        return []
    last = len(steps) - 1
    places = {*telling_places(steps, _last_finite(metrics, steps)), last}
    places |= set(np.flatnonzero(np.isin(steps, list(wanted))).tolist())
    logs = np.log1p(steps)
    for place in np.searchsorted(logs, np.linspace(logs[0], logs[-1], count)).tolist():
        if len(places) < count:
            places.add(min(place, last))
    return [int(steps[place]) for place in sorted(places)]


def _last_finite(metrics: "pd.DataFrame", steps: NDArray[np.int64]) -> int:
    """Place of the last step whose gradients are finite in every block; 0 if none is."""
    if "grad_output" not in metrics:
        return len(steps) - 1
    finite = np.isfinite(metrics["grad_output"].to_numpy(dtype=np.float64))
    broken = np.unique(metrics["step"].to_numpy()[~finite])
    healthy = np.flatnonzero(~np.isin(steps, broken))
    return int(healthy[-1]) if len(healthy) else 0


def _thin_curve(curve: "pd.DataFrame", recorded: Sequence[int]) -> "tuple[pd.DataFrame, int]":
    """Evaluated rows, recorded ones that are kept, and others evenly; loss and error as means.

    A row's loss and batch error are means over the steps since the row before, so that a thinned
    curve shows no single batch; a loss that is not finite makes its row so.
    """
    rows = len(curve)
    if rows <= MOST_ROWS:
        return curve, 1
    kept = np.zeros(rows, dtype=bool)
    kept[np.unique(np.linspace(0, rows - 1, MOST_ROWS * 3 // 4).astype(int))] = True
    kept[: MOST_ROWS // 20] = True
    kept |= np.isin(curve["step"].to_numpy(), list(recorded))
    for name in ("test_error", "train_error"):
        kept |= np.isfinite(curve[name].to_numpy(dtype=np.float64))
    places = np.flatnonzero(kept)
    starts = np.concatenate([[0], places[:-1] + 1])
    sizes = places - starts + 1
    small = curve.iloc[places].reset_index(drop=True)
    for name in _MEANS:
        values = curve[name].to_numpy(dtype=np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            small[name] = np.add.reduceat(values, starts) / sizes
    return small, int(np.median(sizes))
