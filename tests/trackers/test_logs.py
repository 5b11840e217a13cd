"""Logs of other tools as runs: written by the real libraries, and by hand; damaged ones too."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import resdiag
from resdiag.cli.main import app
from resdiag.diagnose.progress import count_steps
from resdiag.errors import UsageError
from resdiag.trackers.logs.entries import COLUMNS, plain_name, recognise
from resdiag.trackers.logs.formats import FORMATS, load_log


def write_csv(path, rows, header="step,loss,grad_norm,lr"):
    lines = [",".join(map(str, row)) for row in rows]
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def train_by_hand(lr, steps=120):
    """A real training of a small network, its loss and gradient norm per step."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    x = torch.randn(256, 8)
    y = x.sum(1, keepdim=True)
    for step in range(steps):
        optimizer.zero_grad()
        at = torch.randint(256, (32,))
        loss = (net(x[at]) - y[at]).square().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), math.inf)
        optimizer.step()
        yield step, loss.item(), norm.item(), lr


def explain(path, capsys, *options):
    code = app.run(["explain", str(path), "--json", *options])
    document = json.loads(capsys.readouterr().out)
    assert code == 0, document
    return document


# -- real logs -------------------------------------------------------------------------------------


def test_a_csv_of_a_training_that_learns_has_no_fault(tmp_path, capsys):
    path = write_csv(tmp_path / "log.csv", train_by_hand(0.02))
    run = load_log(path)
    assert (run.status, run.steps, len(run.blocks)) == ("done", 120, 0)
    assert run.config.lr == 0.02
    document = explain(path, capsys)
    assert document["run"] == str(path)
    assert document["verdict"]["name"] == "undetermined"  # a log alone does not show health
    assert "No rule reports a fault in 120 steps" in document["verdict"]["summary"]
    assert not any(line.startswith("resdiag plot") for line in document["verdict"]["next"])


def test_a_csv_of_a_training_that_diverges_is_told_with_its_step(tmp_path, capsys):
    rows = list(train_by_hand(2.0))
    broken = next(step for step, loss, norm, _ in rows if not math.isfinite(loss + norm))
    path = write_csv(tmp_path / "log.csv", rows)
    document = explain(path, capsys)
    found = {item["name"] for item in document["findings"]}
    assert "exploded" in found
    assert load_log(path).status == "diverged"
    items = document["verdict"]["evidence"]
    assert min(item["step"] for item in items if "for the first time" in item["text"]) == broken


