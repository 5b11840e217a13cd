"""Watching leaves no trace, changes no bit, and makes no host wait."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from watching import (
    assert_watching_changes_nothing,
    batch,
    raising,
    sgd,
    small,
    traces,
    train,
    units_of,
)

from resdiag.catalog.table import RECORDED
from resdiag.models.variants import VARIANTS
from resdiag.watch.loop.attach import attach

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
        planted.append(target.register_forward_hook(raising(error)))
    elif where == "backward":
        planted.append(
            inner.register_forward_hook(lambda m, i, o: o.register_hook(raising(error)) and None)
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
        planted = model.stages[1][0].branch.register_forward_hook(raising(error))
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
