import json
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import (
    DATA,
    ENVIRONMENT,
    make_blocks,
    make_checkpoint,
    make_config,
    make_curve,
    make_metrics,
    open_writer,
    write_run,
)

import resdiag
from resdiag.catalog.set_metrics import OF_BLOCKS
from resdiag.catalog.table import METRICS, RECORDED
from resdiag.errors import ResdiagError, UsageError
from resdiag.runs import files
from resdiag.runs.commit import Commit
from resdiag.runs.folder import Run, find_runs, latest_run, load_frame, read_run


def test_a_run_reads_as_it_was_written(tmp_path):
    run = read_run(write_run(tmp_path))
    assert run.config == make_config()
    assert (run.environment, run.data) == (ENVIRONMENT, DATA)
    assert (run.status, run.steps, run.point) == ("done", 15, "local")
    assert (run.blocks, run.unavailable) == (make_blocks(), [])
    assert run.written_verdict == {"name": "fine"}
    assert run.label == "elu_pre-8"
    for name, values in make_metrics(0, 15).items():
        np.testing.assert_array_equal(run.metrics()[name], values)
    np.testing.assert_array_equal(run.curve()["loss"], make_curve(0, 15)["loss"])


def test_frames_have_the_recorded_and_the_derived_columns_in_the_catalogues_order(tmp_path):
    run = read_run(write_run(tmp_path))
    per_block = [
        name for name, metric in METRICS.items() if metric.site != "run" and name not in OF_BLOCKS
    ]
    assert list(run.metrics().columns) == ["step", "block", *per_block]
    assert (run.metrics()["grad_growth"] == 1).all()
    assert "lr_grad_norm" in run.curve().columns


def test_a_run_can_be_made_of_frames():
    frame = pd.DataFrame(make_metrics(0, 2))
    run = Run(config=make_config(seed=3), blocks=make_blocks(), metrics_frame=frame)
    assert (run.metrics()["branch_share"] == 1 - frame["shortcut_share"]).all()
    assert run.label == "elu_pre-8 seed 3"
    assert "grad_growth" not in frame.columns


def test_a_begun_run_without_a_commit_is_new_and_empty(tmp_path):
    with open_writer(tmp_path) as writer:
        run = read_run(writer.folder)
    assert (run.status, run.steps, len(run.metrics()), len(run.curve())) == ("new", 0, 0, 0)
    assert load_frame(tmp_path).empty


def test_an_open_run_stays_as_it_was_when_it_was_opened(tmp_path):
    with open_writer(tmp_path) as writer:
        for step in (5, 10):
            writer.commit(step, {}, make_curve(step - 5, step), *make_checkpoint(step))
            if step == 5:
                run = read_run(writer.folder)
    assert run.steps == len(run.curve()) == 5


def test_load_is_one_tidy_frame(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "study", make_config(seed=seed))
    frame = resdiag.load_frame(tmp_path)
    assert len(frame) == 2 * 15 * 3
    assert set(frame["seed"]) == {0, 1}
    assert set(frame["run"]) == {make_config(seed=seed).name for seed in (0, 1)}
    one = frame[(frame["seed"] == 1) & (frame["step"] == 4)]
    np.testing.assert_allclose(one["depth_fraction"], [1 / 6, 3 / 6, 5 / 6])
    assert list(one["stage"]) == [0, 1, 2]
    assert list(one["transition"]) == [False, True, True]
    assert set(RECORDED) < set(frame.columns)
    pd.testing.assert_frame_equal(
        load_frame(find_runs(tmp_path)[1]), frame[frame["seed"] == 1].reset_index(drop=True)
    )


def test_other_readers_see_the_same_numbers(tmp_path):
    folder = write_run(tmp_path)
    frame = pd.read_parquet(folder / "metrics")
    pd.testing.assert_frame_equal(frame, read_run(folder).metrics()[list(frame.columns)])
    keys = pq.read_schema(folder / "metrics" / "part-00000005.parquet").metadata
    assert (keys[b"variant"], keys[b"seed"], keys[b"point"]) == (b"elu_pre", b"0", b"local")


def test_the_latest_run_is_the_one_that_committed_last(tmp_path):
    with pytest.raises(UsageError, match="no run under") as caught:
        latest_run(tmp_path)
    assert "resdiag run" in caught.value.hint
    first, second = (write_run(tmp_path, make_config(seed=seed)) for seed in (0, 1))
    assert latest_run(tmp_path) == second
    with open_writer(tmp_path) as writer:
        writer.finish("done", None)
    assert latest_run(tmp_path) == first


def test_a_wrong_path_is_one_line_with_the_nearest_run(tmp_path):
    folder = write_run(tmp_path)
    with pytest.raises(UsageError, match=r"no run at .*: there is no such folder") as caught:
        read_run(f"{folder}x")
    assert caught.value.hint == f"did you mean {folder}?"
    with pytest.raises(UsageError, match="no run at"):
        read_run(tmp_path)
    with pytest.raises(UsageError, match="no run at"):
        load_frame(tmp_path / "nothing")


# --- damage and malice: one line, nothing executed ------------------------------------------


def replace_file(folder, name, data):
    """Put other content into a run as a forger would: with a matching commit."""
    (folder / name).write_bytes(data)
    document = json.loads((folder / "COMMIT.json").read_bytes())
    document.pop("sha256")
    document["files"][name] = files.hashlib.sha256(data).hexdigest()
    (folder / "COMMIT.json").write_bytes(files.seal(document))
    (folder / "COMMIT.prev.json").unlink(missing_ok=True)


