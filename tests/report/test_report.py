"""Reports: what is judged, what is said, what is drawn; from made results of known content."""

import csv
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hostile import HOSTILE, check_harmless
from hypothesis import given
from hypothesis import strategies as st
from made_studies import GRID, make_results, make_study
from studyfiles import write_study

from resdiag.cli.main import app
from resdiag.plots.style import VARIANT_LOOKS
from resdiag.report.answer import answer
from resdiag.report.comparisons import threshold_table
from resdiag.report.expected import (
    FEW,
    MET,
    NOT_MET,
    OPEN,
    SEVERAL,
    expected_section,
    expected_words,
    judge_all,
)
from resdiag.report.figures import MOST_LINES, Drawings, draw_figures, draw_runs
from resdiag.report.origin import changed_settings, remake_commands
from resdiag.report.parts import Table, Text
from resdiag.report.render import MOST_BYTES, to_html, to_markdown
from resdiag.report.results import Results
from resdiag.report.sections import write_page
from resdiag.report.storage import read_results, write_results
from resdiag.report.svg import DARK_PAPER, Styles, contrast, on_dark
from resdiag.report.training_outcome import TRAINS, TRAINS_ONLY, run_outcome
from resdiag.report.words import number, settings_words, summarise
from resdiag.report.write import write_report
from resdiag.study.shipped import shipped_studies
from resdiag.study.study import load_study

SVG = "{http://www.w3.org/2000/svg}"


# -- judging ---------------------------------------------------------------------------------------

ONE = """
question = "q"
seeds = [0, 1, 2]
[fixed]
data = "digits"
[grid]
variant = ["elu"]
depth = [8]
"""


def judged(expected, values, *, states=("done",) * 3, name="one", data="digits"):
    """The one judgement on made outcomes of three seeds."""
    study = make_study(f"{ONE}[[expected]]\nsource = 's'\n{expected}", name=name)
    measure = study.file.expected[0].measure
    made = make_results(study, broken=lambda request: None, data=data)
    cells = [
        replace(item, outcomes={**item.outcomes, measure: value}, state=state)
        for item, value, state in zip(made.cells, values, states, strict=True)
    ]
    (result,) = judge_all(Results(study=study, cells=cells, source=""))
    return result


ERROR = "measure = 'test_error'\nvalue = 0.10\ntolerance = 0.01"
BLOCKS = "measure = 'first_nonfinite_step'\nvalue = 4\nfactor = 2.0"


@pytest.mark.parametrize(
    ("values", "outcome", "reason"),
    [
        ((0.10, 0.10, 0.10), MET, ""),
        ((0.11, 0.11, 0.11), MET, ""),  # at the edge
        ((0.111, 0.111, 0.111), NOT_MET, ""),
        ((0.101, 0.100, 0.099), MET, ""),
        ((0.13, 0.10, 0.10), OPEN, "the mean of 3 seeds is too uncertain for the tolerance"),
        ((0.20, 0.21, 0.22), NOT_MET, ""),
        ((math.nan,) * 3, OPEN, "not recorded"),
        ((math.inf, 0.1, 0.1), NOT_MET, "not finite"),
    ],
)
def test_a_number_is_judged_by_its_mean_and_two_standard_errors(values, outcome, reason):
    found = judged(ERROR, values)
    assert (found.outcome, found.reason) == (outcome, reason)


def test_a_factor_is_judged_by_the_geometric_mean():
    assert judged(BLOCKS, (2.0, 4.0, 8.0)).numbers.mean == pytest.approx(4)
    assert judged(BLOCKS, (7.9, 8.0, 8.1)).outcome == OPEN  # the spread reaches over the edge
    assert judged(BLOCKS, (8.0, 8.0, 8.0)).outcome == MET
    assert judged(BLOCKS, (8.1, 8.1, 8.1)).outcome == NOT_MET
    assert judged(BLOCKS, (math.nan,) * 3).reason == "never reached"


def test_final_and_best_error_stand_beside_a_published_one():
    results = make_results(broken=lambda request: None)
    (item, *_) = [j for j in judge_all(results) if j.expected.measure == "test_error"]
    members = [c for c in results.cells if c.cell.matches({"variant": ["elu"], "depth": [20]})]
    for name in ("test_error", "best_test_error"):
        assert item.errors[name].mean == np.mean([m.outcomes[name] for m in members])
    html = page_of(results)
    assert "best epoch" in html


