"""`resdiag export`: hand runs to other tools."""

import json
from pathlib import Path
from typing import Annotated

import typer

from resdiag.cli.opening import open_runs
from resdiag.cli.options import Json, RunPaths, RunsRoot
from resdiag.errors import UsageError, unknown
from resdiag.trackers.tracker import TABLES, TRACKERS


def export(
    paths: RunPaths = None,
    to: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="KIND PATH",
            help=f"{' or '.join(TABLES)} and a folder; "
            + "; ".join(f"{k.name} and {k.export_place or k.place}" for k in TRACKERS.values())
            + ".",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Metric per block to send to a tracker, instead of the default ones; repeatable."
        ),
    ] = None,
    runs: RunsRoot = Path("runs"),
    as_json: Json = False,
) -> None:
    """Write runs as tables or to a tracker."""
    from resdiag.trackers.tags import SHOWN, check_metrics

    if to is None:
        raise UsageError("--to is required: a format and a place", "resdiag export --to csv tables")
    kind, place = to
    if kind not in (*TABLES, *TRACKERS):
        raise unknown("kind of export", kind, (*TABLES, *TRACKERS))
    if kind in TRACKERS:
        TRACKERS[kind].check_installed()
    check_metrics(metric or ())
    if metric and kind in TABLES:
        raise UsageError(f"--metric is for trackers: a {kind} table has every metric")
    opened = open_runs(paths, runs)
    from resdiag.trackers.export import export_tables, export_tracker

    if kind in TABLES:
        written = [str(file) for file in export_tables(opened, kind, Path(place))]
    else:
        written = [export_tracker(run, kind, place, metric or SHOWN) for run in opened]
    if as_json:
        names = [str(run.path) for run in opened]
        print(json.dumps({"schema": 1, "kind": kind, "runs": names, "written": written}))
        return
    for line in dict.fromkeys(written):
        print(line)
