"""`resdiag plot`: draw runs."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resdiag.cli.opening import open_runs
from resdiag.cli.options import Json, RunPaths, RunsRoot
from resdiag.cli.output import print_files, print_table
from resdiag.errors import UsageError, unknown

if TYPE_CHECKING:
    from resdiag.runs.folder import Run


def plot(
    kind: Annotated[
        str, typer.Argument(help="Kind of plot, see `--list`, or name of a metric.")
    ] = "",
    paths: RunPaths = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Output file, with or without extension.")
    ] = None,
    formats: Annotated[
        str, typer.Option("--format", "-f", help="svg, png, pdf, or several separated by commas.")
    ] = "svg,png",
    step: Annotated[int | None, typer.Option(help="Recorded step for plots by block.")] = None,
    theory: Annotated[bool, typer.Option(help="Also draw the prediction of theory.")] = True,
    list_kinds: Annotated[bool, typer.Option("--list", help="List the kinds of plots.")] = False,
    runs: RunsRoot = Path("runs"),
    as_json: Json = False,
) -> None:
    """Plot one run, or several runs on the same axes."""
    from resdiag.catalog.table import METRICS
    from resdiag.plots.kinds import KINDS, find_kind

    if list_kinds or not kind:
        rows = [(entry.name, entry.question, entry.reading) for entry in KINDS.values()]
        print_table(("kind", "question", "read"), rows, as_json)
        return
    stem, endings = _plan_files(out, formats)
    if re.fullmatch(r"[a-z][a-z0-9_]*", kind) and kind not in {**KINDS, **METRICS}:
        try:
            opened = open_runs(paths, runs)  # only the runs know their custom metrics
        except UsageError:
            find_kind(kind)  # a mistyped kind is told before a missing run
            raise
        entry = find_kind(kind, [metric for run in opened for metric in run.custom_metrics])
    else:
        entry = find_kind(kind)
        opened = open_runs(paths, runs)
    from resdiag.plots.drawing import draw
    from resdiag.plots.figurefile import save

    figure = draw(entry.name, opened, step=step, theory=theory)
    files = save(figure, stem or _default_stem(entry.name, opened), endings)
    print_files(files, as_json, kind=entry.name)


def _plan_files(out: Path | None, formats: str) -> tuple[Path | None, list[str]]:
    """Where to draw and in which formats; an ending in `--out` is a format."""
    from resdiag.plots.figurefile import FORMATS

    endings = [word.strip() for word in formats.split(",") if word.strip()]
    if out is not None and out.suffix[1:] in FORMATS:
        out, endings = out.with_suffix(""), [out.suffix[1:]]
    for ending in endings or [""]:
        if ending not in FORMATS:
            raise unknown("format", ending, FORMATS)
    return out, endings


def _default_stem(kind: str, opened: "Sequence[Run]") -> Path:
    """A plot of one run goes into the run's folder, of several into `figures`."""
    if len(opened) == 1:
        return opened[0].path / "figures" / kind
    return Path("figures") / f"{kind}-{len(opened)}-runs"
