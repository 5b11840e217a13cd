"""A report as files: the page, its Markdown, and every figure with its data."""

import datetime
from pathlib import Path

import resdiag
from resdiag.report.figures import draw_figures
from resdiag.report.html import to_html
from resdiag.report.markdown import to_markdown
from resdiag.report.results import Results
from resdiag.report.sections import write_page
from resdiag.runs.files import make_folder, write_file

PAGE, TEXT, FIGURES = "report.html", "report.md", "figures"


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write a report; a file that is there is replaced, each at once.

    Args:
        results: Of a study, finished or not.
        folder: Where; created if it is not there.

    Returns:
        The page first, then the others.

    Raises:
        StorageError: The folder cannot be written.
    """
    pictures = list(draw_figures(results))
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    page = write_page(results, pictures, f"Made by resdiag {resdiag.__version__} on {day}.")
    make_folder(folder / FIGURES)
    files = {folder / PAGE: to_html(page).encode(), folder / TEXT: to_markdown(page).encode()}
    for picture in pictures:
        if picture.svg is not None:
            stem = folder / FIGURES / picture.name
            files[stem.with_name(f"{stem.name}.svg")] = picture.file().encode()
            files[stem.with_name(f"{stem.name}.pdf")] = picture.pdf
            files[stem.with_name(f"{stem.name}.csv")] = picture.csv.encode()
    for path, data in files.items():
        write_file(path, data)
    return list(files)
