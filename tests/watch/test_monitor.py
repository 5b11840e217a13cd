"""The monitor against twins written out by hand, and its loop."""

import functools
import warnings

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from watching import (
    assert_reasons_are_complete,
    batch,
    raising,
    sgd,
    small,
    train,
    units_of,
    watch_once,
)

from resdiag.catalog.table import RECORDED
from resdiag.models.resnet import build_model
from resdiag.models.variants import VARIANTS
from resdiag.watch.base.safety import WatchWarning
from resdiag.watch.loop.attach import attach


@functools.cache
def watch_and_walk(variant, depth, steps=2, samples=8):
    """Watch some steps, and walk through the same steps of a twin by hand; nothing changes both."""
    batches = [batch()] * steps
    model = build_model(variant, depth, width=0.5, seed=3)
    optimizer, units = sgd(model, lr=1e-3), units_of(variant, model)
    with attach(model, optimizer=optimizer, blocks=units, samples=samples) as monitor:
        for images, labels in batches:
            train(model, 1, monitor=monitor, optimizer=optimizer, images=images, labels=labels)
    twin = build_model(variant, depth, width=0.5, seed=3)
    after = VARIANTS[variant].after_add
    walked = reference.walk_training(twin, sgd(twin, lr=1e-3), batches, after, samples)
    return monitor, list(walked)


