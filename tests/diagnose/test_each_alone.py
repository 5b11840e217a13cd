"""Each rule alone: more of its evidence never silences it, and a healthy run never raises it.

A rule is tried on a healthy run of some blocks and steps into which its evidence is planted, from
strength 0, nothing, to strength 1, as much as can be.
"""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judged_runs import inventory_of, plant, run_of

from resdiag.diagnose.finding import Finding, NotJudged
from resdiag.diagnose.registry import FINDINGS
from resdiag.diagnose.rundata import RunData

LN10 = math.log(10)
CUT = "no gradient leads from the shortcut back to the block's input"
TO_COME: tuple[str, ...] = ()
"""Rules that have no entry in `EVIDENCE` yet, on purpose."""


def many(strength, low, high):
    """From `low` at strength 0 to `high` at 1, by equal factors."""
    return low * (high / low) ** strength


def in_block(metric, low, high, *, block=1, **fields):
    """One value of one block, at every step."""

    def make(strength, blocks, steps):
        change = lambda cell, _: cell(metric, many(strength, low, high), block=block)  # noqa: E731
        return run_of(change, count=blocks, steps=steps, **fields)

    return make


def in_curve(name, value):
    """A column of the step table, a function of the strength."""

    def make(strength, blocks, steps):
        def change(cell, curve):
            curve[name] = value(strength)

        return run_of(change, count=blocks, steps=steps)

    return make


def of_change(make_change, **fields):
    """What `make_change(strength, blocks, cell, curve)` does to a healthy run."""

    def make(strength, blocks, steps):
        change = lambda cell, curve: make_change(strength, blocks, cell, curve)  # noqa: E731
        return run_of(change, count=blocks, steps=steps, **fields)

    return make


def rows(blocks, **fields):
    return [{**row, **fields} for row in run_of(count=blocks).blocks]


def fp16(strength, blocks, steps):
    def overflow(cell, curve):
        cell("output_channel_std", many(strength, 1.0, 1e4), step=slice(5, 7))
        cell("sum_nonfinite", 0.1, step=7, block=2)

    return run_of(overflow, steps=steps, blocks=rows(blocks, dtype="float16"), count=blocks)


def cut_shortcuts(strength, blocks, steps):
    cut = list(range(round(strength * blocks)))
    missing = [{"metric": "shortcut_share", "blocks": cut, "reason": CUT}]
    return run_of(count=blocks, steps=steps, unavailable=missing if cut else [])


def cut_branches(strength, blocks, cell, curve):
    for block in range(round(strength * blocks)):
        cell("shortcut_share", 1.0, block=block)
        cell("grad_param", math.nan, block=block)


def enlarge(strength, blocks, cell, curve):
    cell("branch_ratio", many(strength, 0.5, 5e4), block=1)
    cell("branch_channel_std", many(strength, 1.0, 1e5), block=1)


def scale_shortcut(strength, blocks, cell, curve):
    factor = 1 + 2 * strength
    cell("shortcut_channel_std", factor, block=1)
    cell("shortcut_channel_mean_rms", 0.1 * factor, block=1)
    for q, value in ((10, -0.1), (50, 0.02), (90, 0.15)):
        cell(f"shortcut_mean_q{q}", factor * value, block=1)


def lack_norms(strength, blocks, steps):
    described = rows(blocks)
    for row in described[: int(strength * blocks / 2)]:
        row["branch"] = ["conv2d", "relu", "conv2d"]
    return run_of(count=blocks, steps=steps, blocks=described)


def vanish(strength, blocks, cell, curve):
    for block in range(blocks):
        cell("grad_input", 10 ** (-3 * strength * (blocks - block)), block=block)
        cell("grad_output", 10 ** (-3 * strength * (blocks - block - 1)), block=block)


def freeze(strength, blocks, cell, curve):
    cell("update_ratio", 1e-3 * (1 - strength), block=1)


def saturate(strength, blocks, steps):
    change = lambda cell, _: cell("saturated_fraction", 0.5 + strength / 2, block=1)  # noqa: E731
    described = rows(blocks, branch=["linear", "tanh", "linear"])
    return run_of(change, steps=steps, count=blocks, blocks=described)


def worsen(strength, blocks, cell, curve):
    curve["loss"] = np.linspace(2.3, 2.3 * (1 + 10 * strength), len(curve))
    cell("update_ratio", 0.01)


def stand_still(strength, blocks, cell, curve):
    curve["loss"], curve["weight_decay"] = 2.9, 0.0
    cell("update_ratio", many(strength, 1e-3, 1e-9))


def jump(strength, blocks, cell, curve):
    curve.loc[9, "grad_norm"] = many(strength, 1.0, 1e6)


