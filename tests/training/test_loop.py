import os
import signal
import threading
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_training import (
    digest,
    open_training,
    run_tiny_cell,
    tiny_config,
    tiny_data,
    train,
    weights,
)
from torch import nn
from torch.optim import SGD

from resdiag.data.augment import Augmenter
from resdiag.data.registry import list_sets
from resdiag.errors import BusyError
from resdiag.models.resnet import build_model
from resdiag.models.variants import VARIANTS
from resdiag.runs import checkpoint as packed
from resdiag.runs.store import RunWriter
from resdiag.training import checkpoint, display
from resdiag.training.curve import COLUMNS, Curve, MostChangedBlock
from resdiag.training.display import Bar, Lines, Progress, Silent, open_display
from resdiag.training.interrupt import Interrupt
from resdiag.training.recipe import learning_rate

STANDING = Progress(done=3, loss=1.5, error=0.25, images_per_s=10.0, worst="block 2")


def plain_loop(config, data):
    """The same training in a few obvious lines, unwatched: the model and the losses."""
    model = build_model(config.variant, config.depth, width=config.width, seed=config.seed)
    model = model.to(memory_format=torch.channels_last)
    batches = Augmenter(data, config.batch_size, config.seed, config.augment, channels_last=True)
    optimizer = SGD(
        model.parameters(), config.lr, momentum=config.momentum, nesterov=True, weight_decay=1e-4
    )
    losses = []
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(config, step)
        images, labels = batches.batch(step)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


# -- learning and recording ---------------------------------------------------------------------


def test_the_loss_falls(tmp_path):
    changes = {"steps": 45, "lr": 0.1, "commit_every": 45, "width": 0.5, "augment": False}
    _, status, run = train(tmp_path, **changes)
    loss = run.curve()["loss"]
    assert status == "done"
    assert loss[-5:].mean() < 0.6 * loss[:5].mean()


@pytest.mark.parametrize("variant", ["original", "elu_after", "plain"])
def test_a_watched_run_has_the_bits_of_a_plain_unwatched_loop(tmp_path, variant):
    training, _, run = train(tmp_path, variant=variant)
    model, losses = plain_loop(tiny_config(variant=variant), tiny_data())
    assert run.curve()["loss"].tolist() == losses
    assert weights(training.model) == weights(model)


def test_the_schedule_of_recording_and_of_commits_changes_no_bit(tmp_path):
    schedules = [(0, 4, 5), (12, 1, 1), (0, 0, 12), (1, 50, 7)]
    ends = []
    for first, every, commit in schedules:
        training, _, run = train(
            tmp_path, record_first=first, every=every, commit_every=commit, eval_every=commit
        )
        ends.append((weights(training.model), run.curve()["loss"].tolist()))
    assert all(end == ends[0] for end in ends)


def test_the_curve_has_one_row_per_step(tmp_path):
    config = {"steps": 10, "batch_size": 40, "milestones": (4,), "warmup": 2, "eval_every": 3}
    _, _, run = train(tmp_path, **config)
    curve, spe = run.curve(), 3  # 96 images: 40 + 40 + 16
    assert curve["step"].tolist() == list(range(10))
    np.testing.assert_allclose(curve["epoch"], (np.arange(10) + 1) / spe, rtol=1e-6)
    rates = [learning_rate(tiny_config(**config), step) for step in range(10)]
    np.testing.assert_allclose(curve["lr"], rates, rtol=1e-6)
    evaluated = curve["test_error"].notna()
    assert evaluated[evaluated].index.tolist() == [2, 5, 8, 9]
    assert curve["train_loss"].notna().equals(evaluated)
    sizes = np.tile([40, 40, 16], 4)[:10]
    for end in (2, 5, 8):
        epoch = slice(end - 2, end + 1)
        for column in ("error", "loss"):
            mean = np.average(curve[column][epoch], weights=sizes[epoch])
            assert curve[f"train_{column}"][end] == pytest.approx(mean, rel=1e-6)
    # the last step begins an epoch: that epoch's mean, not that of the run
    assert curve["train_error"][9] == pytest.approx(curve["error"][9])
    assert curve["train_loss"][9] == pytest.approx(curve["loss"][9])


