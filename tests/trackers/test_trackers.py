"""Trackers get what the run has, and nothing that happens to them reaches the training."""

import json
import math
import random
import struct
import threading
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from events import read_events
from tiny_training import digest, tiny_config, tiny_data
from tracker_conformance import TrackerConformance, assert_run_was_told, record_run

from resdiag.cli.main import app
from resdiag.errors import UsageError
from resdiag.runs.environment import environment
from resdiag.runs.folder import load_frame, read_run
from resdiag.runs.store import RunWriter
from resdiag.study.cell import Options, run_cell
from resdiag.trackers.export import export_tables, export_tracker
from resdiag.trackers.feed import Feed, open_feed
from resdiag.trackers.tags import by_step
from resdiag.trackers.tracker import TRACKERS, RunInfo, open_tracker, parse_tracker
from resdiag.training.display import Silent
from resdiag.training.interrupt import Interrupt
from resdiag.training.loop import Training
from resdiag.training.recipe import Request

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Memory:
    """A tracker that keeps what it is told, and can misbehave."""

    def __init__(self, fail_at=(), wait_at=()):
        self.heard, self.fail_at, self.wait_at = [], fail_at, wait_at
        self.go_on = threading.Event()

    def _at(self, where):
        if where in self.fail_at:
            raise OSError(28, "No space left on device")
        if where in self.wait_at:
            self.go_on.wait()

    def start(self, run):
        self._at("start")
        self.heard.append(run.name)

    def write(self, step, values):
        self._at("write")
        self.heard.append((step, values))

    def finish(self, status):
        self._at("finish")
        self.heard.append(status)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record_run(tmp_path_factory.mktemp("runs"))