def test_what_diverged_has_not_met_an_error():
    found = judged(ERROR, (0.1, 0.1, math.nan), states=("done", "done", "diverged"))
    assert (found.outcome, found.reason) == (NOT_MET, "1 of 3 diverged")


def test_a_word_is_met_if_every_cell_says_it():
    word = "measure = 'status'\nvalue = 'diverged'"
    assert judged(word, ("diverged",) * 3).outcome == MET
    found = judged(word, ("diverged", "done", "done"))
    assert (found.outcome, found.reason) == (NOT_MET, "done in 2 of 3")
    assert judged(word, ("done",) * 3, states=("running",) * 3).reason == "no cell has ended"


def test_what_holds_by_definition_is_counted_apart():
    met = judged("measure = 'status'\nvalue = 'done'", ("done",) * 3)
    missed = judged("measure = 'status'\nvalue = 'done'", ("diverged",) * 3)
    sure, broken = (
        replace(one, expected=one.expected.model_copy(update={"source": "definition: h = x"}))
        for one in (met, missed)
    )
    assert expected_words([sure, sure]) == ["All 2 hold by definition."]
    words = expected_words([met, missed, sure])
    assert (words[0], words[-1]) == (
        "1 of 2 expected values is met, 1 is not.",
        "Besides, 1 holds by definition.",
    )
    assert expected_words([broken])[0] == "0 of 1 expected value are met, 1 is not."


def test_an_expected_verdict_of_runs_that_were_not_judged_is_open():
    healthy = 'measure = "verdict"\nvalue = "healthy"'
    found = judged(healthy, (math.nan,) * 3)  # what is not among the outcomes
    assert (found.outcome, found.reason) == (OPEN, "not judged")
    assert judged(healthy, ("healthy", "healthy", math.nan)).outcome == MET


def test_errors_on_lossy_copies_are_not_held_against_published_ones():
    found = judged(ERROR, (0.1, 0.1, 0.1), data="cifar10-jpeg")
    assert found.outcome == OPEN
    assert "cifar10-jpeg: lossy copies" in found.reason
    assert found.numbers.n == 3  # the numbers are there


def test_errors_of_another_training_are_not_either():
    study = load_study("paper", ["fixed.epochs=3", "seeds=[0]"])
    assert changed_settings(study) == ["epochs = 3 (not the recipe's)"]
    results = make_results(study, broken=lambda request: None)
    judgements = judge_all(results)
    errors = [j for j in judgements if j.expected.measure == "best_test_error"]
    assert {j.outcome for j in errors} == {OPEN}
    assert "epochs = 3" in errors[0].reason
    words = [j for j in judgements if j.expected.measure == "status"]
    assert {j.outcome for j in words} == {NOT_MET}  # nothing was made to diverge


def test_fewer_cells_are_no_other_training():
    study = load_study("degradation", ["seeds=[0]", "grid.depth=[20, 110]"])
    assert changed_settings(study) == []


@pytest.mark.parametrize("name", shipped_studies())
def test_a_shipped_study_is_not_changed_and_its_commands_load_it_again(name):
    study = load_study(name)
    assert changed_settings(study) == []
    changed = load_study(name, ["seeds=[7]", "fixed.data=digits"]) if name == "smoke" else study
    words = remake_commands(Results(study=changed, cells=(), source=""))[0].split(" --set ")
    settings = [word.strip("'") for word in words[1:]]
    assert load_study(words[0].split()[-1], settings).digest == changed.digest


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9))
def test_summaries_are_those_of_numpy(values):
    found = summarise(values)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-9)
    assert found.deviation == pytest.approx(np.std(values, ddof=1), rel=1e-6, abs=1e-6)
    assert (found.low, found.high, found.n) == (min(values), max(values), len(values))


