"""Frozen results: what comes back is what went in, rounded; nothing of the machine is in them."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import synthetic_runs
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from made_studies import GRID, make_results, make_run, make_study
from studyfiles import write_study

from resdiag.cli.main import app
from resdiag.errors import UsageError
from resdiag.report.collect import MOST_ROWS, collect, keep_steps, thin
from resdiag.report.merge import merge
from resdiag.report.outcomes import measure
from resdiag.report.storage import BITS, read_results, round_bits, write_results
from resdiag.runs.files import Damaged
from resdiag.study.study import load_study


@pytest.fixture(scope="module")
def results():
    return make_results(missing=(1,), failed=(2,))


def test_what_comes_back_is_what_went_in(results, tmp_path):
    write_results(results, tmp_path)
    back = read_results(tmp_path)
    assert back.study.file == results.study.file
    assert back.telling == results.telling == ["variant", "depth"]
    for old, new in zip(results.cells, back.cells, strict=True):
        assert (old.cell, old.state, old.message) == (new.cell, new.state, new.message)
        assert repr(sorted(old.outcomes.items())) == repr(sorted(new.outcomes.items()))
        assert (old.run is None) == (new.run is None)
        if old.run:
            assert new.run.config == old.run.config
            assert new.run.blocks == old.run.blocks
            for table in ("metrics_frame", "curve_frame"):
                _agree(getattr(old.run, table), getattr(new.run, table))


def _agree(old, new):
    assert len(old) == len(new)
    for name in old.columns:
        np.testing.assert_allclose(new[name], old[name], rtol=2.0**-BITS, err_msg=str(name))


@given(arrays.arrays(np.float32, 7, elements=st.floats(width=32)))
def test_rounding_keeps_what_is_not_a_number_and_errs_by_half_a_bit(values):
    rounded = round_bits(values)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(rounded[~finite], values[~finite])
    normal = finite & (np.abs(values) > 1e-37)
    old = values[normal].astype(float)
    assert (np.abs(rounded[normal] - old) <= np.abs(old) * 2.0 ** -(BITS + 1) * 1.0001).all()


def test_a_changed_byte_is_seen(results, tmp_path):
    write_results(results, tmp_path)
    path = tmp_path / "metrics.parquet"
    path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
    with pytest.raises(Damaged, match="metrics"):
        read_results(tmp_path)


@pytest.mark.parametrize("key", ["cells", "shared", "sha256", "document", "study"])
def test_a_missing_part_is_named(results, tmp_path, key):
    write_results(results, tmp_path)
    path = tmp_path / "results.json"
    document = json.loads(path.read_text())
    del document[key]
    path.write_text(json.dumps(document))
    with pytest.raises(Damaged, match=key):
        read_results(tmp_path)


def test_where_the_data_lay_is_not_kept(tmp_path):
    study = make_study(synthetic_study("folder:/data/mine/cifar10-jpeg.tar.gz"))
    write_results(make_results(study, failed=(0,), data="cifar10-jpeg"), tmp_path)
    text = (tmp_path / "results.json").read_text()
    assert "/data" not in text
    assert "folder:cifar10-jpeg.tar.gz" in text
    assert read_results(tmp_path).study.file.fixed.given["data"] == "folder:cifar10-jpeg.tar.gz"


def synthetic_study(data):
    return f"""
