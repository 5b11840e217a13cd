"""From the run folders of a study to its results."""

from collections.abc import Collection
from pathlib import Path

from resdiag.errors import ResdiagError
from resdiag.report.outcomes import measure
from resdiag.report.results import CellResult, Results
from resdiag.report.thin import columns_of, thin
from resdiag.runs.folder import load_run
from resdiag.study.grid import Cell
from resdiag.study.ledger import Entry, read_entry
from resdiag.study.spec import OUTCOMES, StudyFile
from resdiag.study.study import Study

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
        run = load_run(entry.run)
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