def test_sources_with_few_values_share_a_table_and_lose_none():
    study = load_study("initialisation", ["seeds=[0]"])
    judgements = judge_all(make_results(study, broken=lambda request: None))
    _rule, *parts = expected_section(judgements).parts
    tables = [part for part in parts if isinstance(part, Table)]
    sentences = [part.text for part in parts if isinstance(part, Text)]
    sizes = Counter(item.expected.source for item in judgements)
    few = {source: number for source, number in sizes.items() if number < FEW}
    assert [t.caption for t in tables].count(SEVERAL) == 1
    for table in tables:
        if table.caption == SEVERAL:
            assert Counter(row[-1] for row in table.rows) == few
        else:
            assert len(table.rows) == sizes[table.caption] >= FEW
    said = {source: text for source in sizes for text in sentences if text.startswith(f"{source}.")}
    assert len(said) == len(sentences)
    for source, text in said.items():
        alike = [item for item in judgements if item.expected.source == source]
        assert f"in all {len(alike)}: " in text
        assert all(settings_words(item.settings) in text for item in alike)
    assert sum(len(t.rows) for t in tables) + sum(sizes[s] for s in said) == len(judgements)


def test_what_is_the_same_in_every_row_is_no_column():
    table = Table(
        caption="c", header=["cells", "judged", "n", "data", "mean"], numeric=(2, 4),
        rows=[["a", "met", "3", "digits", "1"], ["b", "met", "3", "digits", "2"]],
    )  # fmt: skip
    short = table.without_constants(2)
    assert short.header == ["cells", "judged", "mean"]
    assert [list(row) for row in short.rows] == [["a", "met", "1"], ["b", "met", "2"]]
    assert list(short.numeric) == [2]
    assert short.note == "In every row: n: 3; data: digits."
    one = replace(table, rows=table.rows[:1])
    assert one.without_constants(2) is one


# -- the answer ------------------------------------------------------------------------------------


def said(results):
    return answer(results, judge_all(results))


def cut(results):
    """The results with less than an epoch of training."""
    short = [
        replace(item, run=replace(item.run, curve_frame=item.run.curve().head(20)))
        for item in results.cells
    ]
    return Results(study=results.study, cells=short, source="")


def test_the_answer_says_which_networks_train_and_counts():
    found = said(make_results())
    assert found.headline == (
        "elu (d) trains at both depths; elu_pre (b) diverges at both depths; 2 seeds."
    )
    assert found.expected == ["All 4 expected values are met."]
    assert "Diverged: 4 of 8 cells: elu_pre (b) 4 of 4; none of elu (d)." in found.found
    assert "n = 2 per setting, 4 settings." in found.sure
    assert "All 8 cells ended." in found.sure
    assert "The seeds agree on how it ended in all 4 settings with several seeds." in found.sure


def test_what_is_missing_and_what_disagrees_is_said():
    results = make_results(
        broken=lambda request: 4 if request.variant == "elu_pre" and request.seed else None,
        missing=(0,),
        failed=(1,),
    )
    found = said(results)
    assert found.headline == (
        "elu (d) has no result at depth 20 and trains at depth 56; elu_pre (b) trains in 1 of 2 "
        "seeds at depth 20, diverges in 1 of 2 seeds at depth 20 and in 1 of 2 seeds at depth 56 "
        "and stays at chance in 1 of 2 seeds at depth 56; 2 seeds. So far 6 of 8 cells ended."
    )
    assert "1 is not" in found.expected[0]
    assert any("Not met: how it ended diverged: elu_pre (b), depth 56" in x for x in found.expected)
    assert any("2 of 8 cells (1 missing, 1 failed): elu (d)" in x for x in found.sure)
    assert any("disagree on how it ended in 2 of 3" in x for x in found.sure)


def with_losses(text, losses):
    """Results whose loss is the given one, in units of ln K, in every step of a cell."""
    results = make_results(make_study(text), broken=lambda request: None)
    cells = []
    for item in results.cells:
        loss = losses[item.cell.request.variant, item.cell.request.depth] * math.log(10)
        curve = item.run.curve().assign(loss=loss)
        cells.append(replace(item, run=replace(item.run, curve_frame=curve)))
    return Results(study=results.study, cells=cells, source="")


def test_done_is_not_trained():
    one = GRID.replace("seeds = [0, 1]", "seeds = [0]")
    losses = {("elu", 20): 0.5, ("elu", 56): 0.97, ("elu_pre", 20): 0.99, ("elu_pre", 56): 3.0}
    found = said(with_losses(one, losses))
    assert found.headline == (
        "elu (d) trains at both depths; elu_pre (b) stays at chance at both depths; one seed."
    )
    assert any("at chance: it is not" in line for line in found.sure)
    losses["elu_pre", 20] = 0.5
    found = said(with_losses(one, losses))
    assert "elu_pre (b) trains at depth 20 and stays at chance at depth 56" in found.headline
    html = page_of(with_losses(one, losses))
    assert "at chance</span></td>" in html


