"""`resdiag study run`, `retry` and `cell`: start what is missing of a study."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resdiag.cli.opening import open_study
from resdiag.cli.options import DataRoot, Device, Json, RunsRoot
from resdiag.cli.output import keep_quiet, print_table, say
from resdiag.cli.study_options import Drift, Mini, Quiet, Sets, Start, Where
from resdiag.errors import UsageError
from resdiag.training.interrupt import EXIT_CODES

if TYPE_CHECKING:
    from resdiag.study.ledger import Entry
    from resdiag.study.study import Study

_FAILED = 3


def run(
    where: Where,
    start: Start,
    settings: Sets = None,
    mini: Mini = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what would be run and its cost; run nothing."),
    ] = False,
    device: Device = "auto",
    runs: RunsRoot = Path("runs"),
    data_root: DataRoot = None,
    allow_drift: Drift = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Run the missing cells of a study. The same command continues an interrupted study."""
    study = open_study(where, settings, mini)
    if dry_run:
        _print_plan(study, runs, as_json)
        return 0
    job = {"device": device, "runs": runs, "data_root": data_root, "allow_drift": allow_drift}
    return _run(study, start, job, quiet, as_json)


def retry(
    where: Where,
    start: Start,
    cells: Annotated[
        list[str] | None, typer.Argument(metavar="[CELL]...", help="Ids of failed cells.")
    ] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Retry all failed cells.")] = False,
    settings: Sets = None,
    mini: Mini = False,
    device: Device = "auto",
    runs: RunsRoot = Path("runs"),
    data_root: DataRoot = None,
    allow_drift: Drift = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Run failed cells again, and all missing cells.

    A failed cell continues from its last commit.
    """
    study = open_study(where, settings, mini)
    from resdiag.study.failure import clear_failure
    from resdiag.study.ledger import read_entry

    if bool(cells) == failed:
        raise UsageError("name the cells, or pass --failed")
    ids = [study.cell(id).id for id in cells or []] or [cell.id for cell in study.cells]
    for id in ids:
        folder = study.folder(runs) / id
        if read_entry(folder).state == "failed":
            clear_failure(folder)
    job = {"device": device, "runs": runs, "data_root": data_root, "allow_drift": allow_drift}
    return _run(study, start, job, quiet, as_json)


def run_cell(
    where: Where,
    id: Annotated[str, typer.Argument(metavar="CELL", help="Id of the cell, see `study status`.")],
    settings: Sets = None,
    mini: Mini = False,
    device: Device = "auto",
    runs: RunsRoot = Path("runs"),
    data_root: DataRoot = None,
    allow_drift: Drift = False,
) -> int:
    """Run one cell to its end, unless it is done.

    It continues from its last commit. Engines call this.
    """
    study = open_study(where, settings, mini)
    study.cell(id)
    plan = study.write_plan(runs)
    from resdiag.study.work import Task, work

    task = Task(
        study=str(plan),
        cell=id,
        runs=str(runs),
        data_root=str(data_root) if data_root else "",
        device=device,
        allow_drift=allow_drift,
    )
    return work(task, say)


def _run(study: "Study", start: Start, about: dict[str, Any], quiet: bool, as_json: bool) -> int:
    """Start what is missing, wait, and say how it ended; `about` has attributes of the job."""
    from resdiag.study.engines.job import Job
    from resdiag.study.ledger import ENDED, read_ledger
    from resdiag.study.live import showing_progress

    runs, quiet = about["runs"], quiet or as_json
    entries = read_ledger(study, runs)
    before = [entry.id for entry in entries if entry.state == "failed"]
    cells = tuple(e.id for e in entries if e.state not in (*ENDED, "failed"))
    tell = keep_quiet if quiet else say
    if before:
        tell(f"{len(before)} cells failed before; `resdiag study retry` tries them again")
    stopped = 0
    if cells:
        if start.engine.is_local:
            _check_data(study, cells, about["data_root"])
        about = {**about, "data_root": str(about["data_root"] or "")}
        plan = study.write_plan(runs)
        job = Job(study=study, plan=plan, cells=cells, say=tell, slots=start.slots, **about)
        with showing_progress(job, quiet=quiet) as shown:
            stopped = start.engine.run(shown, **start.options)
    entries = read_ledger(study, runs)
    if as_json or not quiet:
        print_status(study, entries, as_json)
    if stopped:
        tell("stopped; the same command goes on")
        return EXIT_CODES[stopped]
    return _FAILED if any(entry.state == "failed" for entry in entries) else 0


def _check_data(study: "Study", cells: tuple[str, ...], data_root: Path | None) -> None:
    """Refuse a study whose data are not on this machine, once and not cell by cell."""
    from resdiag.data.registry import check_data, find_dataset

    for data in {study.cell(id).request.data: None for id in cells}:
        check_data(data)
        row, _ = find_dataset(data)
        if row.state(data_root) == "missing":
            raise row.missing(data_root)


def _print_plan(study: "Study", runs: Path, as_json: bool) -> None:
    """What `--dry-run` says."""
    from resdiag.study.estimate import estimate
    from resdiag.study.ledger import count_states, read_ledger
    from resdiag.study.live import describe

    entries = read_ledger(study, runs)
    left = estimate(study.cells, entries)
    if as_json:
        document: dict[str, Any] = {"schema": 1, "study": study.name, "left": asdict(left)}
        cells = [{"id": entry.id, "state": entry.state} for entry in entries]
        print(json.dumps({**document, "cells": cells}))
        return
    print_table(("cell", "state"), [(entry.id, entry.state) for entry in entries], False)
    counts = ", ".join(f"{number} {state}" for state, number in count_states(entries).items())
    print(f"{len(entries)} cells: {counts}\nleft: {describe(left)}")


def print_status(study: "Study", entries: "list[Entry]", as_json: bool) -> None:
    """The table of cells, or the document."""
    if as_json:
        print(json.dumps({"study": study.name, "cells": [entry.to_dict() for entry in entries]}))
        return
    from resdiag.study.live import sum_up

    rows = [(e.id, e.state, f"{e.step}/{e.steps}" if e.steps else "", e.message) for e in entries]
    print_table(("cell", "state", "steps", "message"), rows, False)
    print(f"cells in {entries[0].folder.parent}")
    print(sum_up(study, entries))
    sys.stdout.flush()