def test_training_error_without_evaluations_is_of_the_last_epoch_only(tmp_path):
    _, _, run = train(tmp_path, steps=9, commit_every=2)
    curve = run.curve()
    assert curve["train_error"].notna().sum() == 1
    assert curve["train_error"][8] == pytest.approx(curve["error"][6:].mean(), rel=1e-6)


def test_the_test_error_is_that_of_the_final_weights(tmp_path):
    training, _, run = train(tmp_path)
    model, data = training.model.eval(), tiny_data()
    mean, std = (m.view(1, 3, 1, 1) * 255 for m in (data.mean, data.std))
    with torch.no_grad():
        logits = model((data.test_images.float() - mean) / std)
    wrong = (logits.argmax(1) != data.test_labels).double().mean().item()
    last = run.curve().iloc[-1]
    assert last["test_error"] == pytest.approx(wrong, abs=1e-6)
    expected = F.cross_entropy(logits, data.test_labels).item()
    assert last["test_loss"] == pytest.approx(expected, rel=1e-4)
    assert run.curve()["test_error"].notna().sum() == 1


@pytest.mark.parametrize(
    ("first", "every", "expected"),
    [(3, 4, [0, 1, 2, 4, 8]), (0, 5, [0, 5, 10]), (0, 0, [0]), (2, 0, [0, 1]), (12, 1, range(12))],
)
def test_steps_are_recorded_by_the_schedule(tmp_path, first, every, expected):
    _, _, run = train(tmp_path, record_first=first, every=every)
    metrics = run.metrics()
    assert sorted(set(metrics["step"])) == list(expected)
    assert (metrics.groupby("step")["block"].apply(list).map(tuple) == (0, 1, 2)).all()
    curve = run.curve()
    assert curve[curve["grad_norm"].notna()]["step"].tolist() == list(expected)


def test_options_of_the_model_reach_it(tmp_path):
    training, _, _ = train(tmp_path, variant="elu_pre", stem_bn=True, width=0.5, steps=2)
    assert any(isinstance(module, nn.BatchNorm2d) for module in training.model.stem)
    assert training.model.classifier.in_features == 32
    training, _, _ = train(tmp_path, variant="elu_pre", steps=2)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in training.model.modules())
    assert training.model.classifier.in_features == 16


def test_bfloat16_trains_float32_weights(tmp_path):
    half, status, run = train(tmp_path, dtype="bfloat16", steps=4)
    full, _, other = train(tmp_path, steps=4)
    assert status == "done"
    assert np.isfinite(run.curve()["loss"]).all()
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert weights(half.model) != weights(full.model)
    np.testing.assert_allclose(run.curve()["loss"], other.curve()["loss"], rtol=0.1)
    assert run.metrics()["output_mean"].notna().all()


# -- explosions ---------------------------------------------------------------------------------

BANG = {"variant": "elu_nobn", "steps": 40, "gamma": 1e8, "milestones": (6,), "lr": 0.01}


@pytest.mark.parametrize("first", [0, 1, 3])
def test_an_explosion_is_recorded_whatever_the_schedule(tmp_path, first):
    training, status, run = train(tmp_path, **BANG, record_first=first, every=50)
    curve, metrics = run.curve(), run.metrics()
    exploded = int(curve["step"][~np.isfinite(curve["loss"])].min())
    assert status == run.status == "diverged"
    assert exploded == 7
    assert run.steps == len(curve) == exploded + 1 + tiny_config().stop_after_explosion
    recorded = sorted(set(metrics["step"]))
    assert recorded == sorted({*range(max(1, first)), exploded})
    broken = metrics[metrics["step"] == exploded]
    assert broken["block"].tolist() == [0, 1, 2]
    assert (broken["output_nonfinite"] > 0).any()
    assert np.isfinite(metrics[metrics["step"] < exploded]["output_mean"]).all()
    assert not np.isfinite(curve["grad_norm"][exploded])
    assert curve["test_error"].isna().all()
    assert training.monitor.warnings == []