def test_tensorboard_event_files_are_read(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    rows = list(train_by_hand(0.02, steps=40))
    with SummaryWriter(str(tmp_path / "logs" / "mine")) as writer:
        for step, loss, norm, lr in rows:
            writer.add_scalar("Loss/train", loss, step)
            writer.add_scalar("gradient_norm", norm, step)
            writer.add_scalar("lr-SGD", lr, step)
            writer.add_scalar("GPU/temperature", 60, step)
        writer.add_text("note", "not a number", 0)
    run = load_log(tmp_path / "logs")
    assert run.config.model == "mine"
    curve = run.curve()
    np.testing.assert_allclose(curve.loss, [row[1] for row in rows], rtol=1e-6)
    np.testing.assert_allclose(curve.grad_norm, [row[2] for row in rows], rtol=1e-6)
    assert any("GPU/temperature" in note for note in run.notes)
    assert explain(tmp_path / "logs", capsys)["log"] == list(run.notes)


def test_the_state_of_a_real_trainer_is_read(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Regression(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Linear(4, 1)

        def forward(self, x, labels):
            return {"loss": (self.net(x)[:, 0] - labels).square().mean()}

    data = [{"x": torch.randn(4), "labels": torch.randn(())} for _ in range(32)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), max_steps=12, logging_steps=3, save_steps=6, learning_rate=0.01,
        per_device_train_batch_size=4, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = transformers.Trainer(Regression(), arguments, train_dataset=data)
    trainer.train()
    capsys.readouterr()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    run = load_log(tmp_path / "out")  # of its two checkpoints, the last
    assert (run.steps, run.config.steps, run.status) == (12, 12, "done")
    curve = run.curve()
    assert curve.step.tolist() == [2, 5, 8, 11]  # 0 is the first step, and the mean is at the last
    np.testing.assert_allclose(curve.loss, [entry["loss"] for entry in logged])
    np.testing.assert_allclose(curve.grad_norm, [entry["grad_norm"] for entry in logged])
    assert any("mean over 3 steps" in note for note in run.notes)
    assert "in 12 steps (4 values)" in explain(tmp_path / "out", capsys)["verdict"]["summary"]


def test_a_file_of_a_real_wandb_run_is_read(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = wandb.init(project="p", name="mine", dir=str(tmp_path),
                     settings=wandb.Settings(silent=True, console="off"))  # fmt: skip
    rows = list(train_by_hand(0.02, steps=30))
    for step, loss, norm, _ in rows:
        run.log({"train": {"loss": loss}, "train/grad_norm": norm, "note": "x" * 2000}, step=step)
    run.finish()
    wandb.teardown()  # its process writes the last record when it ends
    found = load_log(next(tmp_path.rglob("*.wandb")))
    assert found.config.model == "mine"
    np.testing.assert_allclose(found.curve().loss, [row[1] for row in rows])
    np.testing.assert_allclose(found.curve().grad_norm, [row[2] for row in rows])


def test_a_table_of_lightnings_csv_logger_is_read(tmp_path):
    pytest.importorskip("lightning")
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(str(tmp_path), name="mine", version=0)
    for step in range(6):
        logger.log_metrics({"train_loss_step": 1.0 / (step + 1), "epoch": step // 3}, step=step)
        if step % 3 == 2:
            logger.log_metrics({"val_loss": 2.0, "epoch": step // 3}, step=step)
    logger.save()
    curve = load_log(tmp_path).curve()
    np.testing.assert_allclose(curve.loss, [1 / (step + 1) for step in range(6)])
    assert curve.test_loss.dropna().to_dict() == {2: 2.0, 5: 2.0}
    assert curve.train_loss.dropna().to_dict() == pytest.approx({2: 1 / 3, 5: 1 / 6})


# -- what is in a log ------------------------------------------------------------------------------


def test_steps_are_counted_and_not_entries(tmp_path, capsys):
    rows = [(step, 2.0 + step / 1000, 1.0, 0.1) for step in range(0, 2000, 20)]
    path = write_csv(tmp_path / "rising.csv", rows)
    document = explain(path, capsys)
    assert document["verdict"]["name"] == "lr_too_high"
    assert "the last 400 steps (20 values)" in document["verdict"]["summary"].replace("The", "the")
    assert count_steps(load_log(path).curve().set_index("step").loss) == 2000


def state(entries, **facts):
    return json.dumps({"log_history": entries, "global_step": 30, "max_steps": 60, **facts})


def test_a_trainer_that_broke_shows_by_its_gradient_norm(tmp_path, capsys):
    entries = [
        {"step": step, "loss": 2.0 if step < 20 else 0.0, "learning_rate": 1e-3,
         "grad_norm": 1.0 if step < 20 else math.nan}
        for step in range(1, 31)
    ]  # fmt: skip
    entries.append({"step": 30, "train_runtime": 3.0, "train_loss": 1.3})
    path = tmp_path / "trainer_state.json"
    path.write_text(state(entries))
    document = explain(path, capsys)
    assert document["verdict"]["name"] == "exploded"
    assert document["verdict"]["step"] == 19  # the 20th update
    assert any("grad_norm is NaN in 11 entries" in line for line in document["log"])
    assert len(load_log(path).curve()) == 30


def test_a_run_that_was_stopped_is_at_its_step(tmp_path):
    path = tmp_path / "trainer_state.json"
    path.write_text(state([{"step": 30, "loss": 1.0}], logging_steps=30))
    run = load_log(path)
    assert (run.status, run.steps, run.config.steps) == ("stopped", 30, 60)


def test_an_export_of_wandb_as_lines_has_nan_as_a_word(tmp_path):
    path = tmp_path / "history.jsonl"
    lines = [{"_step": 0, "train/loss": 2.0, "note": "x"}, {"_step": 1, "train/loss": "NaN"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    run = load_log(path)
    assert run.curve().loss.tolist() == [2.0, math.inf]
    assert run.status == "diverged"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_separators_quotes_gaps_and_words_are_read(tmp_path, delimiter):
    path = tmp_path / "log.csv"
    rows = [["Step", "run - train/loss", "loss", "comment"], ["0", "", "2.5", '"a, b; c"'],
            ["1", "", "", "x"], ["2", "", "1.5", ""]]  # fmt: skip
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(delimiter.join, rows)).encode())
    run = load_log(path)
    assert run.curve().set_index("step").loss.to_dict() == {0: 2.5, 2: 1.5}
    assert any("comment" in note for note in run.notes)


def test_every_usual_name_is_recognised():
    for column, names in COLUMNS.items():
        for name in names:
            assert recognise([name.upper(), "other"]) == {column: name.upper()}
    assert len({plain_name(n) for names in COLUMNS.values() for n in names}) >= sum(
        len({plain_name(n) for n in names}) for names in COLUMNS.values()
    )


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.csv",
            b"epoch,accuracy\n1,0.5\n",
            "no column for a loss or a gradient norm: epoch",
        ),
        ("a.csv", b"\xff\xfe\x00", "not text: byte 0 is not UTF-8"),
        ("a.csv", b"", "no column for a loss or a gradient norm: none at all"),
        ("a.json", b"{", "not JSON at line 1"),
        ("a.jsonl", b'{"loss": 1}\n[1]\n', "entry 2 is not an object"),
        ("a.jsonl", b"[" * 100_000, "not JSON at line 1"),
        ("trainer_state.json", b"{}", "has no list 'log_history'"),
        ("events.out.tfevents.1", b"garbage", "has no scalar"),
        ("a.wandb", b"garbage", "has no history"),
        ("a.pkl", b"", "is of no known format; known: trainer_state, tensorboard, wandb, jsonl"),
    ],
)
def test_a_log_that_cannot_be_read_is_one_line(tmp_path, capsys, name, content, words):
    if name.endswith(".wandb"):
        pytest.importorskip("wandb")
    (tmp_path / name).write_bytes(content)
    assert app.run(["explain", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert words in said


def test_a_folder_without_a_log_an_unknown_format_and_several_logs_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no run and no log in"):
        load_log(tmp_path)
    with pytest.raises(UsageError, match="unknown format 'tensorbord'; did you mean 'tensorboard'"):
        load_log(tmp_path, "tensorbord")
    for name in ("a.csv", "b.csv"):
        write_csv(tmp_path / name, [(0, 1.0, 1.0, 0.1)])
    with pytest.raises(UsageError, match="holds 2 logs of the format csv"):
        load_log(tmp_path)


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    (tmp_path / "events.out.tfevents.1").write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs the package tensorboard") as error:
        load_log(tmp_path)
    assert error.value.hint == "pip install 'resdiag[tensorboard]'"


def test_experiments_on_a_log_are_refused(tmp_path, capsys):
    path = write_csv(tmp_path / "a.csv", [(0, 1.0, 1.0, 0.1)])
    assert app.run(["explain", str(path), "--ask"]) == 2
    assert "is a log: --lesion and --ask need the network" in capsys.readouterr().err


def test_a_run_and_a_log_are_explained_together(tmp_path, capsys):
    paths = [write_csv(tmp_path / f"{n}.csv", train_by_hand(0.02, 30)) for n in "ab"]
    assert app.run(["explain", *map(str, paths)]) == 0
    assert f"{paths[1]}: undetermined" in capsys.readouterr().out


HEADERS = st.sampled_from(["step", "loss", "grad_norm", "lr", "val_loss", "x", "", "Step", '"'])
CELLS = st.one_of(
    st.floats().map(str), st.integers().map(str), st.text(max_size=5),
    st.sampled_from(["", "NaN", "inf", "1e999", "-1", "0.5", '"', "1_0", "\0"]),
)  # fmt: skip
TABLES = st.lists(st.lists(CELLS, max_size=4), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.one_of(
    st.binary(max_size=200),
    st.tuples(st.lists(HEADERS, max_size=4), TABLES).map(
        lambda t: "\n".join(",".join(row) for row in [t[0], *t[1]]).encode(errors="replace")
    ),
))  # fmt: skip
def test_whatever_a_csv_holds_there_is_a_run_or_a_refusal(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(content)
    for name in ("csv", "jsonl", "trainer_state"):
        try:
            run = load_log(path, name)
        except UsageError:
            continue
        assert (run.curve().step >= 0).all()
        resdiag.judge(run)


@settings(max_examples=60, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["log_history", "step", "loss", "max_steps", "a"]), inner),
    max_leaves=12,
))  # fmt: skip
def test_whatever_json_there_is_a_run_or_a_refusal(tmp_path_factory, document):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(document))
    for name in ("jsonl", "trainer_state"):
        try:
            run = load_log(path, name)
        except UsageError:
            continue
        resdiag.judge(run)


def test_the_formats_in_the_help_are_those_of_the_table(capsys):
    assert app.run(["explain", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(name in said for name in FORMATS)
