"""Other optimizers, several of them, and several passes in one step."""

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from loops import (
    SAM,
    Unwatched,
    closure_based,
    first_gradients,
    g1,
    g2,
    in_backward,
    moved,
    per_step,
    run,
    several_backwards,
    sharpness_aware,
    siamese,
    split_optimizers,
    total,
    walk,
)
from small_nets import WIDTH, Net, at, close, data, sgd
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from resdiag.watch.base.safety import WatchWarning
from resdiag.watch.loop.attach import attach

# -- other optimizers ------------------------------------------------------------------------------


def test_a_closure_is_recorded_at_its_first_evaluation():
    with pytest.warns(WatchWarning, match="several forward passes in one step: the first"):
        monitor = closure_based(Net(), attach)
    twin, model = Net(), Net()
    sums = first_gradients(twin)
    assert at(monitor, "grad_output") == close(g2(sums))
    assert at(monitor, "grad_param") == close(g1(twin))
    closure_based(model, lambda *_, **__: nullcontext(Unwatched()), steps=1)
    assert at(monitor, "update_ratio") == close(moved(model, twin))


def test_a_closure_called_once_is_an_ordinary_step():
    monitor, twin = run(closure_based, kind=torch.optim.SGD), Net()
    first_gradients(twin)
    before = copy.deepcopy(twin)
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert at(monitor, "grad_param") == close(g1(twin))
    assert at(monitor, "update_ratio") == close(moved(twin, before))


def test_optimizers_that_step_inside_the_backward_pass_are_read_one_by_one():
    monitor, twin = run(in_backward), Net()
    sums = first_gradients(twin)
    before = copy.deepcopy(twin)
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert at(monitor, "grad_output") == close(g2(sums))
    assert at(monitor, "grad_param") == close(g1(twin))
    assert per_step(monitor, "grad_norm")[0] == close(total(twin))
    assert at(monitor, "update_ratio") == close(moved(twin, before))


def test_sharpness_aware_records_the_pass_whose_gradient_the_update_takes():
    monitor, twin = run(sharpness_aware), Net()
    first_gradients(twin)
    before, optimizer = copy.deepcopy(twin), SAM(twin.parameters(), lr=0.1)
    optimizer.first_step()
    sums = first_gradients(twin)
    assert at(monitor, "grad_output") == close(g2(sums))
    assert at(monitor, "grad_param") == close(g1(twin))
    optimizer.second_step()
    assert at(monitor, "update_ratio") == close(moved(twin, before))


def test_two_optimizers_of_one_model_make_one_record():
    monitor, twin = run(split_optimizers), Net()
    first_gradients(twin)
    before = copy.deepcopy(twin)
    torch.optim.AdamW(twin.blocks.parameters(), lr=0.01).step()
    assert at(monitor, "grad_param") == close(g1(twin))
    assert per_step(monitor, "grad_norm")[0] == close(total(twin))
    assert at(monitor, "update_ratio") == close(moved(twin, before))


# -- several backward and forward passes -----------------------------------------------------------


def test_of_several_backward_passes_the_last_is_recorded_and_parameters_have_all():
    with pytest.warns(WatchWarning, match="several backward passes reached the blocks: the last"):
        monitor = several_backwards(Net(), attach)
    twin, (x, y) = Net(), data(seed=0)
    sums, logits = walk(twin, x)
    F.cross_entropy(logits, y).backward(retain_graph=True)
    for u in sums:
        u.grad = None
    logits.square().mean().backward()
    assert at(monitor, "grad_output") == close(g2(sums))
    assert at(monitor, "grad_param") == close(g1(twin))


@pytest.mark.parametrize(("take", "which"), [("first", 0), ("last", 1)])
def test_of_two_views_in_one_loss_one_is_recorded(take, which):
    with pytest.warns(WatchWarning, match=f"the {take} one is recorded"):
        monitor = siamese(Net(), attach, take=take)
    twin = Net()
    views = [walk(twin, data(seed=seed)[0]) for seed in (0, 100)]
    (views[0][1] - views[1][1]).square().mean().backward()
    assert at(monitor, "grad_output") == close(g2(views[which][0]))
    assert at(monitor, "grad_param") == close(g1(twin))


