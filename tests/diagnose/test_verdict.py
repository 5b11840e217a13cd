"""Verdicts on planted runs: every pathology is named, healthy controls stay so, nothing raises."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from judged_runs import blocks_of, plant

from resdiag.catalog.table import RECORDED, RECORDED_PER_STEP
from resdiag.diagnose.finding import plain
from resdiag.diagnose.nonfinite import find_first_nonfinite
from resdiag.diagnose.registry import FINDINGS, HEALTHY, UNDETERMINED
from resdiag.diagnose.text import render
from resdiag.diagnose.verdict import judge
from resdiag.models.variants import VARIANTS
from resdiag.runs.folder import Run
from resdiag.theory.prediction import predict

LN10 = math.log(10)
NORMALISED = ("original", "elu_after", "elu", "no_relu", "relu_pre")


def fake(metrics, curve, *, variant="elu", **fields):
    """A run whose tables are given as they are: `Run` refuses some of what is tried here."""
    config = SimpleNamespace(variant=variant, depth=20, lr=0.1, momentum=0.9, steps=30)
    plain = {"blocks": [], "data": {}, "status": "done", "steps": 30, "path": Path()}
    fields = plain | {"unavailable": [], "notes": (), "inventory": {}} | fields
    return SimpleNamespace(config=config, metrics=lambda: metrics, curve=lambda: curve, **fields)


def at(metrics, step, block=None):
    """Rows of a step, of one block or from it on."""
    rows = metrics["step"] == step
    return rows if block is None else rows & (metrics["block"] == block)


# --- healthy controls ------------------------------------------------------------------------


@pytest.mark.parametrize("variant", NORMALISED)
@pytest.mark.parametrize("depth", [8, 14, 20, 32, 56, 110])
def test_a_normalised_network_that_learns_is_healthy(variant, depth):
    verdict = judge(plant(variant, depth))
    assert (verdict.name, verdict.findings) == ("healthy", ())


@pytest.mark.parametrize("depth", [8, 14])
def test_networks_too_shallow_to_judge_growth_say_so(depth):
    assert any(
        "growth at initialisation" in reason for reason in judge(plant(depth=depth)).not_judged
    )


def test_a_plain_network_is_not_blamed_for_a_skip_path_it_does_not_have():
    verdict = judge(plant("plain", blocks=blocks_of(20, "none")))
    assert verdict.name == "healthy"
    assert "skip_collapsed: the network has no shortcuts" in verdict.not_judged


# --- growth at initialisation ----------------------------------------------------------------


def no_better_than_guessing(metrics, curve):
    curve["loss"] = LN10


@pytest.mark.parametrize("variant", ["elu_nobn", "elu_pre", "relu_nobn"])
@pytest.mark.parametrize("depth", [20, 56, 110])
def test_un_normalised_sums_have_grows_at_init(variant, depth):
    theory = predict(variant, depth)
    verdict = judge(plant(variant, depth, change=no_better_than_guessing))
    assert (verdict.name, verdict.step, verdict.block) == ("grows_at_init", 0, 0)
    growth = [item for item in verdict.evidence if item.metric == "output_second_moment"]
    assert len(growth) == 3
    assert all(item.value >= item.threshold == 1.4 for item in growth)
    assert f"(theory: {theory.growth_per_block:.2f})" in verdict.why
    assert any(
        f"--variant {'no_relu' if variant == 'relu_nobn' else 'elu'} " in line
        for line in verdict.next
    )


def test_growth_at_init_that_did_not_keep_the_run_from_learning_is_only_a_condition():
    verdict = judge(plant("elu_pre", 20))
    assert verdict.name == "healthy"
    assert [finding.name for finding in verdict.findings] == ["grows_at_init"]
    assert "learns although grows_at_init" in verdict.summary
    assert not [line for line in verdict.next if "--lr" in line]


def test_growth_at_init_is_the_cause_of_the_explosion_that_follows():
    def explode(metrics, curve):
        curve.loc[3:, ["loss", "grad_norm"]] = math.nan
        rows = at(metrics, 3) & (metrics["block"] >= 5)
        metrics.loc[rows, ["branch_nonfinite", "output_nonfinite"]] = 0.5

    verdict = judge(plant("elu_pre", 56, steps=6, change=explode))
    assert (verdict.name, verdict.step) == ("grows_at_init", 0)
    assert [finding.name for finding in verdict.findings] == ["grows_at_init", "exploded"]
    assert "grows 1.83 times per block" in verdict.why
    assert "grows 1.83 times per block at step 0" in verdict.summary
    assert "non-finite at step 3, forward in block 5 (stages.0.5)" in verdict.summary
    assert any((item.step, item.block) == (3, 5) for item in verdict.evidence)


@pytest.mark.parametrize("loss", [3.01 * LN10, math.inf, math.nan])
def test_a_large_loss_at_step_0_is_enough(loss):
    def lift(metrics, curve):
        curve["loss"] = LN10
        curve.loc[0, "loss"] = loss

    verdict = judge(plant(change=lift))
    assert (verdict.name, verdict.block) == ("grows_at_init", None)


def test_a_block_that_is_broken_at_step_0_has_exploded_and_not_grown():
    def break_down(metrics, curve):
        metrics.loc[metrics["block"] >= 4, ["branch_nonfinite", "output_nonfinite"]] = 1.0
        curve[["loss", "grad_norm"]] = math.nan

    verdict = judge(plant(change=break_down))
    assert (verdict.name, verdict.step, verdict.block) == ("exploded", 0, 4)
    assert "grows_at_init" not in {finding.name for finding in verdict.findings}


def test_growth_in_one_stage_only_is_healthy():
    def grow(metrics, curve):
        factor = 2.0 ** (metrics["block"].clip(upper=5) / 2)
        metrics["output_channel_std"] = factor

    assert judge(plant("elu", 38, change=grow)).name == "healthy"


def test_a_short_normalised_network_whose_first_stages_start_steeply_is_healthy():
    def grow(metrics, curve):  # as measured on relu_pre at depth 20
        moments = [1.4, 2.2, 3.4, 2.2, 3.3, 4.5, 3.3, 4.2, 5.3]
        metrics["output_channel_std"] = np.sqrt(np.tile(moments, 30))

    run = plant("relu_pre", 20, change=grow)
    assert judge(run).name == "healthy"


# --- exploded later --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", ["loss", "grad_norm"])
def test_a_non_finite_number_in_the_curve_is_an_explosion(value, column):
    def explode(metrics, curve):
        curve.loc[7:, column] = value

    verdict = judge(plant(change=explode))
    assert (verdict.name, verdict.step) == ("exploded", 7)


def test_a_missing_gradient_norm_of_an_unrecorded_step_is_no_explosion():
    def thin(metrics, curve):
        curve.loc[curve["step"] % 10 > 0, "grad_norm"] = math.nan

    run = plant(change=thin)
    recorded = run.metrics_frame[run.metrics_frame["step"] % 10 == 0]
    assert judge(Run(**{**vars(run), "metrics_frame": recorded})).name == "healthy"


def test_the_first_block_whose_activation_breaks_is_named():
    def explode(metrics, curve):
        rows = at(metrics, 9) & metrics["block"].isin([4, 5, 6, 7, 8])
        metrics.loc[rows, "output_nonfinite"] = 1.0
        metrics.loc[at(metrics, 9), "grad_nonfinite"] = 1.0

    verdict = judge(plant(change=explode))
    assert (verdict.name, verdict.step, verdict.block) == ("exploded", 9, 4)
    assert "forward in block 4 (stages.1.1)" in verdict.summary


def test_gradients_break_in_backward_order_if_the_forward_pass_is_finite():
    def explode(metrics, curve):
        rows = at(metrics, 9) & metrics["block"].isin([0, 1, 2, 3])
        metrics.loc[rows, "grad_nonfinite"] = 1.0

    run = plant(change=explode)
    verdict = judge(run)
    assert (verdict.name, verdict.step, verdict.block) == ("exploded", 9, 3)
    assert "backward" in verdict.summary
    assert find_first_nonfinite(run.metrics()).direction == "backward"
    assert "all activations were finite" in verdict.why

    def explode_unseen(metrics, curve):
        explode(metrics, curve)
        metrics.loc[at(metrics, 9) & (metrics["block"] == 5), "output_nonfinite"] = math.nan

    why = judge(plant(change=explode_unseen)).why
    assert "of the activations that are known at that step none was non-finite" in why


def test_a_jump_of_the_gradient_is_an_explosion_after_five_norms():
    def jump(at_step):
        def change(metrics, curve):
            curve.loc[at_step, "grad_norm"] = 2.01e3

        return judge(plant(change=change))

    assert (jump(5).name, jump(5).step) == ("exploded", 5)
    assert "exploded" not in [finding.name for finding in jump(4).findings]


# --- collapse, stall, risk -------------------------------------------------------------------


def test_a_collapsed_skip_path_is_named_with_the_step_since_when():
    def collapse(metrics, curve):
        late = metrics["step"] >= 12
        metrics.loc[late & (metrics["block"] >= 6), "skip_gain"] = 0.02

    verdict = judge(plant("elu_after", change=collapse))
    assert (verdict.name, verdict.step, verdict.block) == ("skip_collapsed", 12, 6)
    assert "theory at initialisation" in verdict.why


def test_a_gradient_that_does_not_reach_the_first_block_is_a_collapse():
    def vanish(metrics, curve):
        metrics.loc[metrics["block"] == 0, "grad_input"] = 0.29

    assert judge(plant(change=vanish)).name == "skip_collapsed"


def test_a_collapse_that_was_over_at_the_end_is_none():
    def collapse(metrics, curve):
        metrics.loc[at(metrics, 12), "skip_gain"] = 0.02

    assert judge(plant("elu_after", change=collapse)).name == "healthy"


@pytest.mark.parametrize(
    ("factor", "name"),
    [
        (1.24, "stalled"),
        (1.019, "stalled"),
        (0.981, "stalled"),
        (0.97, "healthy"),
        (1.3, "undetermined"),
    ],
)
def test_a_loss_at_ln_k_for_an_epoch_is_a_stall(factor, name):
    def stall(metrics, curve):
        curve["epoch"] = curve["step"] / 50
        curve["loss"] = factor * LN10
        metrics["update_ratio"] = 3e-3

    assert judge(plant(steps=100, change=stall)).name == name


def test_epochs_of_few_steps_are_no_evidence_of_a_stall():
    def stall(metrics, curve):
        curve["epoch"], curve["loss"] = curve["step"] / 10, LN10
        metrics["update_ratio"] = 1e-2

    assert judge(plant(steps=30, change=stall)).name == "undetermined"
    assert judge(plant(steps=50, change=stall)).name == "stalled"


@pytest.mark.parametrize(("size", "name"), [(1.9e-3, "undetermined"), (2.1e-3, "stalled")])
def test_weights_that_have_hardly_moved_have_not_stalled(size, name):
    def stall(metrics, curve):
        curve["loss"] = LN10
        metrics["update_ratio"] = size  # 50 steps of 2e-3 are a tenth of the weights

    assert judge(plant(steps=50, change=stall)).name == name
    assert judge(plant(steps=1000, change=stall)).name == "stalled"


@pytest.mark.parametrize(("noise", "name"), [(0.02, "stalled"), (0.3, "undetermined")])
def test_noise_in_which_a_fall_may_hide_is_no_stall(noise, name):
    def stall(metrics, curve):
        curve["loss"] = LN10 + noise * (-1.0) ** curve["step"]
        metrics["update_ratio"] = 1e-2

    assert judge(plant(steps=60, change=stall)).name == name
    assert judge(plant(steps=3000, change=stall)).name == "stalled"


def test_a_run_of_few_steps_is_not_judged_for_a_stall():
    def stall(metrics, curve):
        curve["loss"] = LN10
        metrics["update_ratio"] = 3e-3

    verdict = judge(plant(steps=49, change=stall))
    assert verdict.name == "undetermined"
    assert any(reason.startswith("stalled: 49 steps") for reason in verdict.not_judged)
    assert judge(plant(steps=50, change=stall)).name == "stalled"


def test_a_loss_near_ln_k_that_falls_is_no_stall():
    def fall(metrics, curve):
        curve["loss"] = LN10 * (1.01 - 0.0006 * curve["step"])
        metrics["update_ratio"] = 3e-3

    assert judge(plant(steps=50, change=fall)).name == "undetermined"


def test_a_large_first_step_is_a_risk_and_the_suggested_lr_is_below_critical():
    verdict = judge(plant(lr=0.3))
    assert verdict.name == "at_risk"
    assert "survived 30 steps" in verdict.why
    (suggested,) = [
        float(line.split("--lr ")[1].split()[0]) for line in verdict.next if "--lr" in line
    ]
    assert suggested * 2.0 < 0.6
    assert judge(plant(lr=0.299)).name == "healthy"


def test_a_run_that_lived_on_has_refuted_the_risk():
    assert judge(plant(lr=0.3, steps=49)).name == "at_risk"
    assert judge(plant(lr=0.3, steps=50)).name == "healthy"


def test_every_rule_that_fired_is_kept_and_the_most_upstream_one_names_the_run():
    def spoil(metrics, curve):
        curve["loss"], curve["weight_decay"] = LN10, 0.03
        metrics["skip_gain"], metrics["update_ratio"] = 0.01, 3e-3

    verdict = judge(plant("elu_after", lr=0.5, steps=60, change=spoil))
    names = [finding.name for finding in verdict.findings]
    assert names == ["weight_decay_too_large", "skip_collapsed", "stalled"]
    assert verdict.name == names[0]


# --- what is missing is said -----------------------------------------------------------------


def test_a_run_stopped_early_says_what_it_has_not_seen():
    stopped = plant(steps=30, status="stopped")
    rest = "the rest of the run: it is at step 12 of 30 (stopped)"
    assert judge(Run(**{**vars(stopped), "steps": 12})).not_judged[-1] == rest
    assert not any(reason.startswith("the rest") for reason in judge(stopped).not_judged)


def test_a_run_that_was_stopped_is_not_called_healthy():
    whole = plant(lr=0.3, steps=50)
    assert judge(whole).name == "healthy"
    part = judge(replace(whole, status="stopped", steps=40))
    assert part.name == "undetermined"
    assert "the run was stopped at step 40 of 50" in part.why
    assert judge(replace(whole, status="stopped")).name == "healthy"  # in its last step


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("skip_gain", "skip gain"),
        ("grad_input", "gradient ratio"),
        ("output_channel_std", "growth"),
    ],
)
def test_a_missing_column_is_said_and_never_raises(column, words):
    def drop(metrics, curve):
        del metrics[column]

    verdict = judge(plant(change=drop))
    assert verdict.name == "healthy"
    assert any(words in reason for reason in verdict.not_judged)


def test_an_empty_run_is_judged_to_be_unjudged():
    empty = fake(pd.DataFrame(), pd.DataFrame())
    verdict = judge(empty)
    assert verdict.name == "undetermined"
    of_others = [row for row in FINDINGS.values() if "inventory" in row.needs]
    of_others.append(FINDINGS["detached_output"])  # it needs to know what requires gradients
    # resdiag's own networks have neither attention nor experts, and record no moments
    of_others += map(FINDINGS.get, ("attention_logits_grow", "router_collapsed"))
    of_others.append(FINDINGS["second_moment_stale"])
    assert verdict.checks == (0, len(FINDINGS) - len(of_others))
    assert "no steps were recorded" in verdict.why
    assert "the loss is not known" in verdict.why
    assert {reason.split(":")[0] for reason in verdict.not_judged} >= set(FINDINGS)


def test_an_unknown_network_is_judged_without_theory():
    run = plant("elu_pre", 56, change=no_better_than_guessing)
    config = plant().config
    object.__setattr__(config, "variant", "torchvision:resnet50")
    verdict = judge(Run(**{**vars(run), "config": config}))
    assert verdict.name == "grows_at_init"
    assert "by theory" not in verdict.why
    assert not [line for line in verdict.next if line.startswith("resdiag run")]


# --- first non-finite number -----------------------------------------------------------------


def frame(**columns):
    return pd.DataFrame({"step": [0, 0, 1, 1], "block": [0, 1, 0, 1], **columns})


def test_the_first_nonfinite_is_the_earliest_step_then_forward_then_block_then_site():
    found = find_first_nonfinite(
        frame(
            branch_nonfinite=[0, 0, 0, 0.1], output_nonfinite=[0, 0, 0, 1],
            sum_nonfinite=[0, 0, 0, 1], grad_nonfinite=[0, 0, 1, 1],
        )
    )  # fmt: skip
    assert (found.step, found.block, found.direction, found.site) == (1, 1, "forward", "branch")


def test_a_missing_number_is_no_offence_but_one_that_turned_nan_is():
    assert find_first_nonfinite(frame(grad_param=[math.nan] * 4)) is None
    assert find_first_nonfinite(frame(grad_param=[1, math.nan, 1, math.nan])) is None
    found = find_first_nonfinite(frame(grad_param=[1.0, 1.0, 1.0, math.nan]))
    assert (found.step, found.block, found.direction, found.site) == (
        1,
        1,
        "backward",
        "parameters",
    )
    # the block did not take part in this backward pass
    assert (
        find_first_nonfinite(
            frame(grad_param=[1, 1, 1, math.nan], grad_nonfinite=[0, 0, 0, math.nan])
        )
        is None
    )


def test_an_infinite_norm_is_an_offence():
    found = find_first_nonfinite(frame(grad_output=[1, 1, math.inf, 1]))
    assert (found.step, found.block, found.site) == (1, 0, "output")


def test_nothing_recorded_is_no_offence():
    assert find_first_nonfinite(pd.DataFrame()) is None
    assert find_first_nonfinite(frame()) is None


# --- text and JSON ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_text_fits_100_columns_and_has_its_parts(variant):
    def explode(metrics, curve):
        curve.loc[20:, ["loss", "grad_norm"]] = math.nan
        metrics.loc[at(metrics, 20), "output_nonfinite"] = 1.0

    for change in (None, explode):
        text = render(judge(plant(variant, 20, lr=0.5, change=change)))
        lines = text.splitlines()
        assert max(map(len, lines)) <= 100
        labels = [line.split()[0] for line in lines if not line.startswith(" ")]
        assert labels[:4] == ["Verdict", "Why", "Evidence", "Next"]
        assert "nan" not in text.split("Unjudged")[0].replace("loss is nan", "").replace(
            "grad_norm is nan", ""
        ).lower().replace("finan", "")


def test_json_has_no_nan_and_no_infinity():
    def explode(metrics, curve):
        curve.loc[7:, "loss"] = math.inf

    fields = judge(plant(change=explode)).to_dict()
    again = json.loads(json.dumps(fields, allow_nan=False))
    assert again == fields
    assert again["evidence"][0]["value"] == "inf"
    assert set(again) == {
        "name", "cause", "step", "block", "summary", "why", "evidence", "next",
        "findings", "not_judged", "waiting", "checks",
    }  # fmt: skip


@given(
    st.recursive(
        st.floats() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_plain_values_are_strict_json(value):
    text = json.dumps(plain(value), allow_nan=False)  # raises on what strict JSON has not
    assert json.loads(text) == plain(value)


OVERFIT = {  # training loss, test loss, steps between evaluations, whether it is overfitting
    "memorised": ([1.5, 0.6, 0.1, 0.02, 0.01], [1.4, 0.9, 1.0, 1.2, 1.3], 25, True),
    "not enough steps": ([1.5, 0.6, 0.1, 0.02, 0.01], [1.4, 0.9, 1.0, 1.2, 1.3], 6, False),
    "on its way back": ([1.5, 0.6, 0.1, 0.02, 0.01], [1.4, 0.9, 4.0, 1.8, 1.3], 25, False),
    "noise": ([1.0, 0.4, 0.3, 0.2, 0.18], [1.0, 0.4, 0.2, 0.3, 0.3], 25, False),
    "both learn": ([1.5, 0.6, 0.1, 0.02, 0.01], [1.4, 0.7, 0.4, 0.3, 0.3], 25, False),
}


@pytest.mark.parametrize("case", OVERFIT)
def test_overfitting_is_memorising_and_not_a_restless_evaluation(case):
    train, test, every, wanted = OVERFIT[case]
    steps = [every * (i + 1) - 1 for i in range(len(train))]
    curve = pd.DataFrame({"step": steps, "train_loss": train, "test_loss": test})
    names = {finding.name for finding in judge(fake(pd.DataFrame(), curve)).findings}
    assert ("overfit" in names) == wanted


# --- nothing raises --------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.floats(width=32), st.sampled_from([0.0, 1.0, math.nan, math.inf, -math.inf, 1e38, 1e-38])
)
COLUMNS = [*RECORDED, "output_second_moment", "forward_growth", "step", "block"]
CURVE = ["step", "epoch", "loss", "test_loss", "train_loss", *RECORDED_PER_STEP]


@st.composite
def frames(draw, columns):
    chosen = draw(st.lists(st.sampled_from(columns), unique=True, max_size=12))
    keys = [name for name in ("step", "block") if name in columns and draw(st.booleans())]
    length = draw(st.integers(0, 8))
    data = {name: draw(st.lists(NUMBERS, min_size=length, max_size=length)) for name in chosen}
    for key in keys:
        data[key] = draw(st.lists(st.integers(0, 8), min_size=length, max_size=length))
    return pd.DataFrame(data)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    metrics=frames(COLUMNS),
    curve=frames(CURVE),
    variant=st.sampled_from(list(VARIANTS)),
    blocks=st.sampled_from([[], blocks_of(8), blocks_of(20), [{}], [{"index": 0}]]),
    classes=st.sampled_from([None, 0, 10, ["a", "b"], "ten", math.nan]),
)
def test_no_frame_makes_a_verdict_raise(metrics, curve, variant, blocks, classes):
    run = fake(metrics, curve, variant=variant, blocks=blocks, data={"classes": classes})
    verdict = judge(run)
    assert verdict.name in (*FINDINGS, HEALTHY, UNDETERMINED)
    json.dumps(verdict.to_dict(), allow_nan=False)
    assert all(len(line) <= 100 for line in render(verdict).splitlines())
    conditions = {name for name, row in FINDINGS.items() if row.is_condition}
    if verdict.is_named:
        assert verdict.name == verdict.findings[0].name
    else:
        assert {finding.name for finding in verdict.findings} <= conditions
    ran, applied = verdict.checks
    assert 0 <= ran <= applied <= len(FINDINGS)


def test_what_waits_for_more_steps_is_one_line_and_stays_in_the_document():
    verdict = judge(plant(steps=1))
    waiting = [item.name for item in verdict.waiting]
    assert {"stalled", "overfit", "dead_block"} <= set(waiting)
    assert {str(item) for item in verdict.waiting} <= set(verdict.not_judged)
    below = " ".join(render(verdict).split("Unjudged")[1].split())
    assert below.count("needs a longer run: ") == 1
    assert "stalled (50 steps)" in below
    assert "stalled:" not in below


def test_a_stall_says_what_was_looked_for_and_how_to_find_the_cause():
    def stall(metrics, curve):
        curve["epoch"] = curve["step"] / 10
        curve["loss"], metrics["update_ratio"] = LN10, 0.01

    verdict = judge(plant(change=stall, steps=60))
    looked, _, rest = verdict.why.partition("Looked for and not found: ")[2].partition(".")
    assert {"too small updates", "a vanishing signal or gradient"} <= {*looked.split(", ")}
    for unknown in ("a fault of the inputs", "dead blocks"):  # their columns are not in this run
        assert unknown in rest.partition("Could not be judged: ")[2]
    assert verdict.next[0].startswith("resdiag explain RUN --ask")
    assert any(line.startswith("resdiag plot") for line in verdict.next)


def test_an_undetermined_run_offers_the_experiments():
    assert any("resdiag explain RUN --ask" in line for line in judge(plant(steps=5)).next)
