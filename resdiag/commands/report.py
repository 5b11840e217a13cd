"""`resdiag study report` and `freeze`: what a study came to, for people and for the repository."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resdiag.commands.options import Json, RunsRoot
from resdiag.commands.output import say
from resdiag.errors import UsageError

if TYPE_CHECKING:
    from resdiag.report.results import Results

Where = Annotated[
    str,
    typer.Argument(
        metavar="STUDY", help="A shipped study's name, FILE.toml, a plan, or frozen results."
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="As it was given to `study run`."),
]
Mini = Annotated[bool, typer.Option("--mini", help="As it was given to `study run`.")]


def freeze_study(
    where: Where,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder, e.g. studies/results/explosion.")
    ],
    settings: Sets = None,
    mini: Mini = False,
    steps: Annotated[
        int, typer.Option(min=2, max=1000, help="Recorded steps to keep of each run.")
    ] = 8,
    add: Annotated[
        bool, typer.Option("--add", help="Keep the cells that the folder holds, and add to them.")
    ] = False,
    runs: RunsRoot = Path("runs"),
    as_json: Json = False,
) -> None:
    """Write a study's results as three small files, which `study report` reads without the runs.

    What the folder holds is replaced; with --add, cells of other seeds or other machines are kept.
    """
    results = _read(where, settings, mini, runs, steps)
    if not any(item.run for item in results.cells):
        raise UsageError(f"no cell of {results.study.name} was begun under {runs}")
    from resdiag.report.frozen import freeze, is_frozen, thaw

    if add and is_frozen(out):
        from resdiag.report.merge import merge

        results = merge(thaw(out), results)
    files = freeze(results, out)
    left = [item.cell.id for item in results.cells if not item.ended]
    if left:
        say(f"{len(left)} of {len(results.cells)} cells have not ended: {', '.join(left[:5])}")
    if as_json:
        print(json.dumps({"schema": 1, "files": [str(path) for path in files]}))
        return
    for path in files:
        print(path)


def report_study(
    where: Where,
    settings: Sets = None,
    mini: Mini = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder; `report` in the study's folder if not given."),
    ] = None,
    runs: RunsRoot = Path("runs"),
    as_json: Json = False,
) -> None:
    """Write what a study came to as one HTML page, as Markdown, and its figures with their data.

    An unfinished study has a report, too: it says what is missing. STUDY may be a folder that
    `study freeze` wrote.
    """
    results = _read(where, settings, mini, runs)
    from resdiag.report.write import write_report

    frozen = results.source == where
    folder = out or (Path("reports") / results.study.name if frozen else Path(results.source))
    files = write_report(results, folder if out or frozen else folder / "report")
    if as_json:
        print(json.dumps({"schema": 1, "files": [str(path) for path in files]}))
        return
    print(files[0])


def _read(
    where: str, settings: list[str] | None, mini: bool, runs: Path, steps: int | None = None
) -> "Results":
    """The results of a study: frozen ones, or those of the run folders."""
    from resdiag.study.study import load_study

    if (Path(where) / "results.json").is_file():
        if settings or mini:
            raise UsageError(f"{where} is frozen and is not changed by --set or --mini")
        from resdiag.report.frozen import thaw

        return thaw(Path(where))
    study = load_study(where, settings or (), mini=mini)
    from resdiag.report.collect import STEPS, collect

    return collect(study, runs, steps=steps or STEPS)