def test_a_test_error_of_guessing_is_said_where_the_number_of_test_images_is_known():
    results = make_results(broken=lambda request: None)
    item = results.cells[0]
    run = replace(item.run, data={**item.run.data, "test": 900})
    limit = 0.9 - 2 * math.sqrt(0.9 * 0.1 / 900)  # two standard errors of 900 images
    for error, outcome in ((limit + 1e-6, TRAINS_ONLY), (limit - 1e-6, TRAINS), (math.nan, TRAINS)):
        assert run_outcome(run, error) == outcome
    assert run_outcome(item.run, 0.9) == TRAINS  # how many there are is not known


def test_the_committed_studies_are_answered_in_their_own_words():
    folder = Path(__file__).parents[2] / "studies" / "results"
    heads = {
        name: said(read_results(folder / name)).headline
        for name in ("smoke", "explosion", "initialisation", "degradation-cpu")
    }
    assert heads["smoke"] == (
        "original and elu (d) train at both depths; elu_pre (b) stays at chance at depth 8 and "
        "diverges at depth 20; one seed."
    )
    assert heads["explosion"].startswith(
        "elu_nobn (a) diverges from learning rate 0.01 at depth 20, 1e-05 at depth 56 and 1e-09 at "
        "depth 110; "
    )
    assert heads["explosion"].endswith(
        "original and elu (d) diverge at no rate tried, up to 0.1; 3 seeds."
    )
    assert heads["initialisation"].startswith(
        "The second moment of the output at step 0, last block"
    )
    assert heads["degradation-cpu"] == (
        "From depth 20 to 56, original, elu_after (c) and no_relu get worse; elu (d) is not shown "
        "to get worse."
    )


def test_the_least_rate_that_broke_is_told_by_the_rest():
    text = GRID.replace("depth = [20, 56]\n[[f", "depth = [20, 56]\nlr = [0.1, 0.01, 0.001]\n[[f")
    limits = {("elu_pre", 20): 0.05, ("elu_pre", 56): 1e-9}

    def broken(request):
        return 3 if request.lr > limits.get((request.variant, request.depth), 1) else None

    results = make_results(make_study(text), broken=broken)
    assert said(results).headline == (
        "elu_pre (b) diverges from learning rate 0.1 at depth 20 and 0.001 at depth 56; "
        "elu (d) diverges at no rate tried, up to 0.1; 2 seeds."
    )
    table = said(results).table
    assert table.caption == "Lowest learning rate at which a seed diverged"
    assert [row[1:] for row in table.rows] == [
        ["none up to 0.1", "none up to 0.1"], ["0.1 (none at 0.01)", "0.001, the lowest tried"],
    ]  # fmt: skip
    table = threshold_table(results)
    assert table.header == ["cells", "depth 20", "depth 56"]
    assert table.rows == [
        ["elu (d)", "none up to 0.1", "none up to 0.1"],
        ["elu_pre (b)", "0.1 (none at 0.01)", "0.001, the lowest tried"],
    ]


def test_the_least_rates_of_the_explosion_study_stand_in_a_table():
    results = read_results(Path(__file__).parents[2] / "studies" / "results" / "explosion")
    found = said(results)
    assert not [line for line in found.found if "Least" in line]
    rows = {row[0]: row[1:] for row in found.table.rows}
    assert rows["elu_nobn (a)"][0] == "0.01 (none at 0.001)"
    assert rows["elu (d)"] == ["none up to 0.1", "none up to 0.1", ""]


ASKED = GRID.partition("[[expected]]")[0].replace("[0, 1]", "[0, 1, 2]")
"""A study that expects no value."""


def by_depth(errors, text=ASKED, **made):
    """Results whose errors are those given by variant and depth, with 0.1 points between seeds."""
    results = make_results(make_study(text), broken=lambda request: None, **made)
    cells = []
    for item in results.cells:
        request = item.cell.request
        train, test = errors[request.variant, request.depth]
        more = {
            "train_error": train + request.seed * 1e-3,
            "test_error": test + request.seed * 1e-3,
        }
        cells.append(replace(item, outcomes={**item.outcomes, **more} if item.outcomes else {}))
    return Results(study=results.study, cells=cells, source="")


