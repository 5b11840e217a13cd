"""Pages from committed results: text by rule, figures by the digest of their data."""

import json
import re
from pathlib import Path

import pytest
from made_studies import make_results, make_study

from resdiag.catalog.table import METRICS
from resdiag.diagnose.learning import AT_RISK
from resdiag.report import committed
from resdiag.report.render import escape
from resdiag.report.storage import write_results
from resdiag.runs.config import from_stored
from resdiag.theory.prediction import CRITICAL

ROOT = Path(__file__).resolve().parents[2]
SPLIT = """
question = "q"
[fixed]
data = "digits"
[grid]
variant = ["elu", "elu_pre", "plain"]
depth = [8, 14, 20, 26]
[[figure]]
plot = "gradnorms"
"""


@pytest.fixture
def root(tmp_path):
    write_results(make_results(make_study(SPLIT, name="split")), tmp_path / "split")
    return tmp_path


def test_the_page_has_question_answer_commands_and_one_drawing_a_figure(root):
    page = committed.study_page(root, "split")
    assert page.startswith("# split: q\n")
    assert "resdiag study report studies/results/split" in page
    assert re.findall(r"!\[[^]]*\]\(([^)]*)\)", page) == [
        "figures/split/01-gradnorms-depth-26.svg"  # the deepest of four
    ]
    assert "Verdicts of" not in page
    assert committed.study_page(root, "split") == page


def test_the_index_lists_what_there_is(root, tmp_path_factory):
    assert "| [split](split.md) | q |" in committed.index_page(root)
    assert "No study has committed results yet" in committed.index_page(
        tmp_path_factory.mktemp("none")
    )


def test_digests_follow_the_data_and_drawings_their_names(root, tmp_path):
    before = committed.digests(root, "split")
    files = committed.write_figures(root, "split", tmp_path / "figures")
    assert {path.stem for path in files} == set(before)
    assert all(path.stat().st_size > 10_000 for path in files)
    other = make_results(make_study(SPLIT, name="split"), broken=lambda request: 6)
    write_results(other, root / "other")
    assert set(committed.digests(root, "other")) == set(before)
    assert committed.digests(root, "other") != before


def lacks(old, new, place=""):
    """Where `new` has not what `old` has; settings that a later version knows may be more."""
    if isinstance(old, dict) and isinstance(new, dict):
        gone = [f"{place}.{key}" for key in old.keys() - new.keys()]
        pairs = [(old[key], new[key], f"{place}.{key}") for key in old.keys() & new.keys()]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        gone, pairs = (
            [],
            [(a, b, f"{place}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=True))],
        )
    else:
        return [] if old == new else [place]
    return gone + [where for pair in pairs for where in lacks(*pair)]


@pytest.mark.parametrize("name", committed.committed_studies(ROOT / "studies" / "results"))
def test_committed_results_are_whole_small_and_say_where_they_are_from(name, tmp_path):
    folder = ROOT / "studies" / "results" / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3_000_000
    results = committed.read_results(folder)
    assert results.study.name == name
    for item in results.cells:
        if item.run:
            assert item.run.data["sha256"]
            assert item.run.environment["torch"]
            assert item.run.environment["device"]
    text = (folder / "results.json").read_text("utf-8")
    assert not re.search(r"(?<![\w.~])/(home|root|tmp|work|Users)/", text)
    drawn = json.loads((ROOT / f"docs/studies/figures/{name}.json").read_text("utf-8"))
    files = {path.stem for path in (ROOT / "docs/studies/figures" / name).glob("*.svg")}
    assert files == set(drawn)
    write_results(results, tmp_path / "again")  # nothing is lost by reading and writing
    again = json.loads((tmp_path / "again" / "results.json").read_text("utf-8"))
    assert lacks(from_stored(json.loads(text)), again) == []


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("73.61 %", "73.61 %"), ("-", "\\-"), ("1. one", "1\\. one"), ("- x", "\\- x"),
        ("a_b", "a\\_b"), ("<b>", "\\<b\\>"), ("a\nb", "a b"), ("# h", "\\# h"),
    ],
)  # fmt: skip
def test_text_is_escaped_and_numbers_are_left_alone(text, written):
    assert escape(text) == written


def test_the_rule_of_thumb_about_the_first_step_states_what_the_study_shows():
    explosion = committed.read_results(ROOT / "studies" / "results" / "explosion")
    lived = {True: [], False: []}
    for cell in explosion.cells:
        if cell.cell.request.variant in ("elu_nobn", "elu_pre"):
            first = cell.cell.request.lr * cell.run.curve().grad_norm.iloc[0]
            lived[bool(first < CRITICAL)].append(cell.run.status == "done")
    assert all(lived[True])
    below, above = len(lived[True]), f"{sum(lived[False])} of {len(lived[False])}"
    for text in (METRICS["lr_grad_norm"].reading, AT_RISK.why):
        assert f"{below} of {below}" in text
        assert above in text
