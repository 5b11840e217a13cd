"""Training loops, each written once and run with and without a monitor; and their twins."""

import warnings
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from small_nets import Net, data, sgd
from torch import nn

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


def first_gradients(twin):
    x, y = data(seed=0)
    sums, logits = walk(twin, x)
    F.cross_entropy(logits, y).backward()
    return sums


class Unwatched:
    """Stands for a monitor in a loop that runs without one."""

    def step(self):
        pass

    def read_gradients(self, point=None):
        pass

    def paused(self):
        return nullcontext()


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


def run(loop, **options):
    """A loop that must say nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", WatchWarning)
        monitor = loop(Net(), attach, **options)
    assert not monitor.warnings
    return monitor