ERRORS_BY_DEPTH = {
    ("elu", 20): (0.10, 0.20), ("elu", 56): (0.09, 0.21),
    ("elu_pre", 20): (0.10, 0.20), ("elu_pre", 56): (0.15, 0.25),
}  # fmt: skip


def test_without_expected_values_the_answer_is_whether_the_error_grows_with_depth():
    found = said(by_depth(ERRORS_BY_DEPTH))
    assert found.headline == (
        "From depth 20 to 56, elu_pre (b) gets worse; elu (d) gets worse on test images only."
    )
    rows = {row[0]: row for row in found.table.rows}
    assert rows["elu_pre (b)"][2:5] == ["20.10 ± 0.10 %", "25.10 ± 0.10 %", "3"]
    # the same difference in every seed: an interval without length
    assert rows["elu_pre (b)"][5:7] == ["+5.00 [5.00, 5.00]", "+5.00 [5.00, 5.00]"]
    assert rows["elu (d)"][6] == "-1.00 [-1.00, -1.00]"
    assert [row[1].kind for row in found.table.rows] == ["bad", "bad"]
    even = said(by_depth({**ERRORS_BY_DEPTH, ("elu", 56): (0.09, 0.19)}))
    assert "elu (d) is not shown to get worse" in even.headline


def test_few_seeds_say_what_was_seen_and_that_it_decides_nothing():
    found = said(by_depth(ERRORS_BY_DEPTH, ASKED.replace("[0, 1, 2]", "[0]")))
    assert found.headline == (
        "The test error at depth 56 is higher than at 20 in 2 of 2 settings, "
        "but this is not conclusive yet: 1 seed at depth 20, 3 are needed."
    )
    assert found.table.rows[0][4:7] == ["1", "+1.00", "-1.00"]
    assert any("Some settings have 1 seed here" in line for line in found.sure)
    part = said(by_depth(ERRORS_BY_DEPTH, missing=(0,)))
    assert part.headline.endswith("So far 11 of 12 cells ended.")
    assert "elu (d) cannot be decided" in part.headline


def test_a_short_study_that_expects_values_asks_something_else():
    text = GRID.replace("[0, 1]", "[0, 1, 2]")
    long = said(by_depth(ERRORS_BY_DEPTH, text))
    assert long.headline == (
        "elu (d) trains at both depths; elu_pre (b) trains at depth 20 and stays at chance at "
        "depth 56; 3 seeds."
    )
    assert long.found[0].startswith("From depth 20 to 56, ")
    found = said(cut(by_depth(ERRORS_BY_DEPTH, text)))
    assert not any("rom depth 20" in line for line in found.found)
    assert "with depth" not in (found.table.header if found.table else ())


def test_a_short_training_is_said_not_to_be_a_full_one():
    text = ASKED.replace('data = "digits"', 'data = "digits"\nrecipe = "paper"\nsteps = 150')
    (line,) = [x for x in said(by_depth(ERRORS_BY_DEPTH, text)).sure if "short" in x]
    assert re.fullmatch(
        r"A short training: 151 steps, [0-9.]+ epochs; the recipe has 164; "
        "it shows early learning, not how a full one ends.",
        line,
    )
    assert not [x for x in said(by_depth(ERRORS_BY_DEPTH)).sure if "short" in x]


def test_what_was_expected_of_a_metric_stands_by_depth_in_the_answer():
    study = load_study("initialisation", ["seeds=[0, 1]"])
    results = cut(make_results(study, broken=lambda request: None))
    found = said(results)
    assert found.table.header == ["cells", "depth 20", "depth 56", "depth 110"]
    rows = {row[0]: row[1:] for row in found.table.rows}
    judgements = {
        (j.settings["variant"], j.settings["depth"]): j
        for j in judge_all(results)
        if j.expected.measure == "output_second_moment"
    }
    one = judgements["elu_nobn", 56]
    assert rows["elu_nobn (a)"][1].text == f"{number(one.numbers.mean)} (4.50e9)"
    assert sum(bool(str(cell)) for row in rows.values() for cell in row) == len(judgements)


