"""`resdiag export`: hand runs to other tools."""

import json
from pathlib import Path
from typing import Annotated

import typer

from resdiag.cli.opening import open_runs
from resdiag.cli.options import Json, RunsRoot
from resdiag.errors import UsageError, unknown


def export(
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN]...", help="Runs; the latest if none.")
    ] = None,
    to: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="KIND PATH",
            help="csv or jsonl and a folder; tensorboard or wandb and a folder; mlflow and a "
            "SQLite file or tracking URI.",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Block-level metric for a tracker, instead of the usual ones; repeat."),
    ] = None,
    runs: RunsRoot = Path("runs"),
    as_json: Json = False,
) -> None:
    """Write runs as tables, or into TensorBoard, W&B or MLflow; prints what was written."""
    from resdiag.trackers.sink import check_installed
    from resdiag.trackers.tags import SHOWN, check_metrics

    tables, trackers = ("csv", "jsonl"), ("tensorboard", "wandb", "mlflow")
    if to is None:
        raise UsageError("--to says what to write and where", "resdiag export --to csv tables")
    kind, place = to
    if kind not in (*tables, *trackers):
        raise unknown("kind of export", kind, (*tables, *trackers))
    check_installed(kind)
    check_metrics(metric or ())
    if metric and kind in tables:
        raise UsageError(f"--metric is for trackers: a {kind} table has every metric")
    opened = open_runs(paths, runs)
    from resdiag.trackers.export import export_tables, export_tracker

    if kind in tables:
        written = [str(file) for file in export_tables(opened, kind, Path(place))]
    else:
        written = [export_tracker(run, kind, place, metric or SHOWN) for run in opened]
    if as_json:
        names = [str(run.path) for run in opened]
        print(json.dumps({"schema": 1, "kind": kind, "runs": names, "written": written}))
        return
    for line in dict.fromkeys(written):
        print(line)
