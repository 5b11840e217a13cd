"""`resdiag study`: grids of runs, on whatever machines there are."""

import json
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resdiag.cli.app import group
from resdiag.cli.opening import open_study
from resdiag.cli.options import DataRoot, Json, RunsRoot
from resdiag.cli.output import keep_quiet, print_table, say
from resdiag.errors import UsageError, unknown
from resdiag.training.interrupt import EXIT_CODES

if TYPE_CHECKING:
    from resdiag.study.engines.job import Job
    from resdiag.study.ledger import Entry
    from resdiag.study.study import Study

study_app = group("Studies: one question, a grid of runs, any engine.")

ENGINES = ("local", "ray", "slurm")
FORMATS = ("sh", "json")
_FAILED = 3

Where = Annotated[
    str, typer.Argument(metavar="STUDY", help="A shipped study's name, FILE.toml, or a plan.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the study, e.g. fixed.lr=0.05."),
]
Mini = Annotated[
    bool, typer.Option("--mini", help="Shrink the study to seconds on a CPU, to see that it works.")
]
Engine = Annotated[str, typer.Option(help="Who starts the cells: local, ray or slurm.")]
Slots = Annotated[
    int | None,
    typer.Option(min=1, max=10_000, help="Cells at a time; as many as fit if not given."),
]
Each = Annotated[
    int,
    typer.Option(
        "--cells-per-device",
        min=1,
        max=32,
        help="local: cells that share one process per GPU and take turns at it; 1 is a process per "
        "cell. Without a GPU: so many in one process for the machine. Excludes --slots.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Drift = Annotated[
    bool, typer.Option("--allow-drift", help="Continue cells although versions or machine changed.")
]
Address = Annotated[str, typer.Option(help="ray: a cluster's address, or auto; else a local one.")]
Partition = Annotated[str, typer.Option(help="slurm: partition.")]
Minutes = Annotated[int, typer.Option("--time", min=1, help="slurm: minutes per job.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


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
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Where; it must not exist.")] = Path(
        "study.toml"
    ),
) -> None:
    """Write a commented study file to begin with."""
    from resdiag.runs.files import create_file
    from resdiag.study.shipped import TEMPLATE

    if path.suffix != ".toml":
        raise UsageError(f"{path} must end with .toml")
    if not create_file(path, TEMPLATE.format(name=shlex.quote(str(path))).encode()):
        raise UsageError(f"{path} exists already")
    print(path)


@study_app.command("run")
def run(
    where: Where,
    settings: Sets = None,
    mini: Mini = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be done and what it takes; do nothing."),
    ] = False,
    engine: Engine = "local",
    slots: Slots = None,
    each: Each = 1,
    device: Device = "auto",
    address: Address = "",
    partition: Partition = "",
    minutes: Minutes = 240,
    runs: RunsRoot = Path("runs"),
    data_root: DataRoot = None,
    allow_drift: Drift = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Run what is missing of a study. The same command continues it after whatever happened."""
    _check(engine, device, slots, each)
    study = open_study(where, settings, mini)
    if dry_run:
        _print_plan(study, runs, as_json)
        return 0
    chosen = _Choice(engine, slots, each, address, partition, minutes)
    how = _How(runs, data_root, device, allow_drift, quiet or as_json)
    return _run(study, chosen, how, as_json)


@study_app.command("retry")
def retry(
    where: Where,
    cells: Annotated[
        list[str] | None, typer.Argument(metavar="[CELL]...", help="Ids of failed cells.")
    ] = None,
    failed: Annotated[bool, typer.Option("--failed", help="All failed cells.")] = False,
    settings: Sets = None,
    mini: Mini = False,
    engine: Engine = "local",
    slots: Slots = None,
    each: Each = 1,
    device: Device = "auto",
    address: Address = "",
    partition: Partition = "",
    minutes: Minutes = 240,
    runs: RunsRoot = Path("runs"),
    data_root: DataRoot = None,
    allow_drift: Drift = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Run failed cells again, from their last commits, with all else that is missing."""
    _check(engine, device, slots, each)
    study = open_study(where, settings, mini)
    from resdiag.study.failure import clear_failure
    from resdiag.study.ledger import read_entry

    if bool(cells) == failed:
        raise UsageError("name the cells, or say --failed")
    ids = [study.cell(id).id for id in cells or []] or [cell.id for cell in study.cells]
    for id in ids:
        folder = study.folder(runs) / id
        if read_entry(folder).state == "failed":
            clear_failure(folder)
    chosen = _Choice(engine, slots, each, address, partition, minutes)
    how = _How(runs, data_root, device, allow_drift, quiet or as_json)
    return _run(study, chosen, how, as_json)


@study_app.command("cell")
def cell(
    where: Where,
    id: Annotated[str, typer.Argument(metavar="CELL", help="Id; `study status` lists them.")],
    settings: Sets = None,
    mini: Mini = False,
    device: Device = "auto",
    runs: RunsRoot = Path("runs"),
    data_root: DataRoot = None,
    allow_drift: Drift = False,
) -> int:
    """Bring one cell to its end, from its last commit; done already is fine. Engines call this."""
    _check("local", device)
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


@study_app.command("plan")
def plan(
    where: Where,
    settings: Sets = None,
    mini: Mini = False,
    form: Annotated[str, typer.Option("--format", help="sh: a command a line; json.")] = "sh",
    device: Device = "auto",
    runs: RunsRoot = Path("runs"),
    data_root: DataRoot = None,
) -> None:
    """Print the command of each missing cell, for any other scheduler: xargs, sbatch, ..."""
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    _check("local", device)
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
    """Say where each cell stands: done, running, stale, failed, diverged or missing."""
    study = open_study(where, settings, mini)
    from resdiag.study.ledger import read_ledger

    _print_status(study, read_ledger(study, runs), as_json)


@study_app.command("watch")
def watch(
    where: Where,
    settings: Sets = None,
    mini: Mini = False,
    once: Annotated[bool, typer.Option("--once", help="Draw one frame and end.")] = False,
    runs: RunsRoot = Path("runs"),
) -> None:
    """Watch a study run: progress, time left, errors, gradient norm by block of each cell."""
    study = open_study(where, settings, mini)
    from rich.console import Console
    from rich.live import Live

    from resdiag.study.ledger import read_ledger
    from resdiag.study.live import draw_study

    console = Console()
    if once or not console.is_terminal:
        if not console.is_terminal:
            console.width = 200
        console.print(draw_study(study, runs, 10_000))
        return
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(draw_study(study, runs, console.height), refresh=True)
                states = {entry.state for entry in read_ledger(study, runs)}
                if not states & {"running", "stale", "missing"}:
                    return
                time.sleep(1)
    except KeyboardInterrupt:  # the way to leave
        return


@dataclass(frozen=True)
class _Choice:
    """Which engine, and what it is told."""

    engine: str
    slots: int | None
    each: int
    address: str
    partition: str
    minutes: int


@dataclass(frozen=True)
class _How:
    """Where and how the cells run, whoever starts them."""

    runs: Path
    data_root: Path | None
    device: str
    allow_drift: bool
    quiet: bool


def _check(engine: str, device: str, slots: int | None = None, each: int = 1) -> None:
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise unknown("device", device, ["auto", "cpu", "cuda", "cuda:N"])
    if each > 1 and engine != "local":
        raise UsageError(f"--cells-per-device is for the local engine, not {engine}")
    if each > 1 and slots is not None:
        raise UsageError("--slots and --cells-per-device exclude each other")


def _run(study: "Study", chosen: _Choice, how: _How, as_json: bool) -> int:
    """Start what is missing, wait, and say how it ended."""
    from resdiag.study.engines.job import Job
    from resdiag.study.ledger import ENDED, read_ledger

    entries = read_ledger(study, how.runs)
    before = [entry.id for entry in entries if entry.state == "failed"]
    cells = tuple(e.id for e in entries if e.state not in (*ENDED, "failed"))
    talk = keep_quiet if how.quiet else say
    if before:
        talk(f"{len(before)} cells failed before; `resdiag study retry` tries them again")
    stopped = 0
    if cells:
        if chosen.engine == "local":
            _check_data(study, cells, how.data_root)
        job = Job(
            study=study,
            plan=study.write_plan(how.runs),
            cells=cells,
            runs=how.runs,
            data_root=str(how.data_root or ""),
            device=how.device,
            allow_drift=how.allow_drift,
            say=talk,
        )
        stopped = _start(job, chosen, how.quiet)
    entries = read_ledger(study, how.runs)
    if as_json or not how.quiet:
        _print_status(study, entries, as_json)
    if stopped:
        talk("stopped; the same command goes on")
        return EXIT_CODES[stopped]
    return _FAILED if any(entry.state == "failed" for entry in entries) else 0


def _start(job: "Job", chosen: _Choice, quiet: bool) -> int:
    """Run a job under the engine that was chosen; returns the signal that stopped it, or 0."""
    from resdiag.study.display import watching

    with watching(job, quiet=quiet) as watched:
        if chosen.engine == "local":
            from resdiag.study.engines.local import Local, find_slots

            slots = find_slots(watched, chosen.slots, chosen.each)
            return Local(watched, slots, chosen.each).run()
        if chosen.engine == "ray":
            from resdiag.study.engines.ray import run_on_ray

            return run_on_ray(watched, chosen.address, chosen.slots)
        from resdiag.study.engines.slurm import run_on_slurm

        return run_on_slurm(watched, chosen.partition, chosen.minutes, chosen.slots)


def _check_data(study: "Study", cells: tuple[str, ...], data_root: Path | None) -> None:
    """Refuse a study whose data are not on this machine, once and not cell by cell."""
    from resdiag.data.registry import check_data, find_dataset

    for data in {study.cell(id).request.data: None for id in cells}:
        check_data(data)
        if find_dataset(data)[0].state(data_root) == "missing":
            raise UsageError(
                f"{data} is not on this disk",
                f"`resdiag data get {data}` downloads it; --set fixed.data=digits needs none",
            )


def _print_plan(study: "Study", runs: Path, as_json: bool) -> None:
    """What `--dry-run` says."""
    from resdiag.study.estimate import estimate
    from resdiag.study.ledger import count_states, read_ledger
    from resdiag.study.live import describe

    entries = read_ledger(study, runs)
    left = estimate(study.cells, entries)
    if as_json:
        document: dict[str, Any] = {"schema": 1, "study": study.name, "left": left.to_dict()}
        cells = [{"id": entry.id, "state": entry.state} for entry in entries]
        print(json.dumps({**document, "cells": cells}))
        return
    print_table(("cell", "state"), [(entry.id, entry.state) for entry in entries], False)
    counts = ", ".join(f"{number} {state}" for state, number in count_states(entries).items())
    print(f"{len(entries)} cells: {counts}\nleft: {describe(left)}")


def _print_status(study: "Study", entries: "list[Entry]", as_json: bool) -> None:
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
