"""Interventions on the variants: what they change, what they do not, and what theory expects."""

import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_training import tiny_config, tiny_data, train

from resdiag.cli.main import app
from resdiag.errors import UsageError
from resdiag.interventions.arms import train_arm
from resdiag.interventions.compare import compare_arms, run_lesions
from resdiag.interventions.starts import VariantStart, last_checkpoint
from resdiag.interventions.table import (
    INTERVENTIONS,
    Intervention,
    VariantChange,
    find_for_variant,
    propose,
)
from resdiag.models.variants import VARIANTS
from resdiag.theory.prediction import predict


def config(variant, depth=20, **changes):
    plain = {"variant": VARIANTS[variant].id, "depth": depth, "batch_size": 16, "lr": 0.1}
    return tiny_config(**{**plain, "width": 1.0, **changes})


def run_arm(config, change=None, *, steps, checkpoint=None):
    """The result of an arm on the tiny data, and its weights at the end."""
    arm = VariantStart(config, tiny_data(), checkpoint).prepare(change)
    return train_arm(arm, steps), arm.model.state_dict()


def test_the_control_arm_is_the_plain_run_bit_for_bit(tmp_path):
    training, status, _ = train(tmp_path, steps=4)
    assert status == "done"
    _, weights = run_arm(tiny_config(steps=4), steps=4)
    trained = training.model.state_dict()
    assert trained.keys() == weights.keys()
    assert all(torch.equal(trained[name], value) for name, value in weights.items())


@pytest.mark.parametrize("variant", ["elu_nobn", "elu_pre"])
def test_normalisation_before_the_addition_removes_the_explosion(variant):
    (effect,) = run_lesions(
        config(variant), tiny_data(), ["bn_before_add"], claim="grows_at_init", seeds=2, steps=6
    )
    for old, new in zip(effect.control, effect.changed, strict=True):
        assert not old.survived
        assert new.survived
        assert "grows_at_init" in old.findings
        assert "grows_at_init" not in new.findings
        # BatchNorm's branch adds 1 to E[H^2]: the theory of d, whatever the branch was
        assert new.growth < old.growth
        assert new.batches[: len(old.batches)] == old.batches
    assert effect.confirmed
    assert effect.describe(0.1).endswith("confirmed")


def test_what_is_survived_is_not_thereby_cured():
    # a tenth of a tenth: b lives, and its signal grows as before
    gentle = config("elu_pre", lr=0.01)
    (effect,) = run_lesions(
        gentle, tiny_data(), ["lower_lr"], claim="grows_at_init", seeds=1, steps=3
    )
    assert all(arm.survived for arm in effect.changed)
    assert effect.changed[0].growth == effect.control[0].growth
    assert not effect.confirmed
    assert "still 'grows_at_init'" in effect.reason


@pytest.mark.parametrize("claim", ["", "grows_at_init", "exploded"])
def test_a_useless_remedy_is_not_confirmed(claim):
    useless = Intervention(
        name="nothing", words="doing nothing", expects="nothing", source="", variant=VariantChange()
    )
    start = VariantStart(config("elu_pre"), tiny_data())
    (effect,) = compare_arms([start], [useless], claim=claim, steps=5)
    assert effect.changed[0].losses == effect.control[0].losses
    assert not effect.confirmed
    assert "not confirmed (1 of 1 changed arms died)" in effect.describe(0.1)


def test_a_claim_that_the_control_does_not_show_is_not_cured():
    (effect,) = run_lesions(
        config("elu", depth=8), tiny_data(), ["lower_lr"], claim="exploded", seeds=1, steps=2
    )
    assert not effect.shown
    assert not effect.confirmed


def test_from_a_checkpoint_the_control_goes_on_as_the_run_did(tmp_path):
    long, _, _ = train(tmp_path / "long", steps=8)
    _, _, run = train(tmp_path / "short", steps=5)
    checkpoint = last_checkpoint(run)
    assert checkpoint.step == 5
    _, weights = run_arm(tiny_config(steps=8), steps=3, checkpoint=checkpoint)
    trained = long.model.state_dict()
    assert all(torch.equal(trained[name], value) for name, value in weights.items())


