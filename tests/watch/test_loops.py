"""Every kind of training loop: what is recorded in it, against the same loop by hand."""

import copy
import gc
import io
import pickle  # noqa: TID251 - what a user may do with a model
import warnings
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_nets import CLASSES, WIDTH, Net, at, close, data, sgd
from torch import nn
from torch.func import functional_call, grad
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.checkpoint import checkpoint

from resdiag.watch.base.safety import WatchWarning
from resdiag.watch.loop.attach import attach


def walk(model, x):
    """The sums of both blocks, keeping their gradients, and the logits."""
    sums, x = [], model.stem(x)
    for block in model.blocks:
        x = x + F.elu(block.layer(x))
        x.retain_grad()
        sums.append(x)
    return sums, model.head(x)


def norm(tensors):
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())


def g1(model):
    """Gradient norm of the parameters of each block."""
    return [norm([p.grad for p in block.parameters()]) for block in model.blocks]


def total(model):
    return norm([p.grad for p in model.parameters() if p.grad is not None])


def g2(sums, scale=1.0):
    return [len(u) ** 0.5 * norm([u.grad]) / scale for u in sums]


def moved(model, before):
    """Update ratio per block."""
    pairs = zip(model.blocks, before.blocks, strict=True)
    return [
        norm([p.detach() - q.detach() for p, q in zip(a.parameters(), b.parameters(), strict=True)])
        / norm([q.detach() for q in b.parameters()])
        for a, b in pairs
    ]


def per_step(monitor, column):
    return monitor.to_frame("step")[column].to_list()


class Unwatched:
    """Stands for a monitor in a loop that runs without one."""

    def step(self):
        pass

    def read_gradients(self, point=None):
        pass

    def paused(self):
        return nullcontext()


# -- loops, each written once and run with and without a monitor -----------------------------------


def plain(model, watch, steps=3):
    optimizer = sgd(model)
    with watch(model) as monitor:
        for step in range(steps):
            x, y = data(seed=step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            monitor.step()
    return monitor


def with_optimizer(model, watch, steps=3, set_to_none=True):
    optimizer = sgd(model)
    with watch(model, optimizer=optimizer) as monitor:
        for step in range(steps):
            x, y = data(seed=step)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
            monitor.step()
    return monitor


def accumulating(model, watch, steps=2, take="first"):
    optimizer = sgd(model)
    with watch(model, optimizer=optimizer, forward_pass=take) as monitor:
        for step in range(steps):
            for part in range(3):
                x, y = data(seed=10 * step + part)
                (F.cross_entropy(model(x), y) / 3).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e6)
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
    return monitor


