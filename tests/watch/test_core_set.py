"""The small set of metrics reads less than the full one and says the same."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resdiag.catalog.table import CORE
from resdiag.models.resnet import build_model
from resdiag.watch.loop.attach import attach


class Turning(nn.Module):
    """A residual block, with a ReLU after its addition when it is told so."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Conv2d(3, 3, 3, padding=1)
        self.has_relu = False

    def forward(self, x):
        y = x + self.branch(x)
        return F.relu(y) if self.has_relu else y


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = Turning(), nn.Linear(3, 10)

    def forward(self, x):
        return self.head(self.block(x).mean((2, 3)))


def data(n=6):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 3, 8, 8, generator=generator)
    return images, torch.randint(10, (n,), generator=generator)


@pytest.mark.parametrize("variant", ["original", "elu", "elu_after", "elu_pre", "elu_nobn"])
def test_the_core_set_has_the_numbers_of_the_full_one(variant):
    frames = []
    for metrics in ("core", "full"):
        model = build_model(variant, 8, width=0.25, seed=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        images, labels = data()
        with attach(model, optimizer=optimizer, metrics=metrics) as monitor:
            for _ in range(3):  # found, along the routine, and once more
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
                monitor.step()
        frames.append(monitor.to_frame())
    core, full = frames
    for column in CORE:
        assert core[column].notna().all(), column
        # channel sums of a sum are added up or read, float32 either way
        assert np.allclose(core[column], full[column], rtol=2e-5, atol=1e-6), column


def test_an_after_add_that_comes_later_leaves_p1_unknown_and_says_so():
    model, (images, labels) = Net(), data()
    with attach(model, metrics="core", trace="always") as monitor:
        for turn in (False, True, False):
            model.block.has_relu = turn
            F.cross_entropy(model(images), labels).backward()
            monitor.step()
    frame = monitor.to_frame()
    p1 = frame.perturbation
    assert p1[0] == p1[2] == 0
    assert np.isnan(p1[1])
    reasons = [m["reason"] for m in monitor.unavailable if m["metric"] == "perturbation"]
    assert any("no after-add in its first pass" in reason for reason in reasons)
    with attach(model, metrics="core") as fresh:
        model.block.has_relu = True
        F.cross_entropy(model(images), labels).backward()
        fresh.step()
    for column in ("output_mean", "output_channel_mean_rms", "output_channel_std"):
        assert frame[column][1] == pytest.approx(fresh.to_frame()[column][0], rel=1e-6), column
