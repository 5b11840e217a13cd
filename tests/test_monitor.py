"""The monitor against twins written out by hand, and what it must leave alone."""

import copy

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F

from resdiag.models.resnet import build_model
from resdiag.models.variants import VARIANTS
from resdiag.watch.catalog import RECORDED
from resdiag.watch.monitor import attach


def batch(n=12, size=16, classes=10, device="cpu"):
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(n, 3, size, size, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    return images.to(device), labels.to(device)


def sgd(model, lr=0.01):
    return torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4
    )


def blocks_of(variant):
    return ["stages.*.*"] if not VARIANTS[variant].shortcut else None


def units_of(variant, model):
    return None if VARIANTS[variant].shortcut else model.unit_names


def watch_and_walk(variant, depth, steps=2, samples=8, size=16):
    """Watch some steps; before each, walk a twin with the same weights by hand."""
    model = build_model(variant, depth, width=0.5, seed=3)
    optimizer = sgd(model, lr=1e-3)
    images, labels = batch(size=size)
    stages = [int(name.split(".")[1]) for name in model.unit_names]
    expected = []
    with attach(
        model, optimizer=optimizer, blocks=units_of(variant, model), samples=samples
    ) as monitor:
        for _ in range(steps):
            twin = copy.deepcopy(model)
            units, features, logits = reference.walk_resnet(
                twin, images, VARIANTS[variant].after_add
            )
            F.cross_entropy(logits, labels).backward()
            before = [
                [p.detach().clone() for p in model.get_submodule(name).parameters()]
                for name in model.unit_names
            ]
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            monitor.step()
            for unit, name in zip(units, model.unit_names, strict=True):
                new = dict(model.get_submodule(name).named_parameters())
                old = dict(twin.get_submodule(name).named_parameters())
                for key, parameter in old.items():
                    parameter.data = new[key].detach().clone()
                unit.parameters = list(old.values())
            expected.append(
                (reference.columns(units, samples, stages, before), twin, features, logits)
            )
    return monitor, expected, labels


DEPTHS = [(variant, 8) for variant in VARIANTS] + [(variant, 20) for variant in VARIANTS]


@pytest.mark.parametrize(("variant", "depth"), DEPTHS)
def test_every_column_equals_the_twin_at_the_first_two_steps(variant, depth):
    monitor, expected, _ = watch_and_walk(variant, depth)
    frame = monitor.to_frame()
    for step, (columns, *_) in enumerate(expected):
        reference.assert_columns_agree(frame[frame.step == step], columns)
