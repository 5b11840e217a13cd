import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resdiag.errors import UsageError
from resdiag.models.variants import VARIANTS
from resdiag.runs.config import RunConfig
from resdiag.training.recipe import RECIPES, Recipe, Request, learning_rate, resolve

CIFAR = {"data_name": "cifar10", "train_size": 50_000}


def plan(**asked):
    where = {name: asked.pop(name) for name in CIFAR if name in asked}
    return resolve(Request(**{"variant": "elu", "depth": 20, **asked}), **{**CIFAR, **where})


def test_the_paper_trains_164_epochs_of_391_steps():
    config = plan(recipe="paper")
    assert config.batch_size == 128
    assert config.steps == 164 * 391 == 164 * math.ceil(50_000 / 128)
    assert config.milestones == (81 * 391, 122 * 391)
    assert (config.lr, config.gamma, config.momentum) == (0.1, 0.1, 0.9)
    assert (config.nesterov, config.weight_decay) == (True, 1e-4)
    assert config.eval_every == 391
    assert config.augment


@pytest.mark.parametrize("epochs", [1, 10, 82, 200])
def test_milestones_scale_with_the_epochs(epochs):
    config = plan(recipe="paper", epochs=epochs)
    assert config.steps == epochs * 391
    for milestone, epoch in zip(config.milestones, (81, 122), strict=True):
        assert abs(milestone - epoch / 164 * epochs * 391) <= 0.5


def test_the_short_recipe_is_60_steps_at_the_papers_rate_without_milestones():
    config = plan()
    assert (config.recipe, config.steps, config.milestones) == ("short", 60, ())
    assert {learning_rate(config, step) for step in range(60)} == {0.1}
    assert config.eval_every == 0
    recorded = [s for s in range(60) if s < config.record_first or s % config.every == 0]
    assert recorded[:20] == list(range(20))
    assert recorded[-1] == 55


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 1437, 50_000])
def test_an_epoch_keeps_its_last_partial_batch(size):
    config = plan(recipe="paper", epochs=3, train_size=size)
    assert config.steps == 3 * math.ceil(size / 128)
    assert config.commit_every <= 100


def test_a_letter_and_its_id_are_the_same_run():
    assert plan(variant="d") == plan(variant="elu")


def test_what_was_asked_for_wins_over_the_recipe():
    asked = {
        "lr": 0.0, "batch_size": 7, "steps": 9, "every": 3, "record_first": 0, "commit_every": 2,
        "warmup": 4, "seed": 5, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0,
        "augment": False, "width": 0.25, "stem_bn": True, "device": "cuda:1", "dtype": "bfloat16",
    }  # fmt: skip
    config = plan(**asked)
    assert {name: getattr(config, name) for name in asked} == asked


def test_every_field_of_a_request_reaches_the_config_or_decides_it():
    consumed = {"epochs"}
    names = {field.name for field in fields(Request)} - consumed
    assert names <= {field.name for field in fields(RunConfig)}


def test_recipes_know_their_source():
    assert list(RECIPES) == ["short", "paper"]
    assert all(isinstance(recipe, Recipe) and recipe.source for recipe in RECIPES.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_variants_can_be_asked_for(variant):
    assert plan(variant=variant).variant == variant


BAD = [
    ({"variant": "elu_prr"}, "did you mean 'elu_pre'"),
    ({"variant": ""}, "unknown variant"),
    ({"depth": 57}, "nearest: 56, 62"),
    ({"depth": 2}, "nearest: 8"),
    ({"depth": -4}, "not 6n"),
    ({"recipe": "papper"}, "did you mean 'paper'"),
    ({"dtype": "float16"}, "unknown dtype"),
    ({"steps": 3, "epochs": 1}, "exclude each other"),
    ({"steps": 0}, "--steps 0 must be at least 1"),
    ({"steps": 2**63}, "--steps .* too large"),
    ({"epochs": 0}, "--epochs 0"),
    ({"batch_size": 1}, "--batch-size 1 must be at least 2"),
    ({"lr": -1.0}, "--lr -1.0"),
    ({"lr": math.nan}, "--lr nan"),
    ({"lr": math.inf}, "--lr inf"),
    ({"width": 0.0}, "width"),
    ({"width": math.nan}, "width"),
    ({"width": math.inf}, "width"),
    ({"width": 1e9}, "width"),
    ({"momentum": -0.1}, "--momentum"),
    ({"momentum": math.inf}, "--momentum"),
    ({"weight_decay": -1e-4}, "--weight-decay"),
    ({"weight_decay": math.nan}, "--weight-decay"),
    ({"warmup": -1}, "--warmup"),
    ({"seed": -1}, "--seed"),
    ({"seed": 2**64}, "--seed .* too large"),
    ({"every": 0}, "--every 0"),
    ({"record_first": -1}, "--record-first"),
    ({"commit_every": 0}, "--commit-every"),
]


@pytest.mark.parametrize(("asked", "message"), BAD, ids=[str(asked) for asked, _ in BAD])
def test_a_bad_value_is_refused_in_one_line_before_the_data_is_read(asked, message):
    request = Request(**{"variant": "elu", "depth": 20, **asked})
    with pytest.raises(UsageError, match=message) as caught:
        request.check()
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match=message):
        resolve(request, **CIFAR)


configs = st.builds(
    lambda steps, warmup, lr, gamma, cuts: replace(
        plan(steps=steps),
        lr=lr,
        gamma=gamma,
        warmup=warmup,
        milestones=tuple(sorted(cuts)),
    ),
    st.integers(1, 500),
    st.integers(0, 50),
    st.floats(0, 10),
    st.floats(0, 1),
    st.lists(st.integers(1, 500), max_size=4, unique=True),
)


@settings(max_examples=60)
@given(configs)
def test_the_rate_is_the_warm_up_and_then_falls_by_gamma_at_each_milestone(config):
    rates = [learning_rate(config, step) for step in range(config.steps)]
    assert rates[: config.warmup] == [config.warmup_lr] * min(config.warmup, config.steps)
    rest = rates[config.warmup :]
    assert all(a >= b for a, b in pairwise(rest))
    for step in range(config.warmup, config.steps):
        passed = len([m for m in config.milestones if m <= step])
        expected = config.lr * math.prod([config.gamma] * passed)
        assert rates[step] == pytest.approx(expected, rel=1e-12)
        if step + 1 < config.steps and step + 1 not in config.milestones:
            assert rates[step + 1] == rates[step]


@given(st.integers(1, 10**6), st.integers(1, 10**5), st.integers(2, 512))
def test_the_first_step_has_the_full_rate_and_nothing_is_beyond_the_end(steps, size, batch):
    config = plan(recipe="paper", steps=steps, train_size=size, batch_size=batch)
    assert learning_rate(config, 0) == 0.1
    assert all(1 <= milestone <= max(1, steps) for milestone in config.milestones)
    assert list(config.milestones) == sorted(config.milestones)