def test_without_a_result_there_is_no_answer():
    study = make_study()
    found = said(make_results(study, missing=range(len(study.cells))))
    assert found.headline == "No answer yet: none of 8 cells has ended."
    assert found.found == ()


def test_lossy_data_are_named_in_the_answer():
    found = said(make_results(data="cifar10-jpeg"))
    assert any("cifar10-jpeg is a lossy copy" in line for line in found.sure)
    ranked = [line for line in found.found if line.startswith("Final test error")]
    assert all("(cifar10-jpeg)" in line for line in ranked)


def test_a_ranking_needs_an_epoch_and_says_when_it_is_noise():
    results = make_results(broken=lambda request: None)
    ranked = [line for line in said(results).found if line.startswith("Final test error")]
    assert len(ranked) == 2  # a depth each
    assert re.search(
        r"the second minus the first is \+[\d.]+ \[-?[\d.]+, [\d.]+\] points", ranked[0]
    )
    found = said(cut(results))
    assert not [line for line in found.found if line.startswith("Final test error")]


# -- figures ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures():
    return list(draw_figures(make_results(missing=(1,))))


def test_every_figure_is_drawn_with_its_data(pictures):
    assert [picture.name for picture in pictures] == ["01-gradnorms", "02-curves"]
    rows = list(csv.DictReader(io.StringIO(pictures[0].csv)))
    assert {row["line"] for row in rows} >= {"elu (d) depth 20", "elu_pre (b) depth 56"}
    assert {"line", "seed", "step", "block", "grad_output", "grad_param"} <= set(rows[0])
    assert pictures[0].table.rows


def test_the_numbers_of_a_figure_are_those_of_the_run(pictures):
    results = make_results(missing=(1,))
    item = results.cells[0]
    frame = item.run.metrics()
    rows = csv.DictReader(io.StringIO(pictures[0].csv))
    mine = [r for r in rows if r["line"] == "elu (d) depth 20" and r["seed"] == "0"]
    assert len(mine) == len(frame)
    shown = [float(row["grad_output"] or "nan") for row in mine]
    np.testing.assert_allclose(shown, frame["grad_output"], rtol=1e-3)


def test_a_drawing_is_titled_unique_and_without_styles_of_its_own(pictures):
    styles = Styles()
    texts = [picture.inline(styles) for picture in pictures]
    ids = Counter(re.findall(r' id="([^"]+)"', "".join(texts)))
    assert set(ids.values()) == {1}
    for text in texts:
        root = ET.fromstring(text)
        assert root.get("role") == "img"
        named = {element.get("id"): element.text for element in root.iter() if element.get("id")}
        assert named[root.get("aria-labelledby")]
        assert named[root.get("aria-describedby")].startswith(("Does", "What"))
        assert not [e for e in root.iter() if "style" in e.attrib or e.tag == f"{SVG}style"]
        used = {m for e in root.iter() for m in re.findall(r"#(\w+)", " ".join(e.attrib.values()))}
        assert used <= set(named)  # every reference is resolved
        classes = {e.get("class") for e in root.iter()} - {None}
        assert all(f".{name}{{" in styles.css() for name in classes)


def test_hatching_survives_with_its_own_id():
    run = make_results(make_study(GRID)).cells[-1].run
    (picture,) = draw_runs(["gradnorms"], [run])
    assert b"url(#h" in picture.svg  # matplotlib's name of a hatching
    for text in (picture.file(), picture.inline(styles := Styles()) + styles.css()):
        named = set(re.findall(r' id="([^"]+)"', text))
        (filled,) = set(re.findall(r"fill:url\(#([^)]+)\)", text))
        assert f'<pattern id="{filled}"' in re.sub(r"<pattern [^>]*?id=", "<pattern id=", text)
        assert filled in named


def test_a_file_follows_the_scheme_of_who_shows_it(pictures):
    root = ET.fromstring(pictures[0].file())
    sheet = root.find(f"{SVG}style").text
    assert "color-scheme:light dark" in sheet
    assert "light-dark(#ffffff" in sheet
    assert b"%PDF" in pictures[0].pdf[:8]


