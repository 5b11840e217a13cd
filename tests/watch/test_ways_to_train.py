"""Checkpointing, precisions, threads, two monitors, mistakes of ours, and the core set."""

import copy
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from watching import (
    batch,
    sgd,
    small,
    train,
    units_of,
    watch_once,
)

from resdiag.catalog.table import CORE, RECORDED
from resdiag.models.resnet import build_model
from resdiag.watch.base.safety import WatchWarning
from resdiag.watch.loop.attach import attach

# -- other ways to train ---------------------------------------------------------------------------


class Checkpointed(torch.nn.Module):
    """The stages of a network, recomputed in the backward pass."""

    def __init__(self, variant, reentrant):
        super().__init__()
        self.net, self.reentrant = small(variant), reentrant

    def forward(self, x):
        x = self.net.stem(x)
        for stage in self.net.stages:
            x = checkpoint(stage, x, use_reentrant=self.reentrant)
        return self.net.classifier(self.net.pool(self.net.head(x)).flatten(1))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("variant", ["original", "elu_after", "elu"])
def test_activation_checkpointing_gives_the_numbers_of_the_plain_pass(variant, reentrant):
    plain, recomputed = small(variant), Checkpointed(variant, reentrant)
    frames = []
    for model in (plain, recomputed):
        with attach(model) as monitor:
            train(model, 2, monitor=monitor)
        frames.append(monitor.to_frame().drop(columns=["point", "step", "block"]))
    # the plain pass reads a BatchNorm's moments off the layer; under checkpointing it must not
    np.testing.assert_allclose(*frames, rtol=2e-5, atol=1e-6)


def test_two_monitors_on_one_model_see_the_same():
    model = small("elu_after")
    with attach(model) as first, attach(model) as second:
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        first.step()
        second.step()
    assert torch._C._len_torch_function_stack() == 0
    one, two = (m.to_frame().drop(columns="point") for m in (first, second))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_recorded_in_full(dtype):
    model = small("elu_after").to(dtype)
    images, labels = batch()
    optimizer = sgd(model)
    with attach(model, optimizer=optimizer) as monitor:
        train(
            model, 1, monitor=monitor, optimizer=optimizer, images=images.to(dtype), labels=labels
        )
    assert not monitor.unavailable
    assert not monitor.to_frame().isna().any(axis=None)


def test_autocast_is_watched_as_it_runs():
    model = small("elu_after")
    with attach(model) as monitor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(batch()[0]), batch()[1])
        loss.backward()
        monitor.step()
    frame = monitor.to_frame()
    exact = watch_once(small("elu_after"))
    columns = ["branch_channel_std", "output_channel_std", "grad_output", "skip_gain"]
    np.testing.assert_allclose(frame[columns], exact[columns], rtol=0.05)


def test_a_model_that_runs_in_another_thread_is_not_mixed_into_the_pass():
    model = small("elu")
    alone = watch_once(small("elu")).drop(columns="point")

    def elsewhere(*_):
        thread = threading.Thread(target=model.stages[0], args=(torch.randn(2, 4, 8, 8),))
        thread.start()
        thread.join()

    model.stages[1].register_forward_pre_hook(elsewhere)
    np.testing.assert_array_equal(watch_once(model).drop(columns="point"), alone)


def test_a_slot_used_again_keeps_nothing_of_the_step_before():
    model = small("no_relu")
    with attach(model) as monitor:
        train(model, 16, monitor=monitor)
        model(batch()[0])
        with pytest.warns(WatchWarning, match="no backward pass"):
            monitor.step()
    frame = monitor.to_frame()
    assert frame[frame.step < 16].grad_output.notna().all()
    assert frame[frame.step == 16][["grad_output", "grad_input", "grad_sum"]].isna().all(axis=None)


@pytest.mark.parametrize("where", ["moments.reduce", "moments.combine", "reductions.gradient"])
def test_an_error_of_ours_ends_the_watching_and_not_the_training(monkeypatch, where):
    def broken(*_):
        raise ZeroDivisionError("planted")

    model, images = build_model("elu_after", 8, width=0.5, seed=0), torch.randn(4, 3, 16, 16)
    twin = copy.deepcopy(model)
    with attach(model) as monitor:
        for step in range(3):
            if step == 1:
                monkeypatch.setattr(f"resdiag.watch.measure.{where}", broken)
            for net in (model, twin):
                net.zero_grad()
                net(images).square().sum().backward()
            if step == 1:
                with pytest.warns(
                    WatchWarning, match="stopped at step 1 .*ZeroDivisionError: plan"
                ):
                    monitor.step()
            else:
                monitor.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    frame = monitor.to_frame()
    assert frame[frame.step == 0].output_mean.notna().all()
    assert set(frame.step) == {0, 1}


# -- the core set ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["original", "elu", "elu_after", "elu_nobn", "plain"])
def test_the_core_set_is_the_full_one_where_it_records(variant):
    frames, missing = [], []
    for metrics_set in ("full", "core"):
        model = small(variant)
        optimizer = sgd(model)
        units = units_of(variant, model)
        with attach(model, optimizer=optimizer, blocks=units, metrics=metrics_set) as monitor:
            train(model, 2, monitor=monitor, optimizer=optimizer)
        frames.append(monitor.to_frame())
        missing.append({entry["metric"] for entry in monitor.unavailable})
    full, core = frames
    for name in CORE:
        # a sum is read in the one, put together from F and h in the other
        np.testing.assert_allclose(core[name], full[name], rtol=1e-5, atol=1e-6, err_msg=name)
    others = set(RECORDED) - set(CORE)
    assert core[list(others)].isna().all(axis=None)
    assert others <= missing[1]
    assert full["perturbation"].notna().any() or variant == "plain"


def test_an_unknown_set_of_metrics_is_refused():
    with pytest.raises(ValueError, match="unknown set of metrics 'most'"):
        attach(small(), metrics="most")