def clipping(model, watch, steps=2, limit=0.01, read=True, **options):
    optimizer = sgd(model)
    with watch(model, optimizer=optimizer, **options) as monitor:
        for step in range(steps):
            x, y = data(seed=step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if read:
                monitor.read_gradients("pre_clip")
            nn.utils.clip_grad_norm_(model.parameters(), limit)
            optimizer.step()
            monitor.step()
    return monitor


def scaled(model, watch, steps=3, fused=False, clip=None, dtype=torch.float32, broken=(), every=1):
    make = partial(torch.optim.Adam, lr=1e-2, fused=True) if fused else sgd
    optimizer = make(model.parameters()) if fused else make(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    with watch(model, optimizer=optimizer, scaler=scaler, every=every) as monitor:
        for step in range(steps):
            x, y = data(seed=step)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(model(x), y)
            if step in broken:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                monitor.read_gradients("pre_clip")
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            monitor.step()
    return monitor


def closure_based(model, watch, kind=torch.optim.LBFGS, steps=2):
    optimizer = kind(model.parameters(), lr=0.1)
    with watch(model, optimizer=optimizer) as monitor:
        for step in range(steps):
            x, y = data(seed=step)

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
            monitor.step()
    return monitor


def in_backward(model, watch, steps=2):
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def update(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    hooks = [p.register_post_accumulate_grad_hook(update) for p in model.parameters()]
    with watch(model, optimizer=optimizers.values()) as monitor:
        for step in range(steps):
            x, y = data(seed=step)
            F.cross_entropy(model(x), y).backward()
            monitor.step()
    for hook in hooks:
        hook.remove()
    return monitor


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation in the form of its widespread implementation."""

    def __init__(self, params, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = torch.optim.SGD(self.param_groups, **options)

    @torch.no_grad()
    def first_step(self):
        parameters = [p for group in self.param_groups for p in group["params"]]
        factor = self.param_groups[0]["rho"] / norm([p.grad for p in parameters])
        for p in parameters:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad * factor)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        self.zero_grad()


def sharpness_aware(model, watch, steps=2):
    optimizer = SAM(model.parameters(), lr=0.1)
    with watch(model, optimizer=optimizer) as monitor:
        for step in range(steps):
            x, y = data(seed=step)
            F.cross_entropy(model(x), y).backward()
            optimizer.first_step()
            F.cross_entropy(model(x), y).backward()
            optimizer.second_step()
            monitor.step()
    return monitor


def split_optimizers(model, watch, steps=2):
    rest = [*model.stem.parameters(), *model.head.parameters()]
    one = torch.optim.AdamW(model.blocks.parameters(), lr=0.01)
    two = torch.optim.SGD(rest, lr=0.1)
    with watch(model, optimizer=[one, two]) as monitor:
        for step in range(steps):
            x, y = data(seed=step)
            F.cross_entropy(model(x), y).backward()
            for optimizer in (one, two):
                optimizer.step()
                optimizer.zero_grad()
            monitor.step()
    return monitor


def several_backwards(model, watch, steps=2):
    optimizer = sgd(model)
    with watch(model, optimizer=optimizer) as monitor:
        for step in range(steps):
            x, y = data(seed=step)
            optimizer.zero_grad()
            logits = model(x)
            F.cross_entropy(logits, y).backward(retain_graph=True)
            logits.square().mean().backward()
            optimizer.step()
            monitor.step()
    return monitor


def siamese(model, watch, steps=2, take="first"):
    optimizer = sgd(model)
    with watch(model, optimizer=optimizer, forward_pass=take) as monitor:
        for step in range(steps):
            one, two = model(data(seed=step)[0]), model(data(seed=step + 100)[0])
            optimizer.zero_grad()
            (one - two).square().mean().backward()
            optimizer.step()
            monitor.step()
    return monitor


LOOPS = {
    "plain": plain,
    "with_optimizer": with_optimizer,
    "zeroed_in_place": partial(with_optimizer, set_to_none=False),
    "accumulating": accumulating,
    "accumulating_last": partial(accumulating, take="last"),
    "clipping": clipping,
    "clipping_unread": partial(clipping, read=False),
    "scaled": scaled,
    "scaled_bf16": partial(scaled, dtype=torch.bfloat16),
    "scaled_fused": partial(scaled, fused=True),
    "scaled_clipped": partial(scaled, clip=0.01),
    "scaled_broken": partial(scaled, broken=(1,)),
    "scaled_fused_broken": partial(scaled, fused=True, broken=(1,)),
    "lbfgs": closure_based,
    "closure": partial(closure_based, kind=torch.optim.SGD),
    "in_backward": in_backward,
    "sharpness_aware": sharpness_aware,
    "split_optimizers": split_optimizers,
    "several_backwards": several_backwards,
    "siamese": siamese,
    "siamese_last": partial(siamese, take="last"),
}


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


def run(loop, **options):
    """A loop that must say nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", WatchWarning)
        monitor = loop(Net(), attach, **options)
    assert not monitor.warnings
    return monitor


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


# -- other optimizers ------------------------------------------------------------------------------


def first_gradients(twin):
    x, y = data(seed=0)
    sums, logits = walk(twin, x)
    F.cross_entropy(logits, y).backward()
    return sums


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


# -- models of other kinds -------------------------------------------------------------------------


def backward_once(model, x, y=None, loss=F.cross_entropy, **options):
    y = data(len(x))[1] if y is None else y
    with attach(model, **options) as monitor:
        loss(model(x), y).backward()
        monitor.step()
    return monitor


def test_frozen_parts_are_nan_with_a_reason_and_the_rest_is_there():
    model = Net()
    model.stem.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    monitor = with_optimizer(model, attach, steps=2)
    assert np.isnan(at(monitor, "grad_param")[0])
    assert np.isnan(at(monitor, "grad_output")[0])
    assert min(at(monitor, "grad_param")[1], at(monitor, "grad_output")[1]) > 0
    assert at(monitor, "update_ratio")[0] == 0
    reasons = {(e["metric"], e["reason"]) for e in monitor.unavailable if e["blocks"] == [0]}
    assert ("grad_param", "no parameter of it has a gradient") in reasons
    assert ("grad_output", "this tensor does not require a gradient") in reasons
    assert not monitor.warnings


class Shared(Net):
    """The same block three times."""

    times = 3

    def forward(self, x):
        x = self.stem(x)
        for _ in range(self.times):
            x = self.blocks[0](x)
        return self.head(x)


def test_a_block_called_several_times_is_a_block_each_time():
    monitor, twin, (x, y) = backward_once(Shared(), data()[0]), Shared(), data()
    h, sums = twin.stem(x), []
    for _ in range(3):
        h = h + F.elu(twin.blocks[0].layer(h))
        h.retain_grad()
        sums.append(h)
    F.cross_entropy(twin.head(h), y).backward()
    assert [block.name for block in monitor.blocks] == ["blocks.0", "blocks.0#1", "blocks.0#2"]
    assert at(monitor, "grad_output") == close(g2(sums))
    assert at(monitor, "grad_param") == close(
        [norm([p.grad for p in twin.blocks[0].parameters()])] * 3
    )


def test_blocks_that_a_later_pass_left_out_are_reported():
    model, (x, y) = Shared(), data()
    with attach(model) as monitor:
        for times in (3, 2):
            model.times = times
            F.cross_entropy(model(x), y).backward()
            with (
                pytest.warns(WatchWarning, match=r"did not run in a later one .*: blocks\.0#2")
                if times == 2
                else nullcontext()
            ):
                monitor.step()
    assert np.isnan(monitor.to_frame().output_mean).to_list() == [False] * 5 + [True]


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Wrapped(Net):
    """Returns its logits in a container, and takes its input in one."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, batch):
        logits = super().forward(batch["x"])
        loss = F.cross_entropy(logits, batch["y"])
        return {
            "tuple": (logits, loss), "dict": {"logits": logits, "loss": loss},
            "dataclass": Output(logits, loss), "loss": loss,
        }[self.kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass", "loss"])
def test_containers_go_in_and_out_and_a_model_may_return_its_loss(kind):
    model, twin, (x, y) = Wrapped(kind), Net(), data(seed=0)
    with attach(model) as monitor:
        out = model({"x": x, "y": y})
        loss = {
            "tuple": lambda: out[1], "dict": lambda: out["loss"],
            "dataclass": lambda: out.loss, "loss": lambda: out,
        }[kind]()  # fmt: skip
        loss.backward()
        monitor.step()
    assert at(monitor, "grad_output") == close(g2(first_gradients(twin)))
    assert not monitor.warnings


class Dataclassed(nn.Module):
    """A block that is given and returns a dataclass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, state):
        return Output(state.logits + F.elu(self.layer(state.logits)))


def test_a_block_may_take_and_return_a_dataclass():
    model = nn.Sequential(Dataclassed(), Dataclassed())
    x = data()[0]
    with attach(model) as monitor:
        model(Output(x)).logits.square().mean().backward()
        monitor.step()
    assert len(monitor.blocks) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_measured_in_full(dtype):
    model, twin, (x, y) = Net().to(dtype), Net().to(dtype), data()
    monitor = backward_once(model, x.to(dtype), y)
    sums, logits = walk(twin, x.to(dtype))
    F.cross_entropy(logits, y).backward()
    assert at(monitor, "grad_output") == close(g2(sums))
    assert at(monitor, "output_mean") == close([u.double().mean().item() for u in sums])
    assert at(monitor, "grad_param") == close(g1(twin))


def test_the_memory_format_changes_no_number():
    frames = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = Convolutional().to(memory_format=layout)
        x = torch.randn(4, 3, 8, 8).contiguous(memory_format=layout)
        monitor = backward_once(model, x)
        frames.append(monitor.to_frame().drop(columns=["point"]))
    np.testing.assert_allclose(*frames, rtol=1e-4, atol=1e-6)


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.layer(x), inplace=True)
        return self.head(x.mean((2, 3)))


def test_batches_of_other_sizes_and_empty_ones_are_recorded():
    model, twin = Net(), Net()
    with attach(model) as monitor:
        for n in (5, 2, 0):
            model.zero_grad()
            model(data(n)[0]).square().sum().backward()
            monitor.step()
    sums, logits = walk(twin, data(2)[0])
    logits.square().sum().backward()
    assert at(monitor, "grad_output", 1) == close(g2(sums))
    assert np.isnan(at(monitor, "output_mean", 2)).all()
    assert at(monitor, "grad_param", 2) == [0, 0]
    assert not monitor.warnings


def test_functional_calls_are_recorded_but_for_parameters_that_are_not_the_models():
    model, twin, (x, y) = Net(), Net(), data(seed=0)
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    with attach(model) as monitor:
        F.cross_entropy(functional_call(model, weights, (x,)), y).backward()
        with pytest.warns(WatchWarning, match="no gradient was left"):
            monitor.step()
    assert at(monitor, "grad_output") == close(g2(first_gradients(twin)))
    assert np.isnan(at(monitor, "grad_param")).all()


def test_a_function_transform_is_left_alone_and_reported():
    model, (x, y) = Net(), data()
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def loss(weights):
        return F.cross_entropy(functional_call(model, weights, (x,)), y)

    expected = grad(loss)(weights)
    with attach(model) as monitor, pytest.warns(WatchWarning, match=r"inside a torch\.func"):
        found = grad(loss)(weights)
    assert all(torch.equal(expected[name], found[name]) for name in weights)
    assert len(monitor.to_frame()) == 0


def test_a_copy_of_a_watched_model_is_not_watched():
    model, (x, y) = Net(), data(seed=0)
    with attach(model) as monitor:
        average = copy.deepcopy(model)
        F.cross_entropy(average(x + 1), y).backward()
        F.cross_entropy(model(x), y).backward()
        F.cross_entropy(average(x + 1), y).backward()
        monitor.step()
    assert not monitor.warnings
    assert at(monitor, "grad_output") == close(g2(first_gradients(Net())))


def test_a_watched_model_can_be_saved_by_its_state_and_after_closing_whole():
    model = Net()
    keys = list(model.state_dict())
    with attach(model) as monitor:
        monitor.paused()
        torch.save(model.state_dict(), io.BytesIO())
        assert list(model.state_dict()) == keys
        with pytest.raises((AttributeError, pickle.PicklingError), match="PassDriver"):
            pickle.dumps(model)
    torch.save(model, io.BytesIO())
    assert type(pickle.loads(pickle.dumps(model))) is Net


class Checkpointed(Net):
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def test_recomputed_blocks_are_counted_once_in_a_whole_training():
    plain_frame, frame = (
        with_optimizer(model, attach).to_frame().drop(columns="point")
        for model in (Net(), Checkpointed())
    )
    np.testing.assert_array_equal(plain_frame, frame)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_language_model_that_returns_its_loss_is_recorded(reentrant):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=16, n_positions=8,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        tokens = torch.randint(16, (2, 8), generator=torch.Generator().manual_seed(0))
        with attach(model) if watched else nullcontext(Unwatched()) as monitor:
            model(input_ids=tokens, labels=tokens).loss.backward()
            monitor.step()
        ends.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *ends))
    assert not monitor.warnings
    assert len(monitor.blocks) == 4
    frame = monitor.to_frame()
    assert frame[["grad_param", "output_mean"]].notna().all(axis=None)
    assert frame.grad_output.isna().all() == bool(reentrant)  # runs `forward` again, no module
    hidden = [e for e in monitor.unavailable if e["metric"] == "grad_output"]
    assert [e["blocks"] for e in hidden] == ([[0, 1, 2, 3]] if reentrant else [])
    assert all("use_reentrant=False" in e["reason"] for e in hidden)
    assert per_step(monitor, "grad_norm")[0] == close(norm(ends[0]))
