"""What any training loop may do, recorded as the loop does it, or reported."""

import copy
import gc
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loops import (
    LOOPS,
    Unwatched,
    accumulating,
    g1,
    g2,
    moved,
    per_step,
    plain,
    run,
    total,
    walk,
    with_optimizer,
)
from small_nets import Net, at, close, data, sgd
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from resdiag.watch.base.safety import WatchWarning
from resdiag.watch.loop.attach import attach


@pytest.mark.filterwarnings("ignore::resdiag.watch.base.safety.WatchWarning")
@pytest.mark.parametrize("name", LOOPS)
def test_a_watched_loop_ends_in_the_same_bits_and_leaves_no_hook(name):
    gc.collect()
    models, states = [Net(), Net()], []
    # monitors that other tests left open may have theirs
    before = set(_global_optimizer_pre_hooks) | set(_global_optimizer_post_hooks)
    for model, watch in zip(
        models, (lambda *_, **__: nullcontext(Unwatched()), attach), strict=True
    ):
        monitor = LOOPS[name](model, watch)
        states.append(torch.get_rng_state())
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert torch.equal(*states)
    assert len(monitor.to_frame()) >= 4
    healthy = monitor.to_frame().query("step != 1") if "broken" in name else monitor.to_frame()
    assert healthy[["grad_output", "grad_param"]].notna().all(axis=None)
    assert not (set(_global_optimizer_pre_hooks) | set(_global_optimizer_post_hooks)) - before
    for p in models[1].parameters():
        assert not getattr(p, "_post_accumulate_grad_hooks", None)


@pytest.mark.parametrize(
    "loop", [plain, with_optimizer, partial(with_optimizer, set_to_none=False)]
)
def test_a_plain_loop_records_what_the_optimizer_gets_whenever_gradients_are_cleared(loop):
    monitor, twin = run(loop), Net()
    optimizer = sgd(twin)
    for step in range(3):
        x, y = data(seed=step)
        before = copy.deepcopy(twin)
        optimizer.zero_grad()
        sums, logits = walk(twin, x)
        F.cross_entropy(logits, y).backward()
        optimizer.step()
        assert at(monitor, "grad_param", step) == close(g1(twin))
        assert at(monitor, "grad_output", step) == close(g2(sums))
        assert at(monitor, "output_mean", step) == close([u.mean().item() for u in sums])
        assert per_step(monitor, "grad_norm")[step] == close(total(twin))
        if loop is not plain:
            assert at(monitor, "update_ratio", step) == close(moved(twin, before))
    assert per_step(monitor, "lr") == [0.1] * 3
    assert monitor.point == "local"
    assert [e["metric"] for e in monitor.unavailable] == ["update_ratio"] * (loop is plain)


def test_parameters_changed_by_hand_have_their_gradients_read_at_step():
    model, (x, y) = Net(), data()
    with attach(model) as monitor:
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        monitor.step()
    assert not monitor.warnings
    assert at(monitor, "grad_param") == close(g1(model))
    reasons = {e["metric"]: e["reason"] for e in monitor.unavailable}
    assert reasons["lr"] == "no optimizer was seen to step in a recorded step"


def test_gradients_that_are_gone_before_anyone_reads_them_are_reported():
    model, (x, y) = Net(), data()
    with attach(model) as monitor:
        F.cross_entropy(model(x), y).backward()
        model.zero_grad()
        with pytest.warns(WatchWarning, match=r"no gradient was left.*zero_grad\(\) called before"):
            monitor.step()
    assert np.isnan(at(monitor, "grad_param")).all()
    assert "no parameter of it has a gradient" in {e["reason"] for e in monitor.unavailable}


# -- step() in the wrong place ---------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 5])
def test_a_forgotten_step_is_reported(every):
    model = Net()
    optimizer = sgd(model)
    with attach(model, every=every):
        for step in range(2):
            x, y = data(seed=step)
            F.cross_entropy(model(x), y).backward()
            with (
                pytest.warns(WatchWarning, match=r"without monitor\.step")
                if step
                else nullcontext()
            ):
                optimizer.step()


@pytest.mark.parametrize("every", [1, 5])
def test_a_step_called_twice_is_reported(every):
    model = Net()
    with attach(model, every=every) as monitor:
        x, y = data()
        F.cross_entropy(model(x), y).backward()
        monitor.step()
        with pytest.warns(WatchWarning, match="steps are counted twice"):
            monitor.step()
    assert len(monitor.warnings) == 1


@pytest.mark.parametrize("parts", [1, 3])
def test_a_step_before_the_optimizers_or_in_every_micro_batch_is_reported(parts):
    model = Net()
    optimizer = sgd(model)
    with attach(model, optimizer=optimizer) as monitor:
        for part in range(parts):
            x, y = data(seed=part)
            F.cross_entropy(model(x), y).backward()
            with (
                nullcontext() if part else pytest.warns(WatchWarning, match="once per update, aft")
            ):
                monitor.step()
        optimizer.step()
    assert len(monitor.warnings) == 1


def test_evaluation_and_paused_passes_between_steps_are_ignored():
    model, twin = Net(), Net()
    optimizer, other = sgd(model), sgd(twin)
    with attach(model, optimizer=optimizer) as monitor:
        for step in range(2):
            x, y = data(seed=step)
            for net, opt in ((model, optimizer), (twin, other)):
                opt.zero_grad()
                F.cross_entropy(net(x), y).backward()
                opt.step()
            with monitor.paused():
                model(torch.full_like(x, 9.0))
            model.eval()
            model(torch.full_like(x, 9.0)).sum().backward()
            model.train()
            with torch.no_grad():
                model(x)
            monitor.step()
    assert not monitor.warnings
    assert len(monitor.to_frame()) == 4


# -- gradient accumulation -------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    "ignore:resdiag. the loop rewrote:resdiag.watch.base.safety.WatchWarning"
)
@pytest.mark.parametrize(("take", "part"), [("first", 0), ("last", 2)])
def test_accumulation_records_one_micro_batch_and_the_accumulated_parameters(take, part):
    with pytest.warns(WatchWarning, match=f"the {take} one is recorded"):
        monitor = accumulating(Net(), attach, take=take)
    twin, kept = Net(), None
    for k in range(3):
        x, y = data(seed=k)
        sums, logits = walk(twin, x)
        (F.cross_entropy(logits, y) / 3).backward()
        kept = sums if k == part else kept
    assert at(monitor, "output_mean") == close([u.mean().item() for u in kept])
    assert at(monitor, "grad_output") == close(g2(kept))
    assert at(monitor, "grad_param") == close(g1(twin))
    assert per_step(monitor, "grad_norm")[0] == close(total(twin))


def test_accumulation_without_clipping_is_not_taken_for_clipping():
    model = Net()
    optimizer = sgd(model)
    with attach(model) as monitor:
        for part in range(3):
            x, y = data(seed=part)
            with pytest.warns(WatchWarning) if part == 1 else nullcontext():
                loss = F.cross_entropy(model(x), y)
            loss.backward()
        optimizer.step()
        monitor.step()
    assert monitor.point == "local"
    assert len(monitor.warnings) == 1


def test_a_pass_to_take_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown forward_pass 'frist'; did you mean 'first'"):
        attach(Net(), forward_pass="frist")
