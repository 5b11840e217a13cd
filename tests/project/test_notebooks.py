"""The notebooks of the documentation, executed and compared with what is committed."""

import base64
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def books(request, tmp_path_factory):
    """A notebook as committed, and as executed now."""
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    sys.path.insert(0, str(request.param.parent))
    try:
        from execute import execute
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("notebook")
    return nbformat.read(request.param, as_version=4), execute(request.param, folder)


def outputs(book):
    return [cell.get("outputs", []) for cell in book.cells]


def shown(book, kind):
    return [o.data[kind] for of in outputs(book) for o in of if kind in o.get("data", {})]


def test_there_is_a_notebook():
    assert NOTEBOOKS


def test_every_cell_runs_and_says_nothing_else(books):
    for of in outputs(books[1]):
        assert not [o for o in of if o.output_type == "error" or o.get("name") == "stderr"]


def test_figures_are_pictures_without_a_magic_command(books):
    now = [base64.b64decode(text) for text in shown(books[1], "image/png")]
    assert len(now) == len(shown(books[0], "image/png")) >= 2
    for png in now:
        assert png.startswith(b"\x89PNG")
        assert int.from_bytes(png[16:20], "big") == 7 * 150  # inches by pixels per inch


def test_verdict_monitor_and_blocks_are_tables(books):
    tables = [html for html in shown(books[1], "text/html") if "<table" in html]
    verdict, monitor, *_, blocks = tables
    assert "grows_at_init" in verdict
    for html in (monitor, blocks):
        assert html.count("<tr>") == 1 + 16
        assert "layer4.2" in html


def test_what_is_committed_is_what_is_shown_today(books):
    """Word for word but for numbers, whose last digits differ between processors."""
    committed, now = ([_words(o) for of in outputs(book) for o in of] for book in books)
    assert committed == now
    assert not re.search(r"/(home|root|tmp|work|Users)/", str(committed))


def _words(output):
    text = output.get("text") or output.data.get("text/plain", "")
    return output.output_type, re.sub(r"[\d.e+-]+", "#", text)