def drift(strength, blocks, cell, curve):
    curve["loss"], last = 2.1, curve["step"].max()
    cell("output_channel_mean_rms", 0.1 + 5 * strength, step=last)
    cell("branch_mean", 0.05 + strength, step=last)


def guess(strength, blocks, cell, curve):
    curve["loss"] = LN10 * (0.5 + strength / 2)
    cell("update_ratio", 0.01)


def risk(strength, blocks, steps):
    return plant("elu", steps=30, lr=many(strength, 0.01, 10.0))


def overfit(strength, blocks, steps):
    def evaluate(cell, curve):
        test, train = np.full(120, math.nan), np.full(120, math.nan)
        test[9::10] = [2.0, 1.5, 1.0, *[1 + 4 * strength] * 9]
        train[9::10] = [2.0, 1.0, 0.5, *[0.01] * 9]
        curve["test_loss"], curve["train_loss"] = test, train

    return run_of(evaluate, count=blocks, steps=120)


def explode_at_init(strength, blocks, cell, curve):
    curve.loc[0, "loss"] = 2.3 * (1 + 9 * strength)


def taken(make_part):
    """A run whose inventory has what `make_part(strength, blocks)` gives."""

    def make(strength, blocks, steps):
        parts = make_part(strength, blocks)
        return run_of(count=blocks, steps=steps, inventory=inventory_of(blocks, steps, **parts))

    return make


def unhold(strength, blocks):
    missing = round(strength * 4 * blocks)
    about = inventory_of(blocks)["parameters"] | {"unheld": missing, "names": ["w"] * missing}
    return {"parameters": about}


def evaluate_while_training(strength, blocks):
    count = round(20 * strength)
    event = {"count": count, "first": 0, "last": count}
    return {"events": {"update_in_evaluation": event} if count else {}}


def late(strength, curve, before, after):
    """A column that changes for the last steps, a share `strength` of all."""
    count = round(strength * len(curve))
    return [before] * (len(curve) - count) + [after] * count


def keep_gradients(strength, blocks, cell, curve):
    curve["grad_kept"] = late(strength, curve, 0.0, 0.5)


def stop_rate(strength, blocks, cell, curve):
    curve["lr"] = late(0.9 * strength, curve, 0.1, 0.0)


def skip_steps(strength, blocks, cell, curve):
    curve["lr"] = late(strength, curve, 0.1, math.nan)
    curve["grad_norm"] = late(strength, curve, 1.0, math.inf)


def cut_output(strength, blocks, steps):
    count = round(strength * steps)

    def change(cell, curve):
        for block in range(2 if count else 0):
            for name in ("grad_param", "grad_output"):
                cell(name, math.nan, block=block, step=slice(steps - count, steps - 1))

    wants = inventory_of(blocks, steps, trainable=[1.0] * blocks)
    return run_of(change, count=blocks, steps=steps, inventory=wants)


def group_rates(strength, blocks):
    one = inventory_of(blocks)["groups"][0]
    rate = many(strength, 0.1, 1e3)
    return {"groups": [one, one | {"lr": rate, "highest": rate, "size": 1}]}


def drop_shortcuts(strength, blocks, steps):
    described = rows(blocks)
    for row in described[: round(strength * blocks)]:
        row["shortcut_path"] = ["dropout"]
    return run_of(count=blocks, steps=steps, blocks=described)


def widen_epsilon(strength, blocks):
    norms = inventory_of(blocks)["normalisations"]
    eps = many(strength, 1e-5, 1e3)
    return {"normalisations": [norms[0] | {"eps": eps}, *norms[1:]]}


def sharpen(strength, blocks):
    one = {"name": "a", "block": 0, "entropy": many(strength, 1.0, 1e-4), "spread": 9.0}
    return {"attentions": [one], "later_attentions": [one]}


def grow_logits(strength, blocks, cell, curve):
    for step, value in zip(
        curve["step"], np.geomspace(1.5, many(strength, 1.5, 1e5), len(curve)), strict=True
    ):
        cell("attention_logit", value, step=step, block=0)


def neglect_experts(strength, blocks, cell, curve):
    cell("expert_entropy", 1 - strength, step=slice(10, None), block=1)
    cell("expert_tokens", 100.0, block=1)


def enlarge_a_gradient(strength, blocks, cell, curve):
    cell("moment_second", 0.01)
    cell("moment_second", many(strength, 0.01, 10.0), step=slice(20, None))
    cell("moment_mismatch", 1.0)
    cell("moment_mismatch", many(strength, 1.0, 1e-3), step=slice(21, None))


def lose_skips(strength, blocks):
    lost = range(round(strength * 3))
    return {"lacking": [{"name": f"b{i}", "block": i, "like": blocks} for i in lost]}


