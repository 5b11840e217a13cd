"""`resdiag study`: list, init, plan, status, watch; what starts cells is in `study_run`."""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from resdiag.cli.app import group
from resdiag.cli.opening import open_study
from resdiag.cli.options import DataRoot, Device, Json, RunsRoot
from resdiag.cli.output import print_table
from resdiag.cli.study_options import Mini, Sets, Where, with_engine
from resdiag.cli.study_run import print_status, retry, run, run_cell
from resdiag.errors import UsageError, unknown
from resdiag.terminal import can_redraw, open_console, width_of

study_app = group("Studies: one question, a grid of runs, any engine.")

FORMATS = ("sh", "json")


@study_app.command("list")
def list_studies(as_json: Json = False) -> None:
    """List the shipped studies: question, cells, cost."""
    from resdiag.study.shipped import shipped_studies
    from resdiag.study.study import load_study

    studies = [load_study(name) for name in shipped_studies()]
    if as_json:
        said = [
            {"study": s.name, "question": s.file.question, "cells": len(s.cells),
             "cost": s.file.cost} for s in studies
        ]  # fmt: skip
        print(json.dumps(said))
        return
    rows = [(s.name, s.file.question, str(len(s.cells)), s.file.cost) for s in studies]
    print_table(("study", "question", "cells", "cost"), rows, False)


@study_app.command("init")
def init(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="File to write; must not exist.")
    ] = Path("study.toml"),
) -> None:
    """Write a commented study file to begin with."""
    from resdiag.runs.files import create_file
    from resdiag.study.shipped import study_template

    if path.suffix != ".toml":
        raise UsageError(f"{path} must end with .toml")
    if not create_file(path, study_template(shlex.quote(str(path))).encode()):
        raise UsageError(f"{path} exists already")
    print(path)


study_app.command("run")(with_engine(run))
study_app.command("retry")(with_engine(retry))
study_app.command("cell")(run_cell)


@study_app.command("plan")
def plan(
    where: Where,
    settings: Sets = None,
    mini: Mini = False,
    form: Annotated[
        str, typer.Option("--format", help="sh (one command per line) or json.")
    ] = "sh",
    device: Device = "auto",
    runs: RunsRoot = Path("runs"),
    data_root: DataRoot = None,
) -> None:
    """Print one command per missing cell, for other schedulers.

    These are xargs, sbatch and the like.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    study = open_study(where, settings, mini)
    from resdiag.study.ledger import ENDED, read_ledger

    path = study.write_plan(runs)
    options = ["--runs", str(runs), *(["--device", device] if device != "auto" else [])]
    options += ["--data-root", str(data_root)] if data_root else []
    missing = [
        (entry, ["resdiag", "study", "cell", str(path), entry.id, *options])
        for entry in read_ledger(study, runs)
        if entry.state not in ENDED
    ]
    if form == "sh":
        for _, command in missing:
            print(shlex.join(command))
        return
    needs = study.file.resources.model_dump()
    cells = [{"id": entry.id, "state": entry.state, "command": words} for entry, words in missing]
    document = {"schema": 1, "study": study.name, "plan": str(path), "resources": needs}
    print(json.dumps({**document, "cells": cells}))


@study_app.command("status")
def status(
    where: Where,
    settings: Sets = None,
    mini: Mini = False,
    runs: RunsRoot = Path("runs"),
    as_json: Json = False,
) -> None:
    """Print the state of each cell.

    It is done, running, stale, failed, diverged or missing.
    """
    study = open_study(where, settings, mini)
    from resdiag.study.ledger import read_ledger

    print_status(study, read_ledger(study, runs), as_json)


@study_app.command("watch")
def watch(
    where: Where,
    settings: Sets = None,
    mini: Mini = False,
    once: Annotated[bool, typer.Option("--once", help="Print the table once and exit.")] = False,
    runs: RunsRoot = Path("runs"),
) -> None:
    """Show the progress of a study live.

    Time left, and of each cell its error and its gradient norm by block.
    """
    study = open_study(where, settings, mini)
    from rich.live import Live

    from resdiag.study.ledger import read_ledger
    from resdiag.study.live import draw_study

    console = open_console(sys.stdout)
    if once or not can_redraw(sys.stdout):
        console.print(draw_study(study, read_ledger(study, runs), 10_000, console.width))
        return
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                entries = read_ledger(study, runs)
                console.width = width_of(sys.stdout)
                frame = draw_study(study, entries, console.height, console.width)
                live.update(frame, refresh=True)
                if not {entry.state for entry in entries} & {"running", "stale", "missing"}:
                    return
                time.sleep(1)
    except KeyboardInterrupt:  # the way to leave
        return