def test_recording_the_explosion_again_changes_no_bit(tmp_path):
    once, _, run = train(tmp_path, **BANG, record_first=40, every=1)
    again, _, other = train(tmp_path, **BANG, record_first=0, every=50)
    assert run.steps == other.steps
    losses = [frame.curve()["loss"].to_numpy() for frame in (run, other)]
    np.testing.assert_array_equal(*losses)
    assert weights(once.model) == weights(again.model)
    both = [frame.metrics().query("step == 7").reset_index(drop=True) for frame in (run, other)]
    np.testing.assert_array_equal(both[0]["output_nonfinite"], both[1]["output_nonfinite"])
    np.testing.assert_array_equal(both[0]["branch_mean"], both[1]["branch_mean"])


def before_batches(call):
    """Have `call(step)` called before each training batch is made."""
    batch = Augmenter.batch

    def told(self, step):
        call(step)
        return batch(self, step)

    return mock.patch.object(Augmenter, "batch", told)


def test_an_exploding_batch_counts_once_in_the_running_statistics(tmp_path, monkeypatch):
    """An infinite loss over finite activations: BatchNorm must not see the batch twice."""

    def unbounded(logits, labels, **options):
        loss = cross_entropy(logits, labels, **options)
        return loss * float("inf") if counter["steps"] == 3 else loss

    cross_entropy, ends, counter = F.cross_entropy, [], {"steps": 0}
    for first in (0, 12):
        training, writer = open_training(tmp_path, record_first=first, every=50, variant="elu")
        monkeypatch.setattr(F, "cross_entropy", unbounded)
        with writer, before_batches(lambda step: counter.update(steps=step)):
            assert training.run(Silent(), Interrupt()) == "diverged"
        state = training.model.state_dict()
        ends.append({k: v for k, v in weights(training.model).items() if "running" in k})
        assert {int(v) for k, v in state.items() if "batches_tracked" in k} == {3 + 1 + 3}
    assert ends[0] == ends[1]


@pytest.mark.parametrize("variant", ["elu_nobn", "elu_pre", "relu_nobn"])
def test_an_absurd_learning_rate_ends_the_run_at_once(tmp_path, variant):
    _, status, run = train(tmp_path, variant=variant, lr=1e6, steps=100)
    assert status == "diverged"
    assert run.steps <= 10


def test_an_explosion_near_the_end_is_still_diverged(tmp_path):
    _, status, run = train(tmp_path, **{**BANG, "steps": 8})
    assert (status, run.steps) == ("diverged", 8)


def test_a_diverged_run_is_final(tmp_path):
    _, _, before = train(tmp_path, **BANG)
    training, writer = open_training(tmp_path, **BANG)
    with writer:
        assert training.run(Silent(), Interrupt()) == "diverged"
    assert writer.committed_step == before.steps


# -- stopping and continuing --------------------------------------------------------------------


def signal_at(step, *numbers):
    """Send signals to this process while the batch of `step` is made."""

    def send(at):
        if at == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    return before_batches(send)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [0, 4, 6])
def test_a_signal_stops_at_the_steps_end_with_a_commit_and_nothing_is_lost(tmp_path, number, step):
    _, _, straight = train(tmp_path / "straight")
    training, writer = open_training(tmp_path / "stopped")
    with writer, Interrupt() as interrupt, signal_at(step, number):
        assert training.run(Silent(), interrupt) == "stopped"
    assert interrupt.signal == number
    assert (writer.status, writer.committed_step) == ("stopped", step + 1)
    _, status, run = train(tmp_path / "stopped")
    assert status == "done"
    assert digest(run.path) == digest(straight.path)


def test_a_signal_in_the_last_step_does_not_undo_the_end(tmp_path):
    training, writer = open_training(tmp_path)
    with writer, Interrupt() as interrupt, signal_at(11, signal.SIGTERM):
        assert training.run(Silent(), interrupt) == "done"


def test_an_explosion_after_a_stop_ends_at_the_same_step(tmp_path):
    _, _, straight = train(tmp_path / "straight", **BANG)
    for step in (6, 7, 8):
        root = tmp_path / f"at{step}"
        training, writer = open_training(root, **BANG)
        with writer, Interrupt() as interrupt, signal_at(step, signal.SIGTERM):
            training.run(Silent(), interrupt)
        _, status, run = train(root, **BANG)
        assert status == "diverged"
        assert digest(run.path) == digest(straight.path)


