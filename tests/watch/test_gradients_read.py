"""Gradients that a loop clips or scales are recorded where it says, or as it is seen to."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loops import (
    clipping,
    g1,
    g2,
    moved,
    per_step,
    run,
    scaled,
    total,
    walk,
    with_optimizer,
)
from small_nets import Net, at, close, data, sgd
from torch import nn

from resdiag.watch.base.safety import WatchWarning
from resdiag.watch.loop.attach import attach

# -- clipping --------------------------------------------------------------------------------------


def clipped_twin(limit):
    twin, (x, y) = Net(), data(seed=0)
    F.cross_entropy(twin(x), y).backward()
    before = g1(twin), total(twin)
    nn.utils.clip_grad_norm_(twin.parameters(), limit)
    return before, (g1(twin), total(twin))


def test_both_sides_of_a_clipping_are_recorded():
    monitor = run(clipping)
    (blocks, norms), (clipped_blocks, clipped_norm) = clipped_twin(0.01)
    assert monitor.point == "pre_clip"
    assert at(monitor, "grad_param") == close(blocks)
    assert at(monitor, "grad_param_post_clip") == close(clipped_blocks)
    assert per_step(monitor, "grad_norm")[0] == close(norms)
    assert per_step(monitor, "grad_norm_post_clip")[0] == close(clipped_norm) == close(0.01)


@pytest.mark.parametrize("point", [None, "local", "pre_clip"])
def test_a_clipping_that_nobody_announced_is_seen_and_the_point_corrected(point):
    with pytest.warns(WatchWarning, match=r"call monitor\.read_gradients\('pre_clip'\) before it"):
        monitor = clipping(Net(), attach, read=False, grad_read_point=point)
    assert monitor.point == "post_clip"
    assert at(monitor, "grad_param") == close(clipped_twin(0.01)[1][0])
    assert set(monitor.to_frame().point) == {"post_clip"}


def test_a_clipping_that_was_announced_is_silent():
    monitor = run(clipping, read=False, grad_read_point="post_clip")
    assert at(monitor, "grad_param") == close(clipped_twin(0.01)[1][0])


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_value_, None])
def test_other_ways_to_rewrite_a_gradient_are_seen(clip):
    model, (x, y) = Net(), data()
    optimizer = sgd(model)
    with attach(model) as monitor:
        F.cross_entropy(model(x), y).backward()
        if clip is None:
            for p in model.parameters():
                p.grad = p.grad / 3
        else:
            clip(model.parameters(), 1e-3)
        with pytest.warns(WatchWarning, match="rewrote the gradients"):
            optimizer.step()
        monitor.step()
    assert at(monitor, "grad_param") == close(g1(model))


def test_a_point_that_is_not_there_is_refused_with_the_nearest():
    with attach(Net()) as monitor, pytest.raises(ValueError, match="did you mean 'pre_clip'"):
        monitor.read_gradients("preclip")


# -- loss scaling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaled_loss_is_recorded_without_its_scale(fused):
    monitor, twin = run(scaled, fused=fused), Net()
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-2) if fused else sgd(twin)
    for step in range(3):
        x, y = data(seed=step)
        before = copy.deepcopy(twin)
        optimizer.zero_grad()
        sums, logits = walk(twin, x)
        logits.retain_grad()
        F.cross_entropy(logits, y).backward()
        optimizer.step()
        near = partial(pytest.approx, rel=1e-3)
        assert at(monitor, "grad_output", step) == near(g2(sums))
        assert at(monitor, "grad_param", step) == near(g1(twin))
        assert at(monitor, "update_ratio", step) == near(moved(twin, before))
        assert per_step(monitor, "grad_norm")[step] == near(total(twin))
        assert monitor.to_frame().shortcut_share.between(-1, 2).all()
    assert per_step(monitor, "grad_scale") == [2.0**10, 2.0**11, 2.0**12]
    assert per_step(monitor, "skipped") == [0, 0, 0]
    assert monitor.point == "unscaled"


def test_the_head_kick_of_a_scaled_loss_is_that_of_the_loss():
    assert per_step(run(scaled), "head_kick")[0] == close(
        per_step(run(with_optimizer), "head_kick")[0]
    )


def test_a_scaled_loss_clipped_has_both_points():
    monitor = run(scaled, clip=0.01)
    (blocks, _), (clipped_blocks, _) = clipped_twin(0.01)
    assert at(monitor, "grad_param") == close(blocks)
    assert at(monitor, "grad_param_post_clip") == close(clipped_blocks)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skipped_is_recorded_as_such(fused):
    monitor = run(scaled, fused=fused, broken=(1,))
    assert per_step(monitor, "skipped") == [0, 1, 0]
    assert not np.isfinite(per_step(monitor, "grad_norm")[1])
    assert not np.isfinite(at(monitor, "grad_param", 1)).any()
    assert at(monitor, "grad_nonfinite", 1) == [1, 1]
    assert at(monitor, "update_ratio", 1) == [0, 0]
    assert per_step(monitor, "grad_scale") == [2.0**10, 2.0**11, 2.0**10]
    assert np.isfinite(at(monitor, "grad_param", 2)).all()
    assert min(at(monitor, "update_ratio", 2)) > 0


def test_a_loss_that_is_not_a_number_is_recorded():
    model, (x, y) = Net(), data()
    optimizer = sgd(model)
    with attach(model, optimizer=optimizer) as monitor:
        (F.cross_entropy(model(x), y) * float("nan")).backward()
        optimizer.step()
        monitor.step()
    assert at(monitor, "grad_nonfinite") == [1, 1]
    assert np.isnan(per_step(monitor, "grad_norm")).all()
    assert not monitor.warnings


def test_half_precision_without_a_scaler_is_reported():
    model, (x, y) = Net(), data()
    with attach(model) as monitor:
        with (
            torch.autocast("cpu", dtype=torch.float16),
            pytest.warns(WatchWarning, match=r"float16 without scaler=.*scaler=scaler"),
        ):
            logits = model(x)
        F.cross_entropy(logits.float(), y).backward()
        monitor.step()


def test_a_scaler_that_is_off_changes_nothing_and_another_thing_is_refused():
    model, (x, y) = Net(), data()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with attach(model, scaler=scaler) as monitor:
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        monitor.step()
    assert at(monitor, "grad_param") == close(g1(model))
    assert monitor.point == "local"
    with pytest.raises(TypeError, match=r"must be a torch\.amp\.GradScaler, not SGD"):
        attach(model, scaler=sgd(model))
    with pytest.raises(TypeError, match="not an optimizer: GradScaler"):
        attach(model, optimizer=scaler)