def read_everything(folder):
    run = read_run(folder)
    run.metrics(), run.curve(), run.label, load_frame(folder)
    with open_writer(folder.parent) as writer:
        writer.restore()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("template"))


@pytest.fixture
def forged(template, tmp_path):
    folder = tmp_path / template.name
    for path in template.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(template)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(template)).write_bytes(path.read_bytes())
    return folder


NAMES = [
    "run.json", "blocks.json", "verdict.json", "state-00000015.json", "ckpt-00000015.safetensors",
    "metrics/part-00000010.parquet", "curve/part-00000010.parquet",
]  # fmt: skip


def parquet(**columns):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue())


JUNK = {
    "pickle": b"c__builtin__\nexec\n(S'raise SystemExit(3)'\ntR.",
    "zip": b"PK\x03\x04" + bytes(50),
    "deep": b"[" * 100_000,
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "nothing": b"",
    "list": b"[1]",
    "object": b'{"a": {"b": [null]}}',
    "latin": b'{"a": "\xff"}',
    "header": (2**63 - 1).to_bytes(8, "little") + b"{}",
    "overlap": (54).to_bytes(8, "little")
    + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,99]}}' + bytes(9),
    "strings": parquet(step=["a"], block=["b"]),
    "nulls": parquet(step=[None, 1], block=[1, None]),
    "lists": parquet(step=[[1]], block=[[1]], loss=[[1.0]]),
    "large": parquet(step=[2**40], block=[2**40]),
    "other": parquet(x=[1]),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("junk", JUNK)
def test_a_forged_file_is_a_usage_error_and_executes_nothing(forged, name, junk):
    replace_file(forged, name, JUNK[junk])
    watching, seen = [True], []

    def audit(event, _args):
        if watching[0] and event in ("pickle.find_class", "subprocess.Popen", "os.system"):
            seen.append(event)

    sys.addaudithook(audit)
    refusal = None
    try:
        read_everything(forged)
    except UsageError as error:
        refusal = error.message
    finally:
        watching[0] = False
    assert not seen
    if junk == "object" and name in NAMES[1:4]:  # a verdict or a state may be any object
        assert refusal is None
    else:
        assert name in refusal or "config" in refusal
        assert "\n" not in refusal


@pytest.mark.parametrize(
    "name", ["../../secret.json", "/etc/passwd", "metrics/../../x.parquet", "a\x00b", "notes.txt"]
)
def test_a_commit_that_names_a_foreign_file_is_refused(forged, name):
    outside = forged.parent.parent / "secret.json"
    outside.write_text("{}")
    document = json.loads((forged / "COMMIT.json").read_bytes())
    document.pop("sha256")
    document["files"][name] = "0"
    (forged / "COMMIT.json").write_bytes(files.seal(document))
    with pytest.raises(UsageError, match="not a commit of a run"):
        read_run(forged)
    assert outside.exists()


def test_links_out_of_the_folder_are_not_followed_when_deleting(forged, tmp_path):
    outside = tmp_path / "elsewhere"
    (forged / "metrics").rename(outside)
    (forged / "metrics").symlink_to(outside)
    with open_writer(forged.parent, force=True):
        assert len(list(outside.iterdir())) == 3


@given(
    st.fixed_dictionaries(
        {},
        optional={
            key: st.none() | st.integers() | st.text() | st.lists(st.integers())
            | st.dictionaries(st.text(), st.text())
            for key in ("schema", "step", "status", "files", "drift", "else")
        },
    )
)  # fmt: skip
def test_any_sealed_document_is_a_commit_or_a_usage_error(tmp_path_factory, document):
    path = tmp_path_factory.getbasetemp() / "COMMIT.json"
    path.write_bytes(files.seal(document))
    with pytest.raises(ResdiagError) as caught:
        Commit.read(path)
    assert "\n" not in caught.value.message


@given(st.binary(max_size=200))
def test_any_bytes_are_a_usage_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "COMMIT.json"
    path.write_bytes(data)
    with pytest.raises(UsageError, match="is damaged"):
        Commit.read(path)


def test_a_newer_schema_is_said_to_be_one(forged):
    document = json.loads((forged / "COMMIT.json").read_bytes())
    document.pop("sha256")
    (forged / "COMMIT.json").write_bytes(files.seal({**document, "schema": 99}))
    for read in (read_run, lambda folder: open_writer(folder.parent)):
        with pytest.raises(UsageError, match="has schema 99; this resdiag reads 1"):
            read(forged)


@pytest.mark.parametrize("name", [*NAMES[:3], *NAMES[5:], "COMMIT.json"])
def test_a_reader_names_the_damaged_file(forged, name):
    data = (forged / name).read_bytes()
    (forged / name).write_bytes(data[:-1])
    with pytest.raises(UsageError, match=rf"{name} is damaged") as caught:
        load_frame(forged), read_run(forged).curve()
    assert "repairs it" in caught.value.hint


def test_a_lost_commit_is_not_read_as_a_new_run(forged):
    (forged / "COMMIT.json").unlink()
    with pytest.raises(UsageError, match=r"cannot read .*COMMIT\.json"):
        read_run(forged)