def test_a_pass_whose_result_was_dropped_is_replaced():
    model, twin = Net(), Net()
    with attach(model) as monitor:
        model(torch.ones(2, 3))  # e.g. a look at the shapes
        x, y = data(seed=0)
        F.cross_entropy(model(x), y).backward()
        monitor.step()
    assert not monitor.warnings
    assert at(monitor, "grad_output") == close(g2(first_gradients(twin)))


class Generator(Net):
    """From noise to what a discriminator takes."""

    def __init__(self):
        super().__init__(seed=5)
        self.head = nn.Linear(WIDTH, 3)


def gan(watch, *, order, reuse=False, set_to_none=True, detach=True):
    """Returns both monitors; `order`: monitor.step() after each optimizer's step, or at the end."""
    g, d = Generator(), Net()
    opt_g, opt_d = sgd(g), sgd(d)
    with watch(g, optimizer=opt_g) as mon_g, watch(d, optimizer=opt_d) as mon_d:
        for step in range(3):
            real, noise = data(seed=step)[0], data(seed=step + 50)[0]
            opt_d.zero_grad(set_to_none=set_to_none)
            fake = g(noise)
            loss = d(real).square().mean() - d(fake.detach() if detach else fake).mean()
            loss.backward(retain_graph=reuse and not detach)
            opt_d.step()
            if order == "each":
                mon_d.step()
            opt_g.zero_grad(set_to_none=set_to_none)
            d(fake if reuse else g(noise + 1)).mean().backward()
            opt_g.step()
            mon_g.step()
            if order == "end":
                mon_d.step()
    return mon_g, mon_d, g, d


@pytest.mark.filterwarnings("ignore:resdiag. several:resdiag.watch.base.safety.WatchWarning")
@pytest.mark.parametrize("order", ["each", "end"])
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("detach", [False, True])
def test_two_networks_with_an_optimizer_each_are_recorded_in_their_own_steps(
    order, reuse, set_to_none, detach
):
    options = {"reuse": reuse, "set_to_none": set_to_none, "detach": detach}
    mon_g, mon_d, *watched = gan(attach, order=order, **options)
    *_, plain_g, plain_d = gan(lambda *_, **__: nullcontext(Unwatched()), order=order, **options)
    for ours, theirs in zip(watched, (plain_g, plain_d), strict=True):
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))

    g, d = Generator(), Net()
    opt_g, opt_d = sgd(g), sgd(d)
    for step in range(3):
        real, noise = data(seed=step)[0], data(seed=step + 50)[0]
        opt_d.zero_grad()
        fake_sums, fake = walk(g, noise)
        real_sums, score = walk(d, real)
        second = d(fake.detach() if detach else fake)
        (score.square().mean() - second.mean()).backward(retain_graph=True)
        assert at(mon_d, "output_mean", step) == close([u.mean().item() for u in real_sums])
        assert at(mon_d, "grad_output", step) == close(g2(real_sums))
        assert at(mon_d, "grad_param", step) == close(g1(d))
        opt_d.step()
        opt_g.zero_grad()
        if not reuse:
            fake_sums, fake = walk(g, noise + 1)
        for u in fake_sums:
            u.grad = None
        d(fake).mean().backward()
        assert at(mon_g, "output_mean", step) == close([u.mean().item() for u in fake_sums])
        assert at(mon_g, "grad_output", step) == close(g2(fake_sums))
        assert at(mon_g, "grad_param", step) == close(g1(g))
        opt_g.step()
    assert not [note for note in mon_g.warnings + mon_d.warnings if not note.startswith("several")]


def test_a_monitor_that_was_dropped_without_closing_frees_its_model():
    gc.collect()
    before = len(_global_optimizer_pre_hooks)
    model = Net()
    gone = weakref.ref(model)
    monitor = attach(model)
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    monitor.step()
    assert len(_global_optimizer_pre_hooks) == before + 1
    del model, monitor
    gc.collect()
    assert gone() is None
    assert len(_global_optimizer_pre_hooks) == before