@pytest.mark.parametrize("depth", [8, 20])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_column_equals_the_twin_at_the_first_two_steps(variant, depth):
    monitor, expected = watch_and_walk(variant, depth)
    frame, curve = monitor.to_frame(), monitor.to_frame("step")
    for step, (blocks, per_step) in enumerate(expected):
        reference.assert_columns_agree(frame[frame.step == step], blocks)
        row = curve[curve.step == step].iloc[0]
        for name, value in per_step.items():
            near_zero = 1e-7 if name.endswith("_mean") else 0
            assert row[name] == pytest.approx(value, rel=1e-4, abs=near_zero), name
        assert row.grad_norm == pytest.approx(per_step["grad_norm"], rel=1e-5)
        assert row.lr_grad_norm == pytest.approx(1e-3 * per_step["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("variant", ["elu_nobn", "elu_pre", "elu", "no_relu", "relu_pre"])
def test_nothing_after_the_addition_leaves_the_skip_path_exactly_alone(variant):
    frame = watch_and_walk(variant, 20)[0].to_frame()
    assert (frame[["perturbation", "identity_defect", "identity_drift"]] == 0).all(axis=None)
    ones = ["skip_gain", "skip_gain_stage", "slope_mean", "slope_mean_sq", "attenuation"]
    assert (frame[ones] == 1).all(axis=None)


def test_relu_after_the_addition_is_exactly_an_identity_without_the_branch():
    frame = watch_and_walk("original", 20)[0].to_frame()
    assert (frame[["identity_defect", "identity_drift"]] == 0).all(axis=None)
    assert (frame.perturbation > 0).all()


def test_elu_after_the_addition_drifts_further_with_every_block_of_a_stage():
    frame = watch_and_walk("elu_after", 20)[0].to_frame().query("step == 0")
    first, second, third = (frame.identity_drift[i : i + 3].to_list() for i in (0, 3, 6))
    assert all(a < b < c for a, b, c in (first, second, third))
    assert (frame.identity_defect > 0).all()


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_column_that_is_nan_has_a_reason_and_no_other_has_one(variant):
    monitor, _ = watch_and_walk(variant, 8)
    assert_reasons_are_complete(monitor)
    assert bool(monitor.unavailable) == (variant == "plain"), (
        "a residual variant with an optimizer lacks nothing"
    )


@pytest.mark.parametrize("variant", ["elu_nobn", "elu_after", "original"])
def test_the_accelerator_path_gives_the_same_numbers(as_on_an_accelerator, variant):
    fast = watch_and_walk(variant, 8)[0].to_frame()
    as_on_an_accelerator()
    exact = watch_and_walk.__wrapped__(variant, 8)[0].to_frame()
    expected = {name: exact[name].to_numpy(np.float64) for name in RECORDED}
    reference.assert_columns_agree(fast, expected, rtol=2e-5)


def test_reasons_cover_a_frozen_block_a_frozen_stem_and_a_missing_optimizer():
    model = build_model("original", 8, width=0.5, seed=0)
    model.stem.requires_grad_(False)
    model.stages[0].requires_grad_(False)
    with attach(model) as monitor:
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        monitor.step()
    assert_reasons_are_complete(monitor)
    assert {"update_ratio", "grad_param", "grad_input", "shortcut_share"} <= {
        entry["metric"] for entry in monitor.unavailable
    }


# -- the loop -------------------------------------------------------------------------------------


def test_more_recorded_steps_than_the_buffer_holds_lose_nothing():
    model, expected = small("original"), []
    optimizer = sgd(model)
    with attach(model, optimizer=optimizer) as monitor:
        for _ in range(40):
            train(model, 1, monitor=monitor, optimizer=optimizer)
            expected.append(reference.root(reference.norm(p.grad) for p in model.parameters()))
    frame, curve = monitor.to_frame(), monitor.to_frame("step")
    assert frame.step.to_list() == [step for step in range(40) for _ in range(3)]
    assert frame.block.to_list() == [0, 1, 2] * 40
    assert np.allclose(curve.grad_norm, expected, rtol=1e-6)
    assert not frame[list(RECORDED)].isna().any(axis=None)
    assert (np.diff(frame[frame.block == 1].branch_channel_mean_rms) != 0).all()


def test_a_frame_asked_for_in_the_middle_of_a_step_has_the_steps_before_it():
    model = small("original")
    optimizer = sgd(model)
    whole, pieces = attach(model, optimizer=optimizer), []
    train(model, 5, monitor=whole, optimizer=optimizer)
    whole.close()
    model = small("original")
    optimizer = sgd(model)
    images, labels = batch()
    with attach(model, optimizer=optimizer) as monitor:
        for step in range(5):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            if step % 2:
                pieces.append(monitor.drain())
            loss.backward()
            optimizer.step()
            assert set(monitor.to_frame().step) <= set(range(step))
            monitor.step()
        pieces.append(monitor.drain())
    for which, frame in ((0, whole.to_frame()), (1, whole.to_frame("step"))):
        for name in pieces[0][which]:
            got = np.concatenate([piece[which][name] for piece in pieces])
            np.testing.assert_array_equal(got, frame[name], err_msg=name)


def test_a_schedule_records_the_first_steps_and_then_every_nth():
    model = small()
    with attach(model, every=4, record_first=2) as monitor:
        train(model, 10, monitor=monitor)
    assert sorted(set(monitor.to_frame().step)) == [0, 1, 4, 8]
    assert monitor.to_frame("step").step.to_list() == [0, 1, 4, 8]
    assert not monitor.warnings


def test_a_resumed_training_counts_on():
    model = small()
    with attach(model, every=3) as monitor:
        monitor.start_at(7)
        train(model, 6, monitor=monitor)
    assert sorted(set(monitor.to_frame().step)) == [9, 12]


def test_two_optimizer_less_backwards_accumulate_in_the_parameters_and_are_noted():
    model = small("no_relu")
    images, labels = batch()
    with attach(model) as monitor:
        logits = model(images)
        F.cross_entropy(logits, labels).backward(retain_graph=True)
        (2 * F.cross_entropy(logits, labels)).backward()
        with pytest.warns(WatchWarning, match="several backward passes"):
            monitor.step()
    frame = monitor.to_frame()
    twin = small("no_relu")
    F.cross_entropy(twin(images), labels).backward()
    single = watch_once(small("no_relu"))
    assert np.allclose(frame.grad_output, 2 * single.grad_output, rtol=1e-5), "of the last one"
    once = [
        reference.root(reference.norm(p.grad) for p in twin.get_submodule(name).parameters())
        for name in twin.unit_names
    ]
    assert np.allclose(frame.grad_param, 3 * np.array(once), rtol=1e-5)


def test_gradient_accumulation_records_the_first_micro_batch_and_the_accumulated_parameters():
    images, labels = batch(16)
    model, twin = small("no_relu"), small("no_relu")
    optimizer = sgd(model)
    with attach(model, optimizer=optimizer) as monitor:
        (F.cross_entropy(model(images[:8]), labels[:8]) / 2).backward()
        with pytest.warns(WatchWarning, match="several forward passes in one step"):
            second = model(images[8:])
        (F.cross_entropy(second, labels[8:]) / 2).backward()
        optimizer.step()
        monitor.step()
    units, _, logits = reference.walk_resnet(twin, images[:8], "none")
    (F.cross_entropy(logits, labels[:8]) / 2).backward()
    frame = monitor.to_frame()
    wanted = [8**0.5 * reference.norm(unit.output.grad) for unit in units]
    assert np.allclose(frame.grad_output, wanted, rtol=1e-4)
    (F.cross_entropy(twin(images[8:]), labels[8:]) / 2).backward()
    wanted = [
        reference.root(reference.norm(p.grad) for p in twin.get_submodule(name).parameters())
        for name in twin.unit_names
    ]
    assert np.allclose(frame.grad_param, wanted, rtol=1e-4)


def _twin_norms(twin):
    return [
        reference.root(reference.norm(p.grad) for p in twin.get_submodule(name).parameters())
        for name in twin.unit_names
    ]


def test_gradients_can_be_read_before_they_are_clipped():
    images, labels = batch()
    model, twin = small("no_relu"), small("no_relu")
    optimizer = sgd(model)
    before = [p.detach().clone() for p in model.parameters()]
    with attach(model, optimizer=optimizer, grad_read_point="pre_clip") as monitor:
        F.cross_entropy(model(images), labels).backward()
        monitor.read_gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        monitor.read_gradients()  # does nothing: they were read
        optimizer.step()
        monitor.step()
        monitor.read_gradients()  # nor in a step that has no forward pass yet
    F.cross_entropy(twin(images), labels).backward()
    frame = monitor.to_frame()
    assert np.allclose(frame.grad_param, _twin_norms(twin), rtol=1e-4)
    assert set(frame.point) == {"pre_clip"}
    # the update is that of the clipped gradients
    after = dict(model.named_parameters())
    start = dict(zip(after, before, strict=True))
    for name, seen in zip(model.unit_names, frame.update_ratio, strict=True):
        mine = [key for key in after if key.startswith(f"{name}.")]
        moved = reference.root(reference.norm(after[key] - start[key]) for key in mine)
        assert seen == pytest.approx(
            moved / reference.root(reference.norm(start[key]) for key in mine), rel=1e-4
        )


def test_a_step_that_runs_the_backward_pass_itself_is_read_inside_it():
    images, labels = batch()
    model, twin = small("no_relu"), small("no_relu")
    optimizer = sgd(model)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    with attach(model, optimizer=optimizer) as monitor:
        for _ in range(2):  # in the second step gradients of the first are there to be mistaken
            twin.load_state_dict(model.state_dict())
            optimizer.step(closure)
            monitor.step()
    twin.zero_grad()
    F.cross_entropy(twin(images), labels).backward()
    frame = monitor.to_frame()
    assert np.allclose(frame[frame.step == 1].grad_param, _twin_norms(twin), rtol=1e-4)
    assert (frame.update_ratio > 0).all(), (
        "the closure's end is where weights are still the old ones"
    )


def test_listeners_hear_what_is_drained_and_a_failing_one_is_left_out_with_a_note():
    images, labels = batch()
    model = small("no_relu")
    heard = []

    def broken(metrics, curve):
        raise OSError("service is down")

    with attach(model) as monitor:
        monitor.add_listener(lambda metrics, curve: heard.append((metrics, curve)))
        monitor.add_listener(broken)
        for _ in range(15):
            F.cross_entropy(model(images), labels).backward()
            monitor.step()
        F.cross_entropy(model(images), labels).backward()
        with pytest.warns(WatchWarning, match="service is down"):
            monitor.step()  # the sixteenth: what was recorded comes to the host
    assert len(heard) == 1
    metrics, curve = monitor.drain()
    for drained, at in ((metrics, 0), (curve, 1)):
        for name, values in drained.items():
            parts = np.concatenate([part[at][name] for part in heard])
            assert np.array_equal(parts, values, equal_nan=True)
    assert len([note for note in monitor.warnings if "gets no further records" in note]) == 1


def test_a_gradient_that_comes_after_its_step_belongs_to_no_step():
    model = small("no_relu")
    images, labels = batch()
    with attach(model) as monitor:
        late = F.cross_entropy(model(images), labels)
        with pytest.warns(UserWarning, match="no backward pass"):
            monitor.step()
        F.cross_entropy(model(images), labels).backward()
        (1000 * late).backward()
        monitor.step()
    frame = monitor.to_frame()
    assert frame.grad_output[:3].isna().all()
    clean = small("no_relu")
    with attach(clean) as monitor:
        F.cross_entropy(clean(images), labels).backward()
        monitor.step()
    assert np.array_equal(frame.grad_output[3:], monitor.to_frame().grad_output)


def test_a_forward_pass_that_failed_can_be_repeated_in_its_step():
    model = small("original")
    images, labels = batch()
    broken = model.stages[2][0].branch[0].register_forward_pre_hook(raising(RuntimeError("memory")))
    with attach(model) as monitor:
        with pytest.raises(RuntimeError, match="memory"):
            model(images)
        broken.remove()
        F.cross_entropy(model(images), labels).backward()
        monitor.step()
    twin = small("original")
    units, _, logits = reference.walk_resnet(twin, images, "relu")
    F.cross_entropy(logits, labels).backward()
    expected = reference.columns(units, 4, [0, 1, 2])
    reference.assert_columns_agree(monitor.to_frame(), expected)
    assert len(monitor.to_frame("step")) == 1
    assert not monitor.warnings


# -- it never goes silent --------------------------------------------------------------------------


def test_a_forward_called_directly_is_reported():
    model = small()
    with attach(model) as monitor:
        F.cross_entropy(model.forward(batch()[0]), batch()[1]).backward()
        with pytest.warns(WatchWarning, match=r"forward\(\) called directly"):
            monitor.step()
    assert len(monitor.to_frame()) == 0


@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_passes_that_do_not_train_are_not_recorded_and_a_step_of_them_is_reported(how):
    model = small()
    model.train(how != "eval")
    with attach(model) as monitor, torch.set_grad_enabled(how != "no_grad"):
        model(batch()[0])
        with pytest.warns(WatchWarning, match="no forward pass in training mode"):
            monitor.step()
    assert monitor.blocks == []


def test_the_same_note_is_given_once():
    model = small()
    with attach(model) as monitor:
        with pytest.warns(WatchWarning, match="due for recording"):
            monitor.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            monitor.step()
    assert len(monitor.warnings) == 1


def test_a_step_without_backward_is_reported_and_keeps_its_forward_numbers():
    model = small()
    with attach(model) as monitor:
        model(batch()[0])
        with pytest.warns(WatchWarning, match="no backward pass"):
            monitor.step()
    frame = monitor.to_frame()
    assert frame.grad_output.isna().all()
    assert frame.output_mean.notna().all()


def test_a_compiled_model_is_refused_with_the_way_out():
    model = small()
    with pytest.raises(ValueError, match=r"before torch\.compile"):
        attach(torch.compile(model))
    model.compile()
    with pytest.raises(ValueError, match=r"before torch\.compile"):
        attach(model)


def test_wrong_arguments_name_the_valid_ones():
    model = small()
    with pytest.raises(ValueError, match="every=0"):
        attach(model, every=0)
    with pytest.raises(ValueError, match="unknown grad_read_point 'clip'; did you mean 'pre_clip'"):
        attach(model, grad_read_point="clip")
    with pytest.raises(ValueError, match=r"'stage\.\*' matches no module"):
        attach(model, blocks=["stage.*"])
    with attach(model) as monitor, pytest.raises(ValueError, match="not 'epoch'"):
        monitor.to_frame("epoch")


def test_a_network_without_blocks_is_reported_and_still_has_its_gradient_norm():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(10)
    )
    model(batch()[0])
    with attach(model) as monitor, pytest.warns(WatchWarning, match="no residual addition"):
        train(model, 1, monitor=monitor)
    total = reference.root(reference.norm(p.grad) for p in model.parameters())
    assert monitor.to_frame("step").grad_norm[0] == pytest.approx(total, rel=1e-6)


def test_paused_passes_are_ignored_and_nest():
    model = small()
    images, _ = batch()
    with attach(model) as monitor:
        with monitor.paused():
            with monitor.paused():
                model(images)
            model(images)
        assert monitor.blocks == []
        train(model, 1, monitor=monitor)
    assert len(monitor.to_frame()) == 3
    assert not monitor.warnings


def test_an_addition_that_the_first_pass_had_not_is_reported():
    class Growing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.times = torch.nn.Linear(10, 10), 1

        def forward(self, x):
            x = x.mean((2, 3)).repeat(1, 4)[:, :10]
            for _ in range(self.times):
                x = x + self.layer(x)
            return x

    model = Growing()
    with attach(model) as monitor:
        train(model, 1, monitor=monitor)
        model.times = 2
        with pytest.warns(WatchWarning, match="was not like the one that had been traced"):
            train(model, 1, monitor=monitor)
        with pytest.warns(WatchWarning, match="additions that the first pass did not have"):
            train(model, 1, monitor=monitor)
    assert len(monitor.to_frame()) == 3


def test_weights_shared_by_two_blocks_count_in_both():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)

        def forward(self, x):
            x = x.mean((2, 3))
            x = x + self.layer(x)
            return F.pad(x + self.layer(x), (0, 7))

    model = Tied()
    with attach(model) as monitor:
        train(model, 1, monitor=monitor)
    frame, total = monitor.to_frame(), monitor.to_frame("step").grad_norm[0]
    assert frame.grad_param.to_list() == pytest.approx([total, total], rel=1e-6)


def test_an_explosion_stays_visible_in_the_frame():
    model = small("elu_nobn")
    with torch.no_grad():
        model.stages[1][0].branch[0].weight.mul_(1e30)
    with attach(model) as monitor:
        train(model, 2, monitor=monitor)
    first = monitor.to_frame().query("step == 0")
    assert first.output_nonfinite.to_list()[0] == 0
    assert np.isfinite(first.output_channel_std[1])
    assert first.output_channel_std[1] > 1e20
    assert (monitor.to_frame().query("step == 1").output_nonfinite == 1).any()