def read_offline(folder):
    """The history of an offline W&B run: LevelDB's log format around protocol buffers."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its service may still be writing, although the run is finished
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, part = file.read_bytes(), 7, b""
    found = {}
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        if left < 7 or kind == 0:
            at += left
            continue
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind not in (1, 4):  # the record goes on in the next block
            continue
        record, part = wandb_internal_pb2.Record.FromString(part), b""
        items = {i.key or ".".join(i.nested_key): i.value_json for i in record.history.item}
        step = int(items.pop("_step", -1))
        for key, value in items.items():
            if not key.startswith("_"):
                found[key, step] = float(json.loads(value))
    return found


def wandb_reads_the_environment_again():
    """It does so once per process, and WANDB_DIR is another one in each test."""
    import wandb

    wandb.teardown()


def read_mlflow(store, name):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{store}", registry_uri=f"sqlite:///{store}")
    experiment = client.get_experiment_by_name("resdiag").experiment_id
    runs = [r for r in client.search_runs([experiment]) if r.info.run_name == name]
    found = {
        (metric, entry.step): entry.value
        for metric in runs[0].data.metrics
        for entry in client.get_metric_history(runs[0].info.run_id, metric)
    }
    return found, runs


# -- every tracker ----------------------------------------------------------------------------


class TestTensorBoard(TrackerConformance):
    kind = TRACKERS["tensorboard"]

    def read(self, place, name):
        return read_events(f"{place}/{name}")


class TestWandb(TrackerConformance):
    kind = TRACKERS["wandb"]

    @pytest.fixture(autouse=True)
    def _offline(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_DIR", str(tmp_path / "live"))
        (tmp_path / "live").mkdir()
        self.folder = tmp_path / "live"
        wandb_reads_the_environment_again()

    def place(self, folder):
        return "tiny"

    def read(self, place, name):
        return read_offline(self.folder if place == "tiny" else Path(place))


class TestMlflow(TrackerConformance):
    kind = TRACKERS["mlflow"]
    largest = 1.8e308

    def read(self, place, name):
        return read_mlflow(place, name)[0]


# -- tags -------------------------------------------------------------------------------------


def test_tags_of_a_step_hold_infinities_and_leave_gaps_out():
    inf, nan = math.inf, math.nan
    metrics = {
        "step": np.array([4, 4, 2, 2]), "block": np.array([0, 1, 0, 1]),
        "grad_output": np.array([1.0, inf, nan, 3.0]), "skip_gain": np.array([nan, nan, 1.0, 1.0]),
    }  # fmt: skip
    curve = {"step": np.array([2, 3]), "loss": np.array([inf, 2.0]), "error": np.array([nan, 0.5])}
    found = dict(by_step(metrics, curve, ("grad_output", "skip_gain")))
    assert list(found) == [2, 3, 4]
    assert math.isnan(found[2].pop("grad_output/block_000"))
    assert found == {
        2: {"loss": inf, "grad_output/block_001": 3.0}
        | {"skip_gain/block_000": 1.0, "skip_gain/block_001": 1.0},
        3: {"loss": 2.0, "error": 0.5},
        4: {"grad_output/block_000": 1.0, "grad_output/block_001": inf},
    }


def test_derived_metrics_are_computed_for_recorded_columns(run):
    assert list(by_step({}, {})) == []
    recorded = {name: run.metrics()[name].to_numpy() for name in ("step", "block")}
    for name in ("input_channel_mean_rms", "input_channel_std"):
        recorded[name] = run.metrics()[name].to_numpy()
    step, values = next(iter(by_step(recorded, {}, ("input_bias",))))
    frame = run.metrics()
    wanted = frame[(frame.step == step) & (frame.block == 1)].input_bias.item()
    assert values["input_bias/block_001"] == pytest.approx(wanted)


# -- the feed ---------------------------------------------------------------------------------


def feed_of(run, patience=60, **trackers):
    feed = Feed(trackers, RunInfo(name="r"), patience=patience)
    curve = run.curve()
    feed.write({}, {name: curve[name].to_numpy() for name in curve})
    return feed


def test_a_feed_tells_every_tracker_everything_in_order(run):
    one, two = Memory(), Memory()
    feed = feed_of(run, one=one, two=two)
    feed.close("done")
    feed.close("done")
    assert one.heard == two.heard
    assert one.heard[0] == "r"
    assert one.heard[-1] == "done"
    assert [step for step, _ in one.heard[1:-1]] == run.curve().step.tolist()
    assert feed.notes == []


@pytest.mark.parametrize("where", ["start", "write", "finish"])
def test_a_tracker_that_fails_gets_one_note_and_the_others_go_on(run, where):
    good, bad = Memory(), Memory(fail_at=where)
    feed = feed_of(run, bad=bad, good=good)
    feed.write({}, {"step": np.array([99]), "loss": np.array([0.0])})
    feed.close("done")
    (note,) = feed.notes
    assert note == "tracker bad failed: OSError [Errno 28] No space left on device"
    assert good.heard[-2:] == [(99, {"loss": 0.0}), "done"]


@pytest.mark.parametrize("where", ["start", "write", "finish"])
def test_a_tracker_that_hangs_is_not_waited_for(run, where):
    stuck = Memory(wait_at=[where])
    feed = feed_of(run, patience=0.2, stuck=stuck)
    feed.close("done")
    stuck.go_on.set()
    assert feed.notes == ["tracker stuck did not finish within 0.2 s"]


def test_a_tracker_that_is_too_slow_does_not_pile_up_memory():
    stuck = Memory(wait_at=["write"])
    feed = Feed({"stuck": stuck}, RunInfo(name="r"), patience=60)
    for step in range(400):
        feed.write({}, {"step": np.array([step]), "loss": np.array([0.0])})
    assert feed.notes == ["tracker stuck is too slow: it gets nothing more"]
    stuck.go_on.set()
    feed.close("done")
    assert len(stuck.heard) < 300


# -- live -------------------------------------------------------------------------------------


def training(root, tell=None, **changes):
    config = tiny_config(**changes)
    data = tiny_data()
    writer = RunWriter.open(
        root, config, environment=environment("cpu", "float32"), data=data.identity
    )
    with writer:
        status = Training(config, data, writer, tell).run(Silent(), Interrupt())
    return read_run(writer.folder), status


def test_a_training_tells_its_trackers_what_it_commits(tmp_path):
    memory = Memory()
    feed = Feed({"memory": memory}, RunInfo(name="r"))
    run, status = training(tmp_path, feed.write)
    feed.close(status)
    found = {(tag, s): v for s, values in memory.heard[1:-1] for tag, v in values.items()}
    assert_run_was_told(found, run, rel=2e-6)
    assert memory.heard[-1] == "done"


def test_a_resumed_training_tells_no_step_twice(tmp_path):
    heard = []

    def tell(metrics, curve):
        heard.extend(curve["step"].tolist())
        if len(heard) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training(tmp_path, tell)
    training(tmp_path, tell)
    assert heard == list(range(12))


def test_the_training_is_the_same_with_every_tracker_and_with_broken_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb_reads_the_environment_again()
    request = Request(
        variant="elu", depth=8, width=0.25, data="digits", steps=4, batch_size=32, augment=True
    )
    said = []
    outcomes = {}
    (tmp_path / "taken").write_text("a file where a folder is needed")
    every = (
        f"tensorboard:{tmp_path}/tb", "wandb:tiny", f"mlflow:{tmp_path}/ml.db",
        f"tensorboard:{tmp_path}/taken/tb",
    )  # fmt: skip
    for name, wanted in (("without", ()), ("with", every)):
        options = Options(root=tmp_path / name, quiet=True, trackers=wanted)
        random.seed(1)
        outcomes[name] = run_cell(request, options, said.append)
        outcomes[name, "draw"] = random.random(), torch.rand(1).item(), np.random.rand()  # noqa: NPY002
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
    assert digest(outcomes["with"].run.path) == digest(outcomes["without"].run.path)
    assert outcomes["without", "draw"][0] == outcomes["with", "draw"][0]
    assert outcomes["without"].notes == ()
    (note,) = outcomes["with"].notes
    assert note.startswith(f"tracker tensorboard:{tmp_path}/taken/tb failed: ")
    run = outcomes["with"].run
    assert_run_was_told(read_events(tmp_path / "tb" / run.path.name), run)
    assert_run_was_told(read_offline(tmp_path), run)
    found, (tracked,) = read_mlflow(tmp_path / "ml.db", run.path.name)
    assert_run_was_told(found, run, largest=1.8e308)
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["variant"] == "elu"


# -- export -----------------------------------------------------------------------------------


def test_exported_tables_are_the_frames(run, tmp_path):
    for kind, read in (
        ("csv", pd.read_csv),
        ("jsonl", lambda file: pd.read_json(file, lines=True)),
    ):
        files = export_tables([run, run], kind, tmp_path / kind)
        assert [file.name for file in files] == [f"metrics.{kind}", f"curve.{kind}"]
        metrics, curve = map(read, files)
        one = load_frame(run.path)
        wanted = pd.concat([one, one], ignore_index=True)
        assert list(metrics.columns) == list(wanted.columns)
        for name in wanted.select_dtypes("number"):
            got = pd.to_numeric(metrics[name]).to_numpy(float)
            assert np.allclose(
                got, wanted[name].to_numpy(float), rtol=1e-5, atol=1e-9, equal_nan=True
            )
        assert curve.loss.to_numpy()[: run.steps] == pytest.approx(run.curve().loss.to_numpy())
        assert set(curve.run) == {run.path.name}


def test_exported_events_are_the_run_and_an_export_replaces_the_one_before(run, tmp_path):
    for _ in range(2):
        where = export_tracker(run, "tensorboard", str(tmp_path))
        assert_run_was_told(read_events(where), run)
        assert len(list(tmp_path.glob("*/*"))) == 1
    (tmp_path / run.path.name / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds more than event files: notes\.txt"):
        export_tracker(run, "tensorboard", str(tmp_path))
    assert not (tmp_path / ".export").exists()


def test_exported_metrics_can_be_chosen(run, tmp_path):
    where = export_tracker(run, "tensorboard", str(tmp_path), ["output_mean"])
    assert_run_was_told(read_events(where), run, ["output_mean"])


def test_an_exported_wandb_run_is_offline_and_whole(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    export_tracker(run, "wandb", str(tmp_path))
    assert_run_was_told(read_offline(tmp_path), run)


def test_an_exported_mlflow_run_is_new_each_time(run, tmp_path):
    for count in (1, 2):
        export_tracker(run, "mlflow", str(tmp_path / "ml.db"))
        found, runs = read_mlflow(tmp_path / "ml.db", run.path.name)
        assert_run_was_told(found, run)
        assert len(runs) == count


def test_an_unfinished_mlflow_run_is_continued(tmp_path):
    for status in ("stopped", "done", "done"):
        feed = open_feed([f"mlflow:{tmp_path}/ml.db"], RunInfo(name="r", config={"a": 1}))
        feed.write({}, {"step": np.array([len(status)]), "loss": np.array([math.inf])})
        feed.close(status)
        assert feed.notes == []
    found, runs = read_mlflow(tmp_path / "ml.db", "r")
    assert len(runs) == 2
    assert runs[-1].data.params == {"a": "1"}
    assert found["loss", 4] > 1e308  # MLflow has no infinity


# -- the command line -------------------------------------------------------------------------


def answer(capsys, *words):
    code = app.run([*map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_exports_and_says_where(run, tmp_path, capsys):
    code, out, _ = answer(capsys, "export", run.path, "--to", "csv", tmp_path / "t")
    assert code == 0
    assert out.split() == [str(tmp_path / "t" / "metrics.csv"), str(tmp_path / "t" / "curve.csv")]
    code, out, _ = answer(
        capsys,
        "export",
        run.path,
        "--to",
        "tensorboard",
        tmp_path,
        "--metric",
        "skip_gain",
        "--json",
    )
    document = json.loads(out)
    assert code == 0
    assert document["kind"] == "tensorboard"
    assert document["written"] == [str(tmp_path / run.path.name)]
    assert_run_was_told(read_events(document["written"][0]), run, ["skip_gain"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "tensorbord", "x"], "did you mean 'tensorboard'?"),
        (["--to", "csv"], "requires 2 arguments"),
        ([], "--to is required"),
        (["--to", "csv", "x", "--metric", "skip_gain"], "--metric is for trackers"),
        (["--to", "wandb", "x", "--metric", "skip_gian"], "did you mean 'skip_gain'?"),
    ],
)
def test_mistakes_of_an_export_are_one_line(run, capsys, words, message):
    code, out, err = answer(capsys, "export", run.path, *words)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensorbord:x", "unknown tracker 'tensorbord'; did you mean 'tensorboard'?"),
        ("wandb", "tracker 'wandb' needs a place: wandb:PROJECT"),
    ],
)
def test_mistakes_of_a_tracker_are_one_line(text, message, capsys):
    words = ["run", "--variant", "elu", "--depth", "8", "--data", "digits", "--tracker", text]
    code, _, err = answer(capsys, *words)
    assert code == 2
    assert message in err


def test_a_tracker_that_is_not_installed_names_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="wandb is not installed") as caught:
        open_tracker("wandb:project")
    assert caught.value.hint == "pip install 'resdiag[wandb]'"
    with pytest.raises(UsageError, match="mlflow is not installed"):
        parse_tracker("mlflow:x.db")


def test_a_store_that_refuses_is_one_line(run, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UsageError, match="mlflow at nowhere://x refused"):
            export_tracker(run, "mlflow", "nowhere://x")
