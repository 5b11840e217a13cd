"""Reports of runs and of studies, for people; frozen results, for the repository."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resdiag.cli.opening import open_runs, open_study
from resdiag.cli.options import Json, RunPaths, RunsRoot
from resdiag.cli.output import print_files, say
from resdiag.errors import UsageError

if TYPE_CHECKING:
    from resdiag.report.results import Results

Where = Annotated[
    str,
    typer.Argument(
        metavar="STUDY", help="Name of a shipped study, study file, plan file, or frozen results."
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Same as for `study run`."),
]
Mini = Annotated[bool, typer.Option("--mini", help="Same as for `study run`.")]


AllFigures = Annotated[
    bool,
    typer.Option("--all-figures", help="Draw everything: it takes several times as long."),
]
Pdf = Annotated[bool, typer.Option("--pdf", help="Write each figure as PDF, too.")]

MOST_RUNS = 12
"""Runs that one page can show side by side."""


def report(
    paths: RunPaths = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder; default: `report` in the run's folder."),
    ] = None,
    every: AllFigures = False,
    pdf: Pdf = False,
    runs: RunsRoot = Path("runs"),
    as_json: Json = False,
) -> None:
    """Write one HTML page about one run, or about several.

    The same text is written as Markdown, and every figure as SVG, with its data as CSV. The curves
    and what the verdict advises are drawn, or all kinds of plots with --all-figures. For a study,
    use `resdiag study report`.
    """
    for path in paths or []:
        _refuse_study(path)
    opened = open_runs(paths, runs)
    if len(opened) > MOST_RUNS:
        raise UsageError(
            f"{len(opened)} runs: one page shows at most {MOST_RUNS}",
            "name some of them; `resdiag study report STUDY` is for the runs of a study",
        )
    from resdiag.report.write import write_run_report

    one = opened[0].path / "report"
    folder = out or (one if len(opened) == 1 else Path("reports") / f"{len(opened)}-runs")
    files = write_run_report(opened, folder, every=every, pdf=pdf)
    print_files(files if as_json else files[:1], as_json)


def _refuse_study(path: Path) -> None:
    """A study, by its file, its folder, its results or its name, has another report."""
    frozen, plan = path / "results.json", next(path.glob("plan-*.json"), None)
    if path.suffix == ".toml" or plan or frozen.is_file() or _is_shipped(path):
        where = f" --runs {path.parent}" if plan else ""
        raise UsageError(f"{path} is a study", f"resdiag study report {path}{where}")


def _is_shipped(path: Path) -> bool:
    from resdiag.study.shipped import shipped_studies

    return not path.exists() and str(path) in shipped_studies()


def freeze_study(
    where: Where,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder, e.g. studies/results/explosion.")
    ],
    settings: Sets = None,
    mini: Mini = False,
    steps: Annotated[
        int, typer.Option(min=2, max=1000, help="Number of recorded steps to keep per run.")
    ] = 8,
    add: Annotated[
        bool, typer.Option("--add", help="Add to the cells in the folder, do not replace them.")
    ] = False,
    runs: RunsRoot = Path("runs"),
    as_json: Json = False,
) -> None:
    """Save the results of a study as three small files.

    `study report` then needs no runs. The content of the folder is replaced. With --add, cells of
    other seeds or machines are kept.
    """
    results = _read(where, settings, mini, runs, steps)
    _refuse_empty(results, runs)
    from resdiag.report.storage import is_frozen, read_results, write_results

    if add and is_frozen(out):
        from resdiag.report.merge import merge

        results = merge(read_results(out), results)
    files = write_results(results, out)
    left = [item.cell.id for item in results.cells if not item.ended]
    if left:
        say(f"{len(left)} of {len(results.cells)} cells have not ended: {', '.join(left[:5])}")
    print_files(files, as_json)


def report_study(
    where: Where,
    settings: Sets = None,
    mini: Mini = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder; default: `report` in the study's folder."),
    ] = None,
    every: AllFigures = False,
    pdf: Pdf = False,
    runs: RunsRoot = Path("runs"),
    as_json: Json = False,
) -> None:
    """Write the results of a study as one HTML page.

    It is also written as Markdown, with its figures and their data. The study may be unfinished:
    the report lists what is missing. STUDY may also be a folder that `study freeze` wrote. Of a
    figure that is split, by depth for instance, the drawing of the deepest networks is made, or
    every one with --all-figures.
    """
    results = _read(where, settings, mini, runs)
    _refuse_empty(results, runs)
    from resdiag.report.write import write_report

    frozen = results.source == where
    folder = out or (Path("reports") / results.study.name if frozen else Path(results.source))
    folder = folder if out or frozen else folder / "report"
    files = write_report(results, folder, every=every, pdf=pdf)
    print_files(files if as_json else files[:1], as_json)


def _refuse_empty(results: "Results", runs: Path) -> None:
    """A study of which nothing was run has no results to write about."""
    if not any(item.run for item in results.cells):
        name = results.study.name
        raise UsageError(
            f"no cell of {name} was begun under {runs}: there are no results",
            f"resdiag study run {name} --runs {runs}",
        )


def _read(
    where: str, settings: list[str] | None, mini: bool, runs: Path, steps: int | None = None
) -> "Results":
    """The results of a study: frozen ones, or those of the run folders."""
    if (Path(where) / "results.json").is_file():
        if settings or mini:
            raise UsageError(f"{where} is frozen and is not changed by --set or --mini")
        from resdiag.report.storage import read_results

        return read_results(Path(where))
    study = open_study(where, settings, mini)
    from resdiag.report.collect import STEPS, collect

    return collect(study, runs, steps=steps or STEPS)
