"""Networks whose branches are scaled at initialisation: the weights, and theory against them."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import resdiag
from resdiag.models.resnet import build_model
from resdiag.runs.config import RunConfig
from resdiag.theory.prediction import gradient_norm, predict, predict_run
from resdiag.training.recipe import Request, resolve
from resdiag.watch.loop.attach import attach


@pytest.mark.parametrize(
    ("variant", "last"),
    [("elu_nobn", "branch.2.weight"), ("elu_pre", "branch.3.weight"), ("elu", "branch.3.weight")],
)
def test_the_last_weights_of_each_branch_are_scaled_and_nothing_else(variant, last):
    plain = build_model(variant, 20, seed=3).state_dict()
    scaled = build_model(variant, 20, seed=3, branch_scale=0.25).state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], scaled[name])}
    assert changed == {f"stages.{s}.{b}.{last}" for s in range(3) for b in range(3)}
    assert all(torch.equal(scaled[name], plain[name] / 4) for name in changed)


def measured(variant, depth, scale, seed):
    """E[H^2] of the last block and ||g_0|| / ||g_L||, each over its prediction; ||g|| likewise."""
    model = build_model(variant, depth, seed=seed, branch_scale=scale)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(16, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (16,), generator=generator)
    monitor = attach(model)
    F.cross_entropy(model(images), labels).backward()
    monitor.step()
    run = resdiag.load_run(monitor)
    frame = run.metrics().set_index("block")
    s0, m0 = (float(frame[f"input_{name}"].iloc[0]) for name in ("second_moment", "mean"))
    theory = predict(variant, depth, s0=s0, m0=m0, branch_scale=scale)
    ratio = frame["grad_input"].iloc[0] / frame["grad_output"].iloc[-1]
    return (
        frame["output_second_moment"].iloc[-1] / theory.second_moment[-1],
        ratio / theory.gradient_ratio,
    )


@pytest.mark.parametrize("scale", [0.5, 0.3, 0.1, 0.03])
@pytest.mark.parametrize("depth", [20, 56])
def test_theory_of_b_holds_at_every_dose(depth, scale):
    """No constant is fitted; over these doses E[H^2] differs by a factor of 600 at depth 56."""
    logs = np.log([measured("elu_pre", depth, scale, seed) for seed in (0, 1, 2)])
    assert np.abs(logs.mean(0)).max() < math.log(1.25)


def test_without_a_dose_only_the_transitions_are_left():
    found = predict("b", 56, branch_scale=1e-9)
    assert found.second_moment[-1] == pytest.approx(found.s0 / 4)  # two of them halve the mean
    # each drops the gradient of half of the channels; the part along the signal a little less
    assert found.gradient_ratio == pytest.approx(0.5, abs=0.02)
    assert predict("b", 56, branch_scale=1.0).gradient_ratio == predict("b", 56).gradient_ratio


def test_laws_of_normalised_branches_predict_nothing_of_scaled_ones():
    found = predict("d", 20, branch_scale=0.5)
    assert np.isnan(found.second_moment).all()
    assert "does not hold for scaled branches" in found.basis
    assert gradient_norm(predict("b", 20, branch_scale=0.5)) is None
    assert gradient_norm(predict("b", 20)) > 0
    scaled = configured("elu", branch_scale=0.5)
    assert predict_run(scaled, []) is None
    assert predict_run(configured("elu"), []) is not None


def configured(variant, **settings) -> RunConfig:
    return resolve(
        Request(variant=variant, depth=20, recipe="short", data="digits", **settings),
        data_name="digits",
        train_size=1437,
    )


def test_a_run_is_predicted_at_its_own_dose():
    theory = predict_run(configured("elu_pre", branch_scale=0.3), [])
    assert theory.second_moment[-1] == predict("b", 20, branch_scale=0.3).second_moment[-1]
    assert theory.second_moment[-1] < predict("b", 20).second_moment[-1]


def test_the_name_of_a_run_without_a_dose_is_as_before():
    plain = configured("elu_pre")
    assert configured("elu_pre", branch_scale=1.0).name == plain.name
    assert configured("elu_pre", branch_scale=0.5).name != plain.name