def test_a_crowd_of_lines_is_split_by_depth():
    study = make_study(GRID.replace('"elu_pre"]', '"elu_pre", "original", "plain", "no_relu"]'))
    assert len(study.cells) > 2 * MOST_LINES - 1
    found = list(draw_figures(make_results(study, broken=lambda r: None), Drawings(only=())))
    assert [picture.name for picture in found][:2] == ["01-gradnorms", "02-curves"]
    study = make_study(
        GRID.replace("depth = [20, 56]\n[[f", "depth = [8, 14, 20, 26, 32, 56]\n[[f")
    )
    found = list(draw_figures(make_results(study, broken=lambda r: None), Drawings(only=())))
    assert [picture.name for picture in found][:2] == [
        "01-gradnorms-depth-8",
        "01-gradnorms-depth-14",
    ]


def test_of_a_figure_that_is_split_the_deepest_is_drawn_unless_all_are_asked_for():
    text = GRID.partition('[[figure]]\nplot = "curves"')[0]
    study = make_study(
        text.replace("depth = [20, 56]", "depth = [8, 20, 26]").replace(
            '"elu_pre"]', '"elu_pre", "original", "plain", "no_relu"]'
        )
    )
    results = make_results(study, broken=lambda r: None)
    found = {p.name: bool(p.svg) for p in draw_figures(results, Drawings(deepest=True))}
    assert found == {f"01-gradnorms-depth-{d}": d == 26 for d in (8, 20, 26)}
    page = write_page(results, list(draw_figures(results, Drawings(deepest=True))))
    assert "with --all-figures the report draws them" in check_harmless(to_html(page)).text


def test_lines_of_a_drawing_are_told_apart():
    from resdiag.plots.grouping import open_view
    from resdiag.plots.kinds import KINDS

    results = make_results(load_study("paper", ["seeds=[0]"]))
    curves = [p for p in draw_figures(results, Drawings(only=())) if p.number == 2]
    assert [p.name for p in curves] == [f"02-curves-depth-{d}" for d in (20, 32, 44, 56, 110)]
    runs = [c.run for c in results.cells if c.cell.request.depth == 110 and "10" in c.data[-2:]]
    looks = [
        series.look for series in open_view(KINDS["curves"], runs, step=None, theory=True).series
    ]
    assert len(set(looks)) == len(looks) == 5


def test_the_activations_are_a_figure_of_their_own_with_the_numbers_of_theory():
    text = GRID.replace('plot = "gradnorms"', 'plot = "activations"')
    (picture, *_) = draw_figures(make_results(make_study(text)), Drawings(only={"01-activations"}))
    rows = list(csv.DictReader(io.StringIO(picture.csv)))
    assert len(rows) == len({row["x"] for row in rows}) > 100
    for row in rows:
        x, relu, elu = (float(row[name]) for name in ("x", "relu", "elu"))
        assert (relu, elu) == pytest.approx((max(x, 0), x if x > 0 else math.exp(x) - 1), abs=1e-5)
    drawn = np.random.default_rng(0).standard_normal(200_000)
    means = {row[0]: float(row[1]) for row in picture.table.rows}
    assert means["relu"] == pytest.approx(np.maximum(drawn, 0).mean(), abs=0.005)
    assert means["elu"] == pytest.approx(
        np.where(drawn > 0, drawn, np.expm1(drawn)).mean(), abs=0.005
    )
    root = ET.fromstring(picture.file())
    assert "mean of ELU: 0.16" in "".join(root.itertext())


def test_growth_at_the_start_does_not_repeat_what_only_acts_later():
    text = GRID.replace("depth = [20, 56]\n[[f", "depth = [20]\nlr = [0.1, 0.01]\n[[f")
    study = make_study(
        text.replace('"gradnorms"', '"growth"').replace("depth = 56 }", "depth = 20 }")
    )
    growth = next(draw_figures(make_results(study, broken=lambda r: None), Drawings(only=())))
    lines = {row["line"] for row in csv.DictReader(io.StringIO(growth.csv))}
    assert lines == {"elu (d)", "elu_pre (b)"}


@pytest.mark.parametrize("colour", sorted({look.colour for look in VARIANT_LOOKS.values()}))
def test_colours_stand_out_on_dark_paper(colour):
    assert contrast(on_dark(colour.lower()), DARK_PAPER) >= 3


# -- the page --------------------------------------------------------------------------------------


def page_of(results, drawn=()):
    return to_html(write_page(results, list(drawn)))


