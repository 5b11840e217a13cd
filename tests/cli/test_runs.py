"""`resdiag runs` and `resdiag compare`: what was run, and what two runs differ in."""

import json
import math
import os
import shutil
from dataclasses import replace

import pandas as pd
import pytest
from judged_runs import plant

from resdiag.cli.main import app
from resdiag.diagnose.outcomes import find_differences, find_outcome, find_parting
from resdiag.runs.commit import Commit
from resdiag.runs.overview import newest_first, summarise

SMALL = ["--depth", "8", "--width", "0.25", "--data", "digits", "--batch-size", "32", "--quiet"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A healthy-looking run, one that diverges, and a damaged one, from the oldest to the newest.

    Read them, do not write to them.
    """
    root = tmp_path_factory.mktemp("runs")
    assert app.run(["run", "--variant", "d", *SMALL, "--steps", "4", "--runs", str(root)]) == 0
    blown = ["--lr", "1e6", "--steps", "9"]
    assert app.run(["run", "--variant", "a", *SMALL, *blown, "--runs", str(root)]) == 0
    done = next(root.glob("elu-*"))
    copy = root / "below" / "broken"
    copy.mkdir(parents=True)
    (copy / "run.json").write_bytes((done / "run.json").read_bytes()[:50])
    for age, folder in ((300, done), (200, next(root.glob("elu_nobn-*"))), (100, copy)):
        for file in folder.glob("*.json"):
            when = 1_700_000_000 - age
            os.utime(file, (when, when))
    return root


def listed(call, *args):
    code, out, err = call("runs", *args, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)["runs"]


def test_runs_are_listed_newest_first_with_what_they_came_to(call, root):
    broken, blown, done = listed(call, root)
    assert [one["status"] for one in (broken, blown, done)] == ["damaged", "diverged", "done"]
    assert (done["model"], done["depth"], done["steps"], done["planned"]) == ("elu", 8, 4, 4)
    assert done["verdict"] == "undetermined"
    assert 0 <= done["test_error"] <= 1
    assert math.isfinite(done["loss"])
    assert (blown["verdict"], blown["loss"], blown["test_error"]) == ("lr_too_high", None, None)
    assert broken["verdict"] == broken["model"] == ""


def test_the_table_has_a_row_per_run(call, root):
    code, out, _ = call("runs", root)
    assert code == 0
    assert "below/broken" in out
    assert "4/4" in out
    assert "nan" in out


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (("--variant", "d"), 1),
        (("--variant", "elu"), 1),
        (("--variant", "original"), 0),
        (("--status", "diverged"), 1),
        (("--verdict", "undetermined"), 1),
        (("--newest", "2"), 2),
        (("--newest", "1", "--status", "done"), 1),
        (("--variant", "d", "--status", "diverged"), 0),
    ],
)
def test_filters_keep_what_has_all_that_is_asked_for(call, root, options, count):
    assert len(listed(call, root, *options)) == count
    assert call("runs", root, *options)[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--variant", "ellu"), "unknown variant 'ellu'; did you mean 'elu'?"),
        (("--status", "dnoe"), "unknown status 'dnoe'; did you mean 'done'?"),
        (("--verdict", "exploed"), "unknown verdict 'exploed'; did you mean 'exploded'?"),
        (("--newest", "0"), "--newest"),
    ],
)
def test_a_filter_that_fits_nothing_by_mistake_is_refused(call, root, options, message):
    code, out, err = call("runs", root, *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_folder_without_runs_is_refused(call, tmp_path):
    assert "no run under" in call("runs", tmp_path)[2]
    assert call("runs", tmp_path / "none")[0] == 2


def test_a_run_that_nobody_continues_is_stale(root, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(next(root.glob("elu-*")), folder)
    commit = Commit.read(folder / "COMMIT.json")
    (folder / "COMMIT.json").write_bytes(replace(commit, status="running").to_bytes())
    assert summarise(folder).status == "stale"
    assert list(newest_first(tmp_path)) == [folder]


# -- compare ------------------------------------------------------------------------------------


def test_runs_stand_side_by_side(call, root):
    done, blown = next(root.glob("elu-*")), next(root.glob("elu_nobn-*"))
    code, out, err = call("compare", done, blown)
    assert (code, err) == (0, "")
    rows = {line.split("  ")[0]: line.split()[-2:] for line in out.splitlines()}
    assert rows["variant"] == ["elu", "elu_nobn"]
    assert rows["lr"][1] == "1e+06"
    assert "seed" not in rows
    assert "undetermined" in out
    assert "lr_too_high" in out
    document = json.loads(call("compare", done, blown, "--json")[1])
    assert document["settings"]["variant"] == ["elu", "elu_nobn"]
    assert [one["status"] for one in document["runs"]] == ["done", "diverged"]
    assert document["losses_part"]["step"] == 0


def test_two_runs_are_needed(call, root):
    code, out, err = call("compare", next(root.glob("elu-*")))
    assert (code, out) == (2, "")
    assert "1 runs: two are needed at least" in err
    assert call("compare")[0] == 2


def test_an_outcome_has_the_numbers_of_the_tables():
    def change(metrics, curve):
        metrics["grad_input"], metrics["grad_output"] = 1.0, 1.0
        last = metrics["block"] == metrics["block"].max()
        metrics.loc[last & (metrics["step"] == metrics["step"].max()), "grad_output"] = 0.01
        metrics["input_channel_std"], metrics["output_channel_std"] = 2.0**0.5, 3.0**0.5
        curve["loss"] = 2.0
        curve["test_error"] = math.nan
        curve.loc[curve.index[:2], "test_error"] = [0.1, 0.3]

    found = find_outcome(plant(change=change))
    assert found.loss == 2.0
    assert (found.test_error, found.best_test_error) == (0.3, 0.1)
    assert math.isnan(found.train_error)
    assert found.growth == pytest.approx(1.5)
    assert found.gradient_ratio == pytest.approx(100)
    assert found.gradient_step == found.run.metrics_frame["step"].max()
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["train_error"] is None


def with_losses(*losses, **settings):
    run = plant(steps=len(losses))
    curve = pd.DataFrame({"step": range(len(losses)), "loss": losses})
    return replace(run, curve_frame=curve, config=replace(run.config, **settings))


@pytest.mark.parametrize(
    ("first", "second", "parting"),
    [
        ((2.0, 1.0, 0.5), (2.0, 1.0, 0.5), None),
        ((2.0, 1.0, 0.5), (2.0, 1.009, 0.5), None),
        ((2.0, 1.0, 0.5), (2.0, 1.02, 0.5), (1, [1.0, 1.02])),
        ((2.0, math.nan), (2.0, math.nan), None),
        ((2.0, math.inf), (2.0, 1.0), (1, [math.inf, 1.0])),
        ((2.0, 1.0, 0.5), (2.0,), None),
        ((0.0, 1.0), (0.0, 1.0), None),
    ],
)
def test_losses_part_where_they_differ_by_more_than_a_hundredth(first, second, parting):
    assert find_parting([with_losses(*first), with_losses(*second)]) == parting


def test_only_settings_that_differ_are_named():
    runs = [with_losses(1.0), with_losses(1.0, lr=0.5), with_losses(1.0, lr=0.5, seed=3)]
    lr = runs[0].config.lr
    assert find_differences(runs) == {"lr": [lr, 0.5, 0.5], "seed": [0, 0, 3]}
    assert find_differences(runs[:1] * 2) == {}
