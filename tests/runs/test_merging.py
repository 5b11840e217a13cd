"""Merged segments: the same rows in fewer files, whatever happens on the way."""

import numpy as np
from made_runs import contents, make_checkpoint, make_curve, make_metrics, open_writer, write_run

from resdiag.catalog.table import METRICS, RECORDED, derive, inputs_of
from resdiag.runs.commit import COMMIT, PREVIOUS, Commit
from resdiag.runs.folder import read_run
from resdiag.runs.segments import COUNT


def test_many_commits_leave_few_segments_with_every_row_once(tmp_path):
    folder = write_run(tmp_path, until=68, every=2)
    commit = Commit.read(folder / COMMIT)
    assert len(commit.parts("metrics")) <= COUNT
    assert len(list((folder / "metrics").iterdir())) <= COUNT + 1
    rows = read_run(folder).metrics()
    wanted = make_metrics(0, 68)
    for name in ("step", "block", "grad_output"):
        np.testing.assert_array_equal(rows[name].to_numpy(), wanted[name])
    curve = read_run(folder).curve()
    np.testing.assert_array_equal(curve["loss"].to_numpy(), make_curve(0, 68)["loss"])
    assert np.isnan(curve["test_error"]).all()  # a column that was left out stays so


def test_the_commit_before_a_merge_still_has_all_of_its_files(tmp_path):
    with open_writer(tmp_path) as writer:
        for step in range(2, 2 * COUNT + 2, 2):
            rows = make_metrics(step - 2, step)
            writer.commit(step, rows, make_curve(step - 2, step), *make_checkpoint(step))
        last, before = (Commit.read(writer.folder / name) for name in (COMMIT, PREVIOUS))
    assert len(last.parts("metrics")) == 1
    assert len(before.parts("metrics")) == COUNT - 1
    before.verify(writer.folder)
    last.verify(writer.folder)


def test_a_run_that_was_interrupted_between_merges_has_the_same_bytes(tmp_path):
    straight = write_run(tmp_path / "a", until=40, every=2)
    for until in (30, 32, 34, 40):
        broken = write_run(tmp_path / "b", until=until, every=2)
        if until < 40:  # go on from the checkpoint as after a crash, not from a finished run
            (broken / "verdict.json").unlink(missing_ok=True)
            (broken / COMMIT).write_bytes(Commit.read(broken / COMMIT).without_verdict().to_bytes())
    assert contents(straight) == contents(broken)


def test_a_damaged_segment_is_not_merged_and_does_not_end_the_training(tmp_path):
    with open_writer(tmp_path) as writer:
        for step in range(1, COUNT + 3):
            rows = make_metrics(step - 1, step)
            writer.commit(step, rows, make_curve(step - 1, step), *make_checkpoint(step))
            if step == 3:
                (writer.folder / "metrics" / "part-00000002.parquet").write_bytes(b"PAR1")
        assert len(Commit.read(writer.folder / COMMIT).parts("metrics")) == COUNT + 2
        assert len(Commit.read(writer.folder / COMMIT).parts("curve")) < COUNT


def test_old_columns_of_custom_metrics_survive_a_merge(tmp_path):
    with open_writer(tmp_path) as writer:
        writer.describe([], [], custom=[{"id": "mine", "label": "mine", "unit": "1"}])
        for step in range(1, COUNT):
            rows = make_metrics(step - 1, step) | {"mine": np.full(3, step, np.float32)}
            writer.commit(step, rows, make_curve(step - 1, step), *make_checkpoint(step))
    with open_writer(tmp_path) as writer:  # where nobody has registered the metric
        rows = make_metrics(COUNT - 1, COUNT)
        writer.commit(COUNT, rows, make_curve(COUNT - 1, COUNT), *make_checkpoint(COUNT))
    assert len(Commit.read(writer.folder / COMMIT).parts("metrics")) == 1
    mine = read_run(writer.folder).metrics()["mine"].to_numpy()
    np.testing.assert_array_equal(mine[:-3], np.repeat(np.arange(1, COUNT), 3))
    assert np.isnan(mine[-3:]).all()


def test_some_columns_are_what_they_are_among_all(tmp_path):
    run = read_run(write_run(tmp_path))
    everything = run.metrics()
    for name in METRICS:
        part = run.metrics([name])
        expected = {"step", "block"} | ({name} & {*everything.columns})
        assert set(part.columns) == expected
        for column in expected:
            np.testing.assert_array_equal(part[column], everything[column])
    assert inputs_of("forward_growth") <= {*RECORDED}
    columns = {name: everything[name].to_numpy() for name in RECORDED}
    assert set(derive(columns, names=["grad_growth"])) == {"grad_growth"}
