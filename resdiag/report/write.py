"""A report as files: the page, its Markdown, and every figure with its data."""

import datetime
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import resdiag
from resdiag.diagnose.verdict import judge
from resdiag.plots.kinds import KINDS
from resdiag.report.figures import Drawings, draw_figures, draw_runs
from resdiag.report.parts import Page, Picture
from resdiag.report.render import to_html, to_markdown
from resdiag.report.results import Results
from resdiag.report.runpage import choose_plots, write_run_page
from resdiag.report.sections import write_page
from resdiag.runs.files import make_folder, write_file

if TYPE_CHECKING:
    from resdiag.runs.folder import Run

PAGE, TEXT, FIGURES = "report.html", "report.md", "figures"


def write_report(
    results: Results, folder: Path, *, every: bool = True, pdf: bool = True
) -> list[Path]:
    """Write the report of a study; a file that is there is replaced, each at once.

    Args:
        results: Of a study, finished or not.
        folder: Where; created if it is not there.
        every: Whether every drawing of a figure is made, or that of the deepest networks only.
        pdf: Whether figures are written as PDF, too.

    Returns:
        The page first, then the others.

    Raises:
        StorageError: The folder cannot be written.
    """
    pictures = list(draw_figures(results, Drawings(deepest=not every, pdf=pdf)))
    return _write(write_page(results, pictures), pictures, folder)


def write_run_report(
    runs: "Sequence[Run]", folder: Path, *, every: bool = True, pdf: bool = True
) -> list[Path]:
    """Write the report of one run, or of several side by side.

    Args:
        runs: At least one; they may be in progress.
        folder: Where; created if it is not there.
        every: Whether every kind of plot is drawn, or those only that the verdict advises, the
            curves, and those that other packages have added.
        pdf: Whether figures are written as PDF, too.

    Returns:
        The page first, then the others.

    Raises:
        StorageError: The folder cannot be written.
        UsageError: A run is damaged.
    """
    kinds = [kind.name for kind in KINDS.values() if len(runs) > 1 or not kind.compares]
    verdicts = [judge(run) for run in runs]
    only = None if every else choose_plots(verdicts)
    pictures = list(draw_runs(kinds, runs, Drawings(only=only, pdf=pdf)))
    return _write(write_run_page(runs, pictures, verdicts), pictures, folder)


def made_by() -> str:
    """Version and day, for the foot of a page."""
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"Made by resdiag {resdiag.__version__} on {day}."


def _write(page: Page, pictures: Sequence[Picture], folder: Path) -> list[Path]:
    page = replace(page, made=made_by())
    make_folder(folder / FIGURES)
    files = {folder / PAGE: to_html(page).encode(), folder / TEXT: to_markdown(page).encode()}
    for picture in pictures:
        stem = folder / FIGURES / picture.name
        if picture.svg:
            files[Path(f"{stem}.svg")] = picture.file().encode()
        if picture.pdf:
            files[Path(f"{stem}.pdf")] = picture.pdf
        if picture.csv:
            files[Path(f"{stem}.csv")] = picture.csv.encode()
    for path, data in files.items():
        write_file(path, data)
    return list(files)