def make_constant(strength, blocks):
    same = range(round(strength * 2 * blocks))
    return {"constant": [{"name": f"b{i // 2}.w", "block": i // 2} for i in same]}


EVIDENCE = {
    "optimizer_mismatch": taken(unhold),
    "eval_mode": taken(evaluate_while_training),
    "gradients_not_zeroed": of_change(keep_gradients),
    "steps_skipped": of_change(skip_steps),
    "detached_output": cut_output,
    "missing_skip": taken(lose_skips),
    "dropout_on_skip": drop_shortcuts,
    "symmetric_units": taken(make_constant),
    "norm_fault": taken(widen_epsilon),
    "attention_logits_grow": of_change(grow_logits),
    "attention_collapsed": taken(sharpen),
    "router_collapsed": of_change(neglect_experts),
    "second_moment_stale": of_change(enlarge_a_gradient),
    "lr_schedule": of_change(stop_rate),
    "group_lr": taken(group_rates),
    "data_fault": in_curve("data_std", lambda s: many(s, 1.0, 1e4)),
    "loss_fault": in_curve("head_loss", lambda s: 2.3 * (1 - 2 * s)),
    "fp16_overflow": fp16,
    "detached_shortcut": cut_shortcuts,
    "detached_branch": of_change(cut_branches),
    "shortcut_scaled": of_change(scale_shortcut),
    "branch_too_large": of_change(enlarge),
    "missing_norm": lack_norms,
    "bias_shift": in_block("output_channel_mean_rms", 0.1, 1e3),
    "grows_at_init": of_change(explode_at_init),
    "vanishing": of_change(vanish),
    "frozen_block": of_change(freeze),
    "dead_block": in_block("branch_channel_std", 1.0, 1e-8),
    "saturated_block": saturate,
    "weight_decay_too_large": in_curve("weight_decay", lambda s: many(s, 1e-4, 1e2)),
    "lr_too_high": of_change(worsen),
    "lr_too_low": of_change(stand_still),
    "exploded": of_change(jump),
    "skip_collapsed": of_change(lambda s, _, cell, curve: cell("skip_gain", many(s, 1.0, 1e-3))),
    "drift": of_change(drift),
    "stalled": of_change(guess),
    "at_risk": risk,
    "overfit": overfit,
}


def finds(name, run):
    seen = run if isinstance(run, RunData) else RunData(run)
    return any(isinstance(outcome, Finding) for outcome in FINDINGS[name].judge(seen))


@pytest.mark.parametrize("name", FINDINGS)
def test_every_rule_has_its_evidence(name):
    assert (name in EVIDENCE) != (name in TO_COME), f"enter {name} into EVIDENCE"


@functools.cache
def ill(name):
    """With all the evidence that can be; no test changes it."""
    return EVIDENCE[name](1.0, 6, 60)


@pytest.mark.parametrize("name", EVIDENCE)
def test_all_evidence_raises_a_rule_and_none_does_not(name):
    assert finds(name, ill(name))
    assert not finds(name, EVIDENCE[name](0.0, 6, 60))


@pytest.mark.parametrize("name", EVIDENCE)
@settings(max_examples=4)
@given(
    strengths=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    blocks=st.integers(4, 12),
    steps=st.integers(52, 80),
)
def test_more_evidence_never_silences_a_rule(name, strengths, blocks, steps):
    less, more = (finds(name, EVIDENCE[name](s, blocks, steps)) for s in sorted(strengths))
    assert more or not less


@pytest.mark.parametrize("name", EVIDENCE)
def test_without_its_data_a_rule_is_silent_and_its_check_does_not_count(name):
    whole, rule = ill(name), FINDINGS[name]
    for need in rule.needs:
        gone = ["loss", "head_loss"] if need == "loss" else [need]
        run = replace(
            whole,
            metrics_frame=whole.metrics_frame.drop(columns=gone, errors="ignore"),
            curve_frame=whole.curve_frame.drop(columns=gone, errors="ignore"),
            blocks=[] if need == "blocks" else whole.blocks,
            inventory={} if need == "inventory" else whole.inventory,
        )
        seen = RunData(run)
        said = list(rule.judge(seen))
        open_question = any(isinstance(outcome, NotJudged) for outcome in said)
        assert open_question or not seen.has(need) or need == "unavailable"
    empty = replace(
        whole, metrics_frame=whole.metrics_frame[:0], curve_frame=whole.curve_frame[:0], blocks=[],
        unavailable=[], inventory={},
    )  # fmt: skip
    said = list(rule.judge(RunData(empty)))
    assert said
    assert all(isinstance(outcome, NotJudged) for outcome in said)


@pytest.mark.parametrize(("blocks", "steps"), [(2, 20), (3, 200), (24, 60)])
def test_no_rule_is_raised_by_a_healthy_run(blocks, steps):
    healthy = RunData(run_of(count=blocks, steps=steps))
    assert [name for name in FINDINGS if finds(name, healthy)] == []