def test_the_first_words_are_question_answer_and_how_sure():
    seen = check_harmless(page_of(make_results()))
    places = [seen.text.index(words) for words in (
        "Do deeper networks explode?", "elu (d) trains at both depths", "n = 2 per setting",
        "All 4 expected values are met.", "Expected values",
    )]  # fmt: skip
    assert places == sorted(places)
    assert places[2] < 1200  # letters: a first screen


def test_the_page_with_drawings_is_harmless_and_ids_are_unique(pictures):
    html = page_of(make_results(missing=(1,)), pictures)
    seen = check_harmless(html)
    assert seen.tags["svg"] == 2
    ids = Counter(value for _, name, value in seen.attributes if name == "id")
    assert set(ids.values()) == {1}
    targets = {v[1:] for t, n, v in seen.attributes if n == "href" and t == "a"}
    assert targets <= set(ids)


def test_drawings_beyond_the_limit_are_left_to_their_files(pictures, monkeypatch):
    monkeypatch.setattr("resdiag.report.render.MOST_BYTES", 60_000)
    html = page_of(make_results(missing=(1,)), pictures)
    assert check_harmless(html).tags["svg"] == 1
    assert "Not shown here, to keep this page small" in html
    assert MOST_BYTES < 2_000_000


@pytest.mark.parametrize("words", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_words_in_every_place_are_shown_and_do_nothing(words, pictures):
    text = json.dumps(words)
    study = make_study(
        f"""
question = {text}
expects = {text}
source = {text}
cost = {text}
[fixed]
data = "folder:<b>/'\\">x"
[grid]
variant = ["elu", "elu_pre"]
depth = [8]
[[figure]]
plot = "skip"
title = {text}
[[expected]]
measure = "verdict"
value = {text}
source = {text}
"""
    )
    results = make_results(study, broken=lambda r: None, failed=(1,))
    verdict = {"name": words, "summary": words, "why": words, "step": 1}
    first = results.cells[0].run
    run = replace(first, written_verdict=verdict, notes=(words,), data={"name": words})
    cells = [
        replace(results.cells[0], run=run, outcomes={"verdict": words, "status": "done"}),
        replace(results.cells[1], message=f"{words}\u202e\x1b[31m"),
    ]
    results = Results(study=study, cells=cells, source="")
    page = write_page(results, [replace(pictures[0], title=words)])
    html = to_html(page)
    seen = check_harmless(html)
    plain = page_of(make_results(failed=(1,)), pictures[:1])
    assert set(seen.tags) <= set(check_harmless(plain).tags)
    assert " ".join(words.split()) in seen.text
    assert "\u202e" not in html
    assert "\x1b" not in html
    markdown = to_markdown(page)
    outside = re.sub(r"^```.*?^```$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"(?<!\\)<(?!!)", outside)
    assert not re.search(r"(?<!\\)\]\((?!figures/)", outside)


def test_markdown_tables_keep_their_columns():
    markdown = to_markdown(write_page(make_results(failed=(0,)), []))
    tables = re.findall(r"((?:^\|.*\|$\n?)+)", markdown, re.MULTILINE)
    assert len(tables) > 4
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.strip().splitlines()}
        assert len(widths) == 1


# -- the command -----------------------------------------------------------------------------------


def test_report_of_nothing_of_frozen_results_and_as_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path)
    assert app.run(["study", "report", "tiny.toml"]) == 2
    assert "no cell of tiny was begun under runs" in capsys.readouterr().err
    write_results(make_results(), tmp_path / "ice")
    assert app.run(["study", "report", "ice", "--out", "page", "--json", "--pdf"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    endings = Counter(name.rpartition(".")[2] for name in files)
    assert endings == {"html": 1, "md": 1, "svg": 2, "pdf": 2, "csv": 2}
    assert all((tmp_path / name).stat().st_size for name in files)
    assert app.run(["study", "report", "ice", "--mini"]) == 2


def test_thawed_results_give_the_same_report(tmp_path):

    results = make_results(missing=(2,))
    write_results(results, tmp_path)
    assert to_markdown(write_page(read_results(tmp_path), [])) == to_markdown(
        write_page(results, [])
    )


@pytest.mark.slow
def test_seventy_five_cells_take_two_megabytes(tmp_path):
    results = make_results(load_study("paper"))
    assert len(results.cells) >= 75
    files = write_report(results, tmp_path)
    assert files[0].stat().st_size < 2_000_000
