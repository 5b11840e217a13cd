"""`resdiag predict`: theory against one batch, and the critical learning rate against runs."""

import json
import math
from functools import cache

import pytest
import torch
from torch.nn import functional as F
from variant_conformance import VariantConformance

from resdiag.cli.main import app
from resdiag.data.augment import Augmenter
from resdiag.data.dataset import open_data
from resdiag.errors import UsageError
from resdiag.models.resnet import build_model
from resdiag.models.variants import VARIANTS
from resdiag.probe.critical_rate import critical_rate
from resdiag.probe.forecast import forecast

BATCH = 32


@cache
def digits(variant, depth, seed=0):
    return forecast(variant, depth, data="digits", batch_size=BATCH, seed=seed)


def survives(variant, depth, lr, seed=0, steps=20):
    """Whether loss and gradient of a plain training stay finite, and below 1e3 times the first."""
    data = open_data("digits")
    model = build_model(variant, depth, seed=seed)
    batches = Augmenter(data, BATCH, seed, augment=True)
    rule = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    first = math.nan
    for step in range(steps):
        images, labels = batches.batch(step)
        loss = F.cross_entropy(model(images), labels)
        first = loss.item() if step == 0 else first
        if not loss.item() < 1e3 * max(first, 1.0):
            return False
        rule.zero_grad()
        loss.backward()
        rule.step()
    return True


class TestBuiltInVariants(VariantConformance):
    @pytest.fixture(params=VARIANTS)
    def row(self, request):
        return VARIANTS[request.param]


def test_gradient_of_b_has_the_predicted_exponent():
    small, large = digits("b", 8).gradient_ratio, digits("b", 32).gradient_ratio
    measured, theory = (
        math.log(getattr(large, name) / getattr(small, name)) / 12
        for name in ("measured", "theory")
    )
    assert measured == pytest.approx(theory, rel=0.15)


@pytest.mark.parametrize("variant", ["a", "b"])
def test_critical_rate_of_theory_is_on_the_safe_side_by_less_than_a_factor_30(variant):
    for depth in (20, 32):
        pair = digits(variant, depth).critical_lr
        assert 1 / 30 <= pair.theory / pair.measured <= 1


@pytest.mark.parametrize("variant", ["a", "b"])
def test_runs_survive_at_half_the_measured_critical_rate_and_die_at_double(variant):
    rate = digits(variant, 20).critical_lr.measured
    assert survives(variant, 20, rate / 2)
    assert not survives(variant, 20, rate * 2, steps=40)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["a", "b"])
def test_runs_of_depth_56_survive_at_half_and_die_at_double(variant):
    rate = digits(variant, 56).critical_lr.measured
    assert survives(variant, 56, rate / 2)
    assert not survives(variant, 56, rate * 2)


def test_the_critical_rate_of_one_step_is_that_of_a_closed_form():
    # logits w x of one feature: along the gradient the loss is known
    model = torch.nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    x, label = torch.ones(1, 1), torch.tensor([0])
    assert critical_rate(model, x, label) == math.inf  # a step on one sample only helps
    # two samples with opposite labels: the loss is log(1 + e^2t) - t in the difference t
    both, labels = torch.ones(4, 1), torch.tensor([0, 0, 0, 1])
    rate = critical_rate(model, both, labels, momentum=0.0)
    loss = F.cross_entropy(model(both), labels)
    (g,) = torch.autograd.grad(loss, model.weight)
    after = F.cross_entropy(both @ (model.weight - rate * g).T, labels)
    assert after.item() == pytest.approx(1.5 * loss.item(), rel=0.03)
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[1.0], [-1.0]]))


def test_fate_follows_the_learning_rate():
    rate = digits("b", 8).critical_lr.measured
    fates = [
        forecast("b", 8, data="digits", batch_size=BATCH, lr=x * rate).fate for x in (0.4, 1.2, 2.1)
    ]
    assert fates == ["survives", "at_risk", "dies"]


def test_json_has_these_keys_and_no_nan(capsys):
    words = "predict --variant d --depth 8 --data digits --batch-size 8 --json"
    assert app.run(words.split()) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert list(document) == ["growth_per_block", "gradient_ratio", "critical_lr", "fate"]
    assert all(set(document[k]) == {"theory", "measured", "seeds"} for k in list(document)[:3])
    assert document["critical_lr"]["theory"] is None
    assert "critical_lr" in err
    assert document["critical_lr"]["measured"] > 0


def test_a_forecast_over_seeds_joins_those_of_each():
    options = {"data": "digits", "batch_size": 8, "width": 0.5, "branch_scale": 0.5}
    singles = [forecast("b", 8, seed=seed, **options) for seed in (3, 4)]
    found = forecast("b", 8, seed=3, seeds=2, **options)
    rates = [one.critical_lr.measured for one in singles]
    assert found.critical_lr.seeds == tuple(rates)
    assert found.critical_lr.measured == pytest.approx(math.sqrt(rates[0] * rates[1]))
    assert found.growth_per_block.theory == pytest.approx(
        math.sqrt(singles[0].growth_per_block.theory * singles[1].growth_per_block.theory)
    )
    between = math.sqrt(2) * min(rates) if max(rates) > 2.1 * min(rates) else 1.2 * min(rates)
    assert forecast("b", 8, seed=3, seeds=2, lr=between, **options).fate == "at_risk"
    assert forecast("b", 8, seed=3, seeds=2, lr=0.4 * min(rates), **options).fate == "survives"


def test_width_and_dose_reach_the_network_and_the_theory():
    plain = forecast("b", 20, data="digits", batch_size=8)
    small = forecast("b", 20, data="digits", batch_size=8, branch_scale=0.1, width=0.25)
    for pair in (plain.growth_per_block, small.growth_per_block):
        assert pair.measured == pytest.approx(pair.theory, rel=0.1)
    assert small.growth_per_block.theory < 1 < plain.growth_per_block.theory


@pytest.mark.parametrize(
    ("options", "named"),
    [({"lr": 0.0}, "lr"), ({"batch_size": 1}, "batch-size"), ({"lr": math.nan}, "lr")],
)
def test_wrong_numbers_are_refused(options, named):
    with pytest.raises(UsageError, match=named):
        forecast("b", 8, data="digits", **options)


@pytest.mark.parametrize("words", ["--variant elu_prr --depth 20", "--variant b --depth 21"])
def test_wrong_names_are_refused(words, capsys):
    assert app.run(["predict", *words.split()]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
