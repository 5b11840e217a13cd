"""What must be so whatever is watched."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from resdiag.catalog.table import RECORDED
from resdiag.models.resnet import build_model
from resdiag.models.variants import VARIANTS
from resdiag.watch.loop.attach import attach


def batch(n=12, size=16, classes=10, device="cpu"):
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(n, 3, size, size, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    return images.to(device), labels.to(device)


def sgd(model, lr=0.01):
    return torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4
    )


def assert_reasons_are_complete(monitor):
    """NaN exactly where a reason is given."""
    frame = monitor.to_frame()
    told = {name: set() for name in RECORDED}
    for entry in monitor.unavailable:
        assert entry["reason"]
        if entry["metric"] in told:
            every = range(len(monitor.blocks))
            told[entry["metric"]] |= set(every if entry["blocks"] == "all" else entry["blocks"])
    for name in RECORDED:
        assert set(frame.block[frame[name].isna()]) == told[name], name


def assert_parameters_of_block(monitor, row, parameters):
    """The gradient norm of a block is that of these parameters, none left out and none added."""
    gradients = [p.grad.double() for p in {id(p): p for p in parameters}.values()]
    assert all(gradient.any() for gradient in gradients)  # each one makes a difference
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    assert monitor.to_frame().grad_param[row] == pytest.approx(norm, rel=1e-5)


def train(model, steps, *, monitor=None, optimizer=None, images=None, labels=None):
    """Ordinary training steps; returns the optimizer."""
    if images is None:
        images, labels = batch()
    optimizer = optimizer or sgd(model)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if monitor is not None:
            monitor.step()
    return optimizer


def units_of(variant, model):
    """The blocks to name: a variant without shortcuts has no addition to be found."""
    return None if VARIANTS[variant].shortcut else model.unit_names


def small(variant="elu", **kwargs):
    """A network of three blocks, a quarter as wide as the published one."""
    return build_model(variant, 8, width=0.25, seed=0, **kwargs)


def raising(error):
    """A hook that raises `error`."""

    def hook(*_):
        raise error

    return hook


def watch_once(model):
    """What is recorded of one ordinary step."""
    with attach(model) as monitor:
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        monitor.step()
    return monitor.to_frame()


def traces(model):
    """Everything that watching could leave on a model."""
    hooks = [
        (name, kind, len(value))
        for name, module in model.named_modules()
        for kind, value in vars(module).items()
        if "hook" in kind and value
    ]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    return hooks, attributes, list(model.state_dict()), torch._C._len_torch_function_stack()


def state_of(model, optimizer):
    """Weights, buffers, optimizer state and every random generator, to compare bit for bit."""
    tensors = list(model.state_dict().values())
    for entry in optimizer.state_dict()["state"].values():
        tensors += [value for value in entry.values() if isinstance(value, torch.Tensor)]
    numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002 - the one a loop may draw from
    generators = torch.get_rng_state().tolist(), random.getstate(), numpy_state
    return [t.clone() for t in tensors], generators


def assert_watching_changes_nothing(make, steps, inputs, labels, **options):
    ends = []
    for watched in (False, True):
        torch.manual_seed(5)
        model = make()
        optimizer = sgd(model)
        monitor = attach(model, optimizer=optimizer, **options) if watched else None
        train(model, steps, monitor=monitor, optimizer=optimizer, images=inputs, labels=labels)
        ends.append(state_of(model, optimizer))
        if monitor is not None:
            monitor.close()
            assert len(monitor.to_frame()) > 0
    (plain, plain_random), (seen, seen_random) = ends
    assert len(plain) == len(seen)
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    assert plain_random == seen_random
