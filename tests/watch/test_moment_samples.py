"""Moments and gradient norms estimated from the head of a batch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resdiag.models.resnet import build_model
from resdiag.watch.loop.attach import attach
from resdiag.watch.measure import reductions

MOMENTS = ("mean", "channel_mean_rms", "channel_std", "mean_q10", "mean_q50", "mean_q90")


class Unnormalised(nn.Module):
    """Residual blocks whose samples know nothing of each other."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(3, 10)

    def forward(self, x):
        for convolution in self.convolutions:
            x = F.elu(x + convolution(x))
        return self.head(x.mean((2, 3)))


def watched(model, images, labels, **choices):
    """One recorded step."""
    model.zero_grad()
    with attach(model, **choices) as monitor:
        F.cross_entropy(model(images), labels).backward()
        monitor.step()
    return monitor.to_frame()


def data(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 8, 8, generator=generator)
    return images, torch.randint(10, (n,), generator=generator)


@pytest.mark.parametrize("metrics_", ["core", "full"])
@pytest.mark.parametrize("variant", ["original", "elu", "elu_after", "elu_nobn"])
def test_as_many_samples_as_there_are_change_nothing(variant, metrics_):
    images, labels = data(6)
    frames = [
        watched(build_model(variant, 8, width=0.25, seed=1), images, labels, **choices)
        for choices in ({"metrics": metrics_}, {"metrics": metrics_, "moment_samples": 6})
    ]
    whole, sliced = (frame.select_dtypes("number").to_numpy(float) for frame in frames)
    assert np.isfinite(whole).any(0).sum() > 10
    # a sum's channel sums are added up in one of them and read in the other
    assert np.allclose(whole, sliced, rtol=2e-5, atol=1e-6, equal_nan=True)


def test_the_moments_are_those_of_the_samples_at_the_head():
    torch.manual_seed(3)
    model = Unnormalised()
    images, labels = data(12)
    sliced = watched(model, images, labels, moment_samples=5)
    head = watched(model, images[:5], labels[:5])
    for site in ("input", "branch", "shortcut", "sum", "output"):
        for name in (f"{site}_{moment}" for moment in MOMENTS):
            assert np.allclose(sliced[name], head[name], rtol=1e-5, atol=1e-7), name


def test_of_samples_that_are_all_the_same_a_few_tell_the_gradient_exactly():
    torch.manual_seed(3)
    model = Unnormalised()
    images, labels = data(1)
    images, labels = images.expand(12, -1, -1, -1).clone(), labels.expand(12).clone()
    whole, sliced = (watched(model, images, labels, moment_samples=k) for k in (None, 5))
    for name in ("grad_output", "grad_sum", "grad_input", "elasticity"):
        assert whole[name].notna().sum() >= 3  # the images themselves take no gradient
        assert np.allclose(whole[name], sliced[name], rtol=1e-5, equal_nan=True), name
    assert (whole.grad_param == sliced.grad_param).all()


def test_the_squared_gradient_norm_of_a_slice_has_no_bias():
    """E[G2^2] over random slices is G2^2 of the batch: a mean over samples, times B^2."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(12, 3, 4, generator=generator) * torch.rand(12, 1, 1, generator=generator)
    whole, _ = reductions.gradient(g)
    slices = [reductions.gradient(g.roll(shift, 0), 5)[0] ** 2 for shift in range(12)]
    assert np.mean(slices) == pytest.approx(whole**2, rel=1e-6)
    assert min(slices) < whole**2 < max(slices)


def test_what_is_not_finite_in_a_sample_that_is_not_looked_at_is_not_seen():
    g = torch.ones(4, 2)
    g[3, 0] = torch.nan
    assert reductions.gradient(g, 3)[1] == 0
    assert reductions.gradient(g, 4)[1] == pytest.approx(1 / 8)
    assert reductions.gradient(g, 9)[1] == pytest.approx(1 / 8)


@pytest.mark.parametrize("count", [0, -3])
def test_a_number_that_takes_nothing_is_refused(count):
    with pytest.raises(ValueError, match=f"moment_samples={count} must be at least 1"):
        attach(Unnormalised(), moment_samples=count)
