"""Pages of the documentation from results that are committed: text, and figures by their data.

A page is compared as text. Figures are compared by the SHA-256 of their data: drawings differ in
their last digits between releases of matplotlib.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from resdiag.report.answer import answer
from resdiag.report.expected import judge_all
from resdiag.report.figures import Drawings, draw_figures
from resdiag.report.parts import Picture
from resdiag.report.render import escape, to_markdown
from resdiag.report.results import Results
from resdiag.report.sections import write_page
from resdiag.report.storage import RESULTS, read_results
from resdiag.runs.files import make_folder, write_file


def committed_studies(root: Path) -> list[str]:
    """Names of the studies whose frozen results lie below `root`."""
    return sorted(path.parent.name for path in root.glob(f"*/{RESULTS}"))


def study_page(root: Path, name: str) -> str:
    """The page of a study, with one drawing of each of its figures."""
    page = write_page(_thaw(root / name), _chosen(root / name))
    again = (
        f"\nThis page is made from `studies/results/{name}`. To draw all figures and list all "
        "verdicts, run:\n"
        f"\n```sh\nresdiag study report studies/results/{name}\n```\n"
    )
    title = f"{name}: {page.question}"
    return to_markdown(page, title=title, figures=f"figures/{name}", bulky=False) + again


def index_page(root: Path, more: Sequence[str] = ()) -> str:
    """A table of the studies with results: question, answer, data.

    Args:
        root: Folder of the results.
        more: Names of further pages for the table of contents.
    """
    names = committed_studies(root)
    rows = []
    for name in names:
        results = _thaw(root / name)
        said = answer(results, judge_all(results))
        data = ", ".join(dict.fromkeys(item.data for item in results.cells if item.run))
        question = escape(results.study.file.question)
        rows.append(f"| [{name}]({name}.md) | {question} | {escape(said.headline)} | {data} |")
    table = ["| study | question | answer | data |", "| --- | --- | --- | --- |", *rows, ""]
    toc = ["```{toctree}", ":hidden:", "", *more, *names, "```", ""]
    about = (
        "Each page is generated from the results in `studies/results`; no number and no answer is "
        "written by hand. To run a study again, use `resdiag study run NAME`.\n"
    )
    nothing = "No study has committed results yet.\n"
    body = [*table, *toc] if names else [nothing]
    return "\n".join(["# Studies\n", about, *body])


def digests(root: Path, name: str) -> dict[str, str]:
    """SHA-256 of the data of each figure on a study's page."""
    return {
        picture.name: hashlib.sha256(picture.csv.encode()).hexdigest()
        for picture in _chosen(root / name)
        if picture.csv
    }


def write_figures(root: Path, name: str, folder: Path) -> list[Path]:
    """Draw the figures of a study's page.

    Returns:
        The files.
    """
    wanted = set(digests(root, name))
    make_folder(folder)
    files = []
    for picture in draw_figures(_thaw(root / name), Drawings(only=wanted)):
        if picture.svg:
            path = folder / f"{picture.name}.svg"
            write_file(path, picture.file().encode())
            files.append(path)
    return files


@lru_cache(maxsize=8)
def _thaw(folder: Path) -> Results:
    return read_results(folder)


@lru_cache(maxsize=8)
def _chosen(folder: Path) -> Sequence[Picture]:
    """Of the drawings of a figure the first of the deepest networks; not drawn yet."""
    found = list(draw_figures(_thaw(folder), Drawings(only=())))
    numbers = dict.fromkeys(picture.number for picture in found)
    return [
        max((p for p in found if p.number == number), key=lambda picture: picture.depth)
        for number in numbers
    ]