def test_from_a_checkpoint_the_changed_network_keeps_its_layers_and_momenta(tmp_path):
    _, _, run = train(tmp_path, variant="elu_after", steps=5)
    checkpoint = last_checkpoint(run)
    small = tiny_config(variant="elu_after")
    control, _ = run_arm(small, steps=1, checkpoint=checkpoint)
    for name, row in INTERVENTIONS.items():
        if row.changed_row(VARIANTS["elu_after"]) is None:
            continue
        if row.variant and row.variant.weights:
            with pytest.raises(UsageError, match="not those of a checkpoint"):
                run_arm(small, row, steps=1, checkpoint=checkpoint)
            continue
        arm, _ = run_arm(small, row, steps=1, checkpoint=checkpoint)
        assert arm.batches == control.batches
        if name in ("lower_lr", "freeze"):  # the same function until the first update
            assert arm.losses == control.losses
    # weights alone are not the start: momentum is
    kept = {k: v for k, v in checkpoint.tensors.items() if "momentum" not in k}
    without, _ = run_arm(small, steps=2, checkpoint=replace(checkpoint, tensors=kept))
    assert without.losses[0] == pytest.approx(control.losses[0])
    assert without.losses[1] != run_arm(small, steps=2, checkpoint=checkpoint)[0].losses[1]


def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path):
    _, status, run = train(tmp_path, variant="elu_nobn", depth=20, width=1.0, lr=0.1, steps=8)
    assert status == "diverged"
    with pytest.raises(UsageError, match="not finite"):
        last_checkpoint(run)


def test_removing_the_after_add_activation_of_c_restores_the_skip_path():
    (effect,) = run_lesions(config("elu_after"), tiny_data(), ["no_after_add"], seeds=1, steps=1)
    assert effect.changed[0].skip_gain == 1
    theory = predict("c", 20).skip_gain[-1]
    assert effect.control[0].skip_gain == pytest.approx(theory, rel=0.2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_lesion_runs_or_is_refused_on_every_variant(variant):
    small = config(variant, depth=8, width=0.25, batch_size=8, lr=0.001)
    control, before = run_arm(small, steps=2)
    for name in INTERVENTIONS:
        if INTERVENTIONS[name].changed_row(VARIANTS[variant]) is None:
            with pytest.raises(UsageError, match="nothing to change"):
                find_for_variant(name, variant)
            continue
        arm, after = run_arm(small, find_for_variant(name, variant), steps=2)
        assert arm.batches == control.batches
        assert math.isfinite(arm.losses[-1])
        same = after.keys() == before.keys() and all(
            torch.equal(value, before[key]) for key, value in after.items()
        )
        assert not same, name


def test_a_remedy_that_does_not_work_is_not_confirmed():
    (effect,) = run_lesions(config("elu_pre"), tiny_data(), ["warmup"], seeds=1, steps=12)
    assert not effect.control[0].survived
    assert not effect.confirmed
    assert effect.describe(0.1).endswith("not confirmed (1 of 1 changed arms died)")


def test_unknown_lesions_are_refused():
    with pytest.raises(UsageError, match="bn_before_add"):
        find_for_variant("bn_before_ad", "b")
    with pytest.raises(UsageError, match="nothing to change"):
        find_for_variant("no_after_add", "d")
    assert propose("skip_collapsed", "c") == ["no_after_add", "lower_lr", "warmup"]
    assert propose("healthy", "c") == []


def test_explain_proves_what_its_verdict_proposes(tmp_path, capsys):
    words = "run --variant b --depth 20 --data digits --batch-size 16 --steps 4 -q --json --runs"
    assert app.run([*words.split(), str(tmp_path)]) == 0
    folder = json.loads(capsys.readouterr().out)["run"]
    words = ["explain", folder, "--lesion", "--seeds", "1", "--lesion-steps", "6"]
    assert app.run([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    effects = {effect["name"]: effect for effect in document["lesions"]}
    assert document["verdict"]["name"] == "grows_at_init"
    assert effects["bn_before_add"]["confirmed"] is True
    assert list(effects) == [
        "bn_before_add", "skipinit", "swap_activation", "lower_lr", "tenth_branch",
    ]  # fmt: skip
    assert app.run([*words, "bn_before_add"]) == 0
    out = capsys.readouterr().out
    assert "inserting BN before the addition: growth per block" in out
    assert app.run([*words, "bn_before_ad"]) == 2
    assert app.run(["explain", folder, "bn_before_add"]) == 2