@pytest.fixture
def ctrl_c():
    """Python's own handler: a job in a shell's background ignores SIGINT from the start."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.usefixtures("ctrl_c")
def test_handlers_stay_after_a_signal_and_the_second_one_reaches_the_handler_of_before():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interrupt() as interrupt:
        installed = [signal.getsignal(number) for number in SIGNALS]
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.signal == signal.SIGTERM
        assert [signal.getsignal(number) for number in SIGNALS] == installed
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.signal == signal.SIGTERM
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(("handler", "code"), [(signal.SIG_DFL, 75), (signal.SIG_IGN, 0)])
def test_a_second_sigterm_ends_the_process_unless_it_was_ignored_before(handler, code):
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, handler)
        with Interrupt():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), Interrupt():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_thread_installs_no_handler():
    before, seen = signal.getsignal(signal.SIGINT), []

    def enter():
        with Interrupt() as interrupt:
            seen.append((signal.getsignal(signal.SIGINT), interrupt.signal))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(before, 0)]


def test_a_commit_that_is_refused_ends_the_training_and_unhooks_the_model(tmp_path, monkeypatch):
    training, writer = open_training(tmp_path)

    def refuse(*_):
        raise BusyError("taken over")

    monkeypatch.setattr(RunWriter, "commit", refuse)
    with writer, pytest.raises(BusyError):
        training.run(Silent(), Interrupt())
    hooks = [m for m in training.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


# -- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_checkpoint_brings_back_every_bit_and_the_memory_format(tmp_path, momentum):
    def make():
        model = build_model("original", 8, width=0.5, seed=1)
        model = model.to(memory_format=torch.channels_last)
        return model, SGD(model.parameters(), 0.1, momentum=momentum, nesterov=momentum > 0)

    def step(model, optimizer, seed):
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        images = images.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()

    model, optimizer = make()
    for seed in range(3):
        step(model, optimizer, seed)
    data = packed.pack(checkpoint.pack(model, optimizer))
    other, later = make()
    checkpoint.unpack(other, later, packed.unpack(data, tmp_path))
    assert packed.pack(checkpoint.pack(other, later)) == data
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    for mine, theirs in pairs:
        assert mine.stride() == theirs.stride()
        states = [
            o.state[p].get("momentum_buffer") for o, p in ((optimizer, mine), (later, theirs))
        ]
        if momentum:
            assert states[0].stride() == states[1].stride()
            assert torch.equal(*states)
            assert states[1].data_ptr() != theirs.data_ptr()
    step(model, optimizer, 9)
    step(other, later, 9)
    assert weights(model) == weights(other)


def test_a_checkpoint_before_the_first_step_has_no_momenta():
    model = build_model("elu", 8, width=0.25)
    tensors = checkpoint.pack(model, SGD(model.parameters(), 0.1, momentum=0.9))
    assert all(name.startswith("model.") for name in tensors)
    assert len(tensors) == len(model.state_dict())


def test_a_checkpoint_of_another_model_is_refused():
    small, large = build_model("elu", 8, width=0.25), build_model("elu", 8, width=0.5)
    tensors = checkpoint.pack(small, SGD(small.parameters(), 0.1))
    with pytest.raises(RuntimeError, match="size mismatch"):
        checkpoint.unpack(large, SGD(large.parameters(), 0.1), tensors)


# -- the curve while it grows -------------------------------------------------------------------


def test_rows_come_out_in_the_order_of_steps_and_once():
    curve = Curve()
    curve.add(1, loss=2.0)
    curve.merge({"step": np.array([0, 1]), "grad_norm": np.array([3.0, 4.0])})
    curve.add(0, loss=1.0)
    curve.add(1, test_error=0.5)
    taken = curve.take()
    assert tuple(taken) == COLUMNS
    assert taken["step"].tolist() == [0, 1]
    assert taken["step"].dtype == np.int32
    assert taken["loss"].tolist() == [1.0, 2.0]
    assert taken["grad_norm"].tolist() == [3.0, 4.0]
    np.testing.assert_array_equal(taken["test_error"], [np.nan, 0.5])
    assert len(curve.take()["step"]) == 0


def test_a_monitor_does_not_overwrite_the_loops_own_columns():
    curve = Curve()
    curve.add(0, lr=0.1)
    curve.merge({"step": np.array([0]), "lr": np.array([7.0]), "loss": np.array([7.0])})
    taken = curve.take()
    assert taken["lr"].tolist() == [0.1]
    assert np.isnan(taken["loss"]).all()


# -- what a person sees -------------------------------------------------------------------------


def test_the_standing_names_loss_error_speed_and_the_worst_block():
    assert str(STANDING) == "loss 1.5  error 25%  10 images/s  block 2"


def test_lines_come_every_ten_seconds_and_at_the_end(capsys, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(display.time, "monotonic", lambda: clock.now)
    lines = Lines("elu d8", 5)
    for clock.now, done in ((1.0, 1), (11.0, 2), (12.0, 3), (13.0, 5)):
        lines.show(Progress(done=done, loss=1, error=0, images_per_s=1, worst=""))
    lines.close()
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.split("  ")[1] for line in said.err.splitlines()] == ["step 2/5", "step 5/5"]


def test_the_display_fits_the_place(capsys, monkeypatch):
    assert isinstance(open_display("t", 5, 0, quiet=True), Silent)
    assert isinstance(open_display("t", 5, 0, quiet=False), Lines)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bar = open_display("t", 5, 2, quiet=False)
    assert isinstance(bar, Bar)
    bar.show(STANDING)
    bar.close()
    assert capsys.readouterr().out == ""


def test_the_worst_block_is_the_one_whose_gradient_changed_most():
    block = MostChangedBlock()
    rows = {
        "step": np.array([4, 4, 4, 5, 5, 5]),
        "grad_output": np.array([1, 1, 1, 2, 0.01, 3], np.float32),
        "output_nonfinite": np.zeros(6),
    }
    block.update(rows)
    assert block.words == "block 1: gradient x0.01 since step 4"
    rows["output_nonfinite"][5] = 1
    block.update(rows)
    assert block.words == "block 2 is not finite"


def test_the_inventory_finds_what_is_on_the_disk(tmp_path):
    states = {name: state for name, state, _ in list_sets(tmp_path)}
    assert states["digits"] == "built in"
    assert states["cifar10"] == "missing"
    (tmp_path / "cifar-10-batches-bin").mkdir()
    rows = {name: (state, place) for name, state, place in list_sets(tmp_path)}
    assert rows["cifar10"] == ("on disk", str(tmp_path / "cifar-10-batches-bin"))


# -- the cell -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_through_the_cell(tmp_path, variant):
    said = []
    outcome = run_tiny_cell(tmp_path, said.append, variant=variant)
    run = outcome.run
    assert run.status in ("done", "diverged")
    assert (run.steps, outcome.resumed_at, outcome.signal) == (3, 0, 0)
    assert outcome.notes == ()
    assert len(run.metrics()) == 3 * 3
    kinds = [block["shortcut"] == "none" for block in run.blocks]
    assert kinds == [variant == "plain"] * 3
    assert run.verdict.to_dict() == outcome.verdict.to_dict()
    assert said[0].startswith("data: digits")
    assert len(said) == 2


def test_the_same_cell_again_computes_nothing(tmp_path, monkeypatch):
    first = run_tiny_cell(tmp_path)

    def never(*_):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(Augmenter, "batch", never)
    said = []
    second = run_tiny_cell(tmp_path, said.append)
    assert second.resumed_at == first.run.steps == 3
    assert "done already" in said[1]
    assert second.verdict == first.verdict


def test_a_run_that_was_killed_before_its_verdict_gets_one(tmp_path):
    first = run_tiny_cell(tmp_path)
    described, data = first.run.environment, first.run.data
    with RunWriter.open(tmp_path, first.run.config, environment=described, data=data) as writer:
        writer.finish("done", None)
    assert run_tiny_cell(tmp_path).run.verdict == first.run.verdict