question = "q"
[fixed]
data = "{data}"
[grid]
variant = ["elu", "elu_pre"]
depth = [20]
[[figure]]
plot = "skip"
cells = {{ data = "{data}" }}
"""


# -- halves that are put together ------------------------------------------------------------------

FILES = ("results.json", "metrics.parquet", "curve.parquet")


def some_seeds(*seeds, text=GRID, **made):
    return make_results(make_study(text, f"seeds={list(seeds)}"), **made)


def changed(results, number, **what):
    """The results with another cell in one place."""
    cells = list(results.cells)
    cells[number] = replace(cells[number], **what)
    return replace(results, cells=cells)


@pytest.mark.parametrize(("first", "second"), [((0, 2), (1,)), ((1,), (0, 2)), ((0, 1), (1, 2))])
def test_two_halves_are_the_whole_bit_for_bit(tmp_path, first, second):
    write_results(some_seeds(0, 1, 2), tmp_path / "whole")
    write_results(some_seeds(*first), tmp_path / "parts")
    write_results(merge(read_results(tmp_path / "parts"), some_seeds(*second)), tmp_path / "parts")
    for name in FILES:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_command_adds_and_says_what_it_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, seeds in (("whole", (0, 1)), ("parts", (0,)), ("more", (1,))):
        write_results(some_seeds(*seeds), tmp_path / name)
    assert app.run(["study", "freeze", "more", "--out", "parts", "--add"]) == 0
    assert read_results(tmp_path / "parts").study.file.seeds == [0, 1]
    assert all((tmp_path / "parts" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes()
               for n in FILES)  # fmt: skip
    write_results(
        some_seeds(2, text=GRID.replace("[20, 56]\n[[f", "[20, 110, 56]\n[[f")), tmp_path / "odd"
    )
    kept = (tmp_path / "parts" / "results.json").read_bytes()
    assert app.run(["study", "freeze", "odd", "--out", "parts", "--add"]) == 2
    assert "parts holds made with another grid" in capsys.readouterr().err
    assert (tmp_path / "parts" / "results.json").read_bytes() == kept


def test_what_ended_stands_for_what_did_not():
    held, added = some_seeds(0, 1, missing=(1,), failed=(0,)), some_seeds(0, 1, missing=(2, 3))
    assert [item.state for item in merge(held, added).cells] == [
        i.state for i in make_results().cells
    ]
    alone = merge(some_seeds(0, failed=(0,)), some_seeds(0, missing=(0,))).cells[0]
    assert (alone.state, alone.message) == ("failed", "SIGSEGV")


def test_each_cell_keeps_its_device_and_its_place_of_data():
    text = GRID.replace('"digits"', '"folder:/a/x.tar"')
    held, added = some_seeds(0, text=text), some_seeds(1, text=text.replace("/a/", "/b/"))
    runs = [
        replace(i.run, environment={**i.run.environment, "device": "cuda"}) for i in added.cells
    ]
    added = replace(
        added, cells=[replace(i, run=r) for i, r in zip(added.cells, runs, strict=True)]
    )
    whole = merge(held, added)
    assert [i.run.environment["device"] for i in whole.cells] == ["cpu", "cuda"] * 4
    assert {len(group.members) for group in whole.groups} == {2}
    assert {i.cell.id for i in whole.cells} == {i.cell.id for i in (*held.cells, *added.cells)}


def _trained(**what):
    """Results of seed 1 whose first cell was trained by other numbers."""
    results = some_seeds(1)
    run = results.cells[0].run
    return changed(results, 0, run=replace(run, config=replace(run.config, **what)))


def _edited(old, new):
    return some_seeds(1, text=GRID.replace(old, new))


def _ended_otherwise():
    results = some_seeds(0)
    return changed(results, 1, outcomes={**results.cells[1].outcomes, "loss": 9.0})


def _other_images():
    results = some_seeds(1)
    return changed(results, 0, run=replace(results.cells[0].run, data={"sha256": "1"}))


REFUSED = {
    "question": (lambda: _edited("explode?", "learn?"), "another question"),
    "expected": (lambda: _edited("= 0.5", "= 0.4"), "another expected"),
    "data": (lambda: _edited('"digits"', '"fashion"'), "another fixed"),
    "name": (
        lambda: make_results(make_study(GRID, "seeds=[1]", name="other")),
        "holds made, not other",
    ),
    "twice": (_ended_otherwise, "elu-d56-s0-.* ended twice and differently: loss [0-9.]+ and 9.0"),
    "recipe": (lambda: _trained(weight_decay=0.5), "differ in more than the seed: weight_decay"),
    "images": (_other_images, "differ in more than the seed: data"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_halves_that_do_not_fit_are_refused(why):
    added, message = REFUSED[why]
    with pytest.raises(UsageError, match=message):
        merge(some_seeds(0), added())


HOSTILE = {
    "not JSON": ("{", "not JSON"),
    "deep": ("[" * 100_000, "not JSON"),
    "a list": ("[1]", "not a JSON object"),
    "a name that climbs": (("study", "../../etc"), "names no study"),
    "seeds beyond 64 bits": (("document", "seeds", [10**30]), "must be less than"),
    "seeds in words": (("document", "seeds", "<script>"), "must be a list"),
    "a setting in words": (("cells", 0, "request", "lr", "<b>"), "damaged: TypeError"),
    "an unknown setting": (("cells", 0, "request", "evil", 1), "unexpected keyword argument"),
    "an unknown recipe": (("cells", 0, "request", "recipe", "nope"), "unknown recipe 'nope'"),
    "no number": (("cells", 0, "outcomes", "loss", "abc"), "damaged: ValueError"),
    "nothing shared": (("shared", "data", [None]), "damaged: TypeError"),
    "a place beyond": (("cells", 0, "run", "data", 99), "damaged: IndexError"),
    "another run": (("cells", 0, "run", "config", {"model": "x"}), "in more than the seed"),
    "no cells": (("cells", []), "is damaged: it lacks elu-d20-s0-"),
}


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("halves")
    for name, seed in (("held", 0), ("added", 1)):
        write_results(some_seeds(seed), folder / name)
    return folder


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_results_are_refused_in_one_line_and_left_alone(what, halves, tmp_path, capsys):
    change, message = HOSTILE[what]
    held = shutil.copytree(halves / "held", tmp_path / "held")
    path = held / "results.json"
    if isinstance(change, str):
        text = change
    else:
        document = place = json.loads(path.read_text())
        for key in change[:-2]:
            place = place[key]
        place[change[-2]] = change[-1]
        text = json.dumps(document)
    path.write_text(text)
    command = ["study", "freeze", str(halves / "added"), "--out", str(held), "--add"]
    assert app.run(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert path.read_text() == text


# -- thinning --------------------------------------------------------------------------------------


def test_the_steps_around_the_breakdown_are_kept():
    run = synthetic_runs.make_run("elu_pre", 56, steps=tuple(range(60)), explode=40)
    kept = keep_steps(run.metrics(), 6, {17})
    assert {0, 17, 39, 40, 41} <= set(kept)
    assert len(kept) <= 7


def test_a_long_curve_keeps_evaluations_and_means_of_the_loss():
    run = synthetic_runs.make_run("elu", 20, steps=tuple(range(0, 5001, 50)))
    long = run.curve()
    small, size = thin(run, steps=8, wanted=(), columns=("grad_output",))
    curve = small.curve()
    assert len(curve) < 1.5 * MOST_ROWS < len(long)
    assert size > 5
    assert curve["test_error"].notna().sum() == long["test_error"].notna().sum()
    weights = np.diff([-1, *curve["step"]])  # the steps that each row stands for
    assert np.average(curve["loss"], weights=weights) == pytest.approx(long["loss"].mean())
    assert list(small.metrics()["step"].unique()) == keep_steps(run.metrics(), 8, ())


def test_a_loss_that_is_not_finite_is_not_averaged_away():
    run = synthetic_runs.make_run("elu", 20, steps=tuple(range(0, 5001, 50)))
    run.curve_frame.loc[2001, "loss"] = np.inf
    small, _ = thin(run, steps=8, wanted=(), columns=())
    assert np.isinf(small.curve()["loss"]).sum() == 1


# -- outcomes --------------------------------------------------------------------------------------


def test_outcomes_are_read_off_the_run():
    study = make_study()
    run = make_run(study.cells[0].request)
    expected = [item for item in study.file.expected if study.cells[0].matches(item.cells.given)]
    found = measure(run, expected)
    curve, frame = run.curve(), run.metrics()
    assert found["test_error"] == curve["test_error"].iloc[-1]
    assert found["best_test_error"] == curve["test_error"].min()
    assert found["status"] == "done"
    assert math.isnan(found["first_nonfinite_step"])
    last = frame[(frame["step"] == 0) & (frame["block"] == len(run.blocks) - 1)]
    assert found["output_second_moment@0@-1"] == last["output_second_moment"].item()


def test_a_run_that_broke_has_no_final_error_but_a_first_step():
    study = make_study()
    found = measure(make_run(study.cells[-1].request, explode=4), [])
    assert found["status"] == "diverged"
    assert found["first_nonfinite_step"] == 4
    assert math.isnan(found["test_error"])


# -- from run folders ------------------------------------------------------------------------------


def test_a_study_that_ran_is_frozen_and_read_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path)
    assert app.run(["study", "cell", "tiny.toml", load_study("tiny.toml").cells[0].id]) == 0
    assert app.run(["study", "freeze", "tiny.toml", "--out", "out"]) == 0
    said = capsys.readouterr()
    assert "3 of 4 cells have not ended" in said.err
    assert said.out.splitlines()[-3:] == [
        "out/results.json", "out/metrics.parquet", "out/curve.parquet",
    ]  # fmt: skip
    back = read_results(tmp_path / "out")
    assert [item.state for item in back.cells] == ["done", "missing", "missing", "missing"]
    direct = collect(load_study("tiny.toml"), tmp_path / "runs")
    assert repr(back.cells[0].outcomes) == repr(dict(sorted(direct.cells[0].outcomes.items())))
    assert isinstance(back.cells[0].run.metrics(), pd.DataFrame)


def test_nothing_to_freeze_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path)
    assert app.run(["study", "freeze", "tiny.toml", "--out", "out"]) == 2
    assert "no cell of tiny was begun under runs" in capsys.readouterr().err
