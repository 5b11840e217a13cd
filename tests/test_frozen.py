"""Frozen results: what comes back is what went in, rounded; nothing of the machine is in them."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import synthetic_runs
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from made_studies import make_results, make_run, make_study
from studyfiles import write_study

from resdiag.cli import app
from resdiag.report.collect import collect
from resdiag.report.frozen import freeze, thaw
from resdiag.report.outcomes import measure
from resdiag.report.tables import BITS, round_bits
from resdiag.report.thin import MOST_ROWS, keep_steps, thin
from resdiag.runs.files import Damaged
from resdiag.study.study import load_study


@pytest.fixture(scope="module")
def results():
    return make_results(missing=(1,), failed=(2,))


def test_what_comes_back_is_what_went_in(results, tmp_path):
    freeze(results, tmp_path)
    back = thaw(tmp_path)
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
    freeze(results, tmp_path)
    path = tmp_path / "metrics.parquet"
    path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
    with pytest.raises(Damaged, match="metrics"):
        thaw(tmp_path)


@pytest.mark.parametrize("key", ["cells", "shared", "sha256", "document", "study"])
def test_a_missing_part_is_named(results, tmp_path, key):
    freeze(results, tmp_path)
    path = tmp_path / "results.json"
    document = json.loads(path.read_text())
    del document[key]
    path.write_text(json.dumps(document))
    with pytest.raises(Damaged, match=key):
        thaw(tmp_path)


def test_where_the_data_lay_is_not_kept(tmp_path):
    study = make_study(synthetic_study("folder:/data/mine/cifar10-jpeg.tar.gz"))
    freeze(make_results(study, failed=(0,), data="cifar10-jpeg"), tmp_path)
    text = (tmp_path / "results.json").read_text()
    assert "/data" not in text
    assert "folder:cifar10-jpeg.tar.gz" in text
    assert thaw(tmp_path).study.file.fixed.given["data"] == "folder:cifar10-jpeg.tar.gz"


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
    back = thaw(tmp_path / "out")
    assert [item.state for item in back.cells] == ["done", "missing", "missing", "missing"]
    direct = collect(load_study("tiny.toml"), tmp_path / "runs")
    assert repr(back.cells[0].outcomes) == repr(dict(sorted(direct.cells[0].outcomes.items())))
    assert isinstance(back.cells[0].run.metrics(), pd.DataFrame)


def test_nothing_to_freeze_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path)
    assert app.run(["study", "freeze", "tiny.toml", "--out", "out"]) == 2
    assert "no cell of tiny was begun under runs" in capsys.readouterr().err
