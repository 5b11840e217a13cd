"""The monitor against twins written out by hand, and what it must leave alone."""

import copy
import functools
import gc
import threading
import warnings
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from watching import (
    assert_reasons_are_complete,
    assert_watching_changes_nothing,
    batch,
    sgd,
    traces,
    train,
)

from resdiag.catalog.table import CORE, RECORDED
from resdiag.models.resnet import build_model
from resdiag.models.variants import VARIANTS
from resdiag.watch.base.safety import WatchWarning
from resdiag.watch.loop.attach import attach


def units_of(variant, model):
    return None if VARIANTS[variant].shortcut else model.unit_names


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


def small(variant="elu", **kwargs):
    return build_model(variant, 8, width=0.25, seed=0, **kwargs)


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
    broken = model.stages[2][0].branch[0].register_forward_pre_hook(_raise(RuntimeError("memory")))
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


def _raise(error):
    def hook(*_):
        raise error

    return hook


# -- it leaves no trace ---------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt("stop")])
@pytest.mark.parametrize("where", ["never", "forward", "inner", "backward", "loop"])
def test_close_leaves_nothing_on_the_model_whatever_happened(where, error):
    model = small("original")
    optimizer = sgd(model)
    before = traces(model)
    images, labels = batch(4)
    planted = []
    inner = model.stages[1][0]
    if where in ("forward", "inner"):
        target = model.pool if where == "forward" else inner.branch
        planted.append(target.register_forward_hook(_raise(error)))
    elif where == "backward":
        planted.append(
            inner.register_forward_hook(lambda m, i, o: o.register_hook(_raise(error)) and None)
        )
    monitor = attach(model, optimizer=optimizer)
    ends = nullcontext() if where == "never" else pytest.raises(type(error), match="stop")
    with ends, monitor:
        F.cross_entropy(model(images), labels).backward()
        if where == "loop":
            raise error
    for handle in planted:
        handle.remove()
    assert traces(model) == before
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    monitor.close()
    with pytest.raises(RuntimeError, match="closed"):
        monitor.step()
    train(model, 1, optimizer=optimizer)


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt("stop")])
def test_an_interrupted_forward_pass_does_not_spoil_the_next_step(error):
    model = small("original")
    with attach(model) as monitor:
        planted = model.stages[1][0].branch.register_forward_hook(_raise(error))
        with pytest.raises(type(error)):
            model(batch()[0])
        planted.remove()
        train(model, 2, monitor=monitor)
        assert torch._C._len_torch_function_stack() == 0
    recorded = monitor.to_frame()[[name for name in RECORDED if name != "update_ratio"]]
    assert not recorded.isna().any(axis=None)
    assert sorted(set(monitor.to_frame().step)) == [0, 1]


def test_many_attachments_leave_no_hook_behind():
    model = small()
    before = traces(model)
    for turn in range(200):
        with attach(model) as monitor:
            if turn % 50 == 0:
                train(model, 1, monitor=monitor)
    assert traces(model) == before


def test_no_activation_outlives_its_step():
    model, alive = small("original"), []
    known = {id(tensor) for tensor in activations(model)}
    for module in model.modules():
        module.register_forward_hook(lambda m, i, o: alive.append(weakref.ref(o)))
    with attach(model, samples=2) as monitor:
        train(model, 2, monitor=monitor)
        gc.disable()
        try:
            assert len(alive) > 40
            assert not [ref for ref in alive if ref() is not None]
        finally:
            gc.enable()
        # memory for the samples looked at
        assert {len(t) for t in activations(model) if id(t) not in known} == {2}
    assert not [t for t in activations(model) if id(t) not in known]


def activations(model):
    """Every tensor of four dimensions in this process that is not shaped as a weight."""
    weights = {p.shape for p in model.parameters()}
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    return [t for t in tensors if t.dim() == 4 and t.shape not in weights]


# -- watching changes nothing ---------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_twenty_watched_steps_end_in_the_same_bits(variant, every):
    model = small(variant)
    units = units_of(variant, model)
    images, labels = batch(8)
    assert_watching_changes_nothing(
        lambda: small(variant), 20, images, labels, every=every, blocks=units
    )


class Dropping(torch.nn.Module):
    """Two units with dropout in the branch: the random state matters."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.ModuleList(torch.nn.Linear(12, 12) for _ in range(2))
        self.head = torch.nn.Linear(12, 10)

    def forward(self, x):
        x = x.mean((2, 3)).repeat(1, 4)
        for layer in self.inner:
            x = F.relu(x + F.dropout(F.elu(layer(x)), 0.3))
        return self.head(x)


def test_dropout_draws_the_same_numbers_under_watch():
    assert_watching_changes_nothing(Dropping, 20, *batch(8))


# -- it does not make the host wait ----------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Counts the operations by which the host waits for a device."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item", "_to_copy", "unique")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        copies = name == "_to_copy" and "device" not in (kwargs or {})
        masks = [t for t in tree_leaves(args[1:]) if getattr(t, "dtype", None) == torch.bool]
        picks = name.startswith(("index", "masked_select")) and masks
        sends = name == "lift_fresh"  # torch.tensor([...]): numbers of the host sent to the device
        if sends or picks or (name.startswith(self.NAMES) and not copies):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["original", "elu_after", "plain", "elu_nobn"])
def test_no_operation_of_a_recorded_step_makes_the_host_wait(as_on_an_accelerator, variant):
    # as on an accelerator: the numbers of a CPU tensor are the host's own
    as_on_an_accelerator()
    model = small(variant)
    optimizer = sgd(model)
    images, labels = batch(4)
    with attach(model, optimizer=optimizer, blocks=units_of(variant, model)) as monitor:
        # the first step finds the blocks and sends where their numbers go
        train(model, 1, monitor=monitor, optimizer=optimizer, images=images, labels=labels)
        for _ in range(5):
            with HostReads() as counter:
                train(model, 1, monitor=monitor, optimizer=optimizer, images=images, labels=labels)
            assert counter.seen == []


def test_host_reads_are_seen_by_the_counter():
    with HostReads() as counter:
        torch.ones(3).sum().item()
        torch.ones(3)[torch.ones(3) > 0]
        torch.tensor([1.0, 2.0])
    assert len(counter.seen) == 3


@pytest.mark.parametrize("variant", ["elu_nobn", "elu_after", "original"])
def test_the_accelerator_path_gives_the_same_numbers(as_on_an_accelerator, variant):
    fast = watch_and_walk(variant, 8)[0].to_frame()
    as_on_an_accelerator()
    exact = watch_and_walk.__wrapped__(variant, 8)[0].to_frame()
    expected = {name: exact[name].to_numpy(np.float64) for name in RECORDED}
    reference.assert_columns_agree(fast, expected, rtol=2e-5)


def test_an_accelerator_is_never_waited_for_between_flushes(device):
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    model = small("elu_after").to(device)
    optimizer = sgd(model)
    images, labels = batch(device=device)
    with attach(model, optimizer=optimizer) as monitor:
        train(model, 2, monitor=monitor, optimizer=optimizer, images=images, labels=labels)
        torch.cuda.set_sync_debug_mode("error")
        try:
            train(model, 5, monitor=monitor, optimizer=optimizer, images=images, labels=labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(monitor.to_frame()) == 7 * 3


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
        with pytest.warns(WatchWarning, match="additions that the first one had not"):
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


def watch_once(model):
    with attach(model) as monitor:
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        monitor.step()
    return monitor.to_frame()


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
