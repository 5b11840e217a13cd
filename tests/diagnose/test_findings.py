"""The rules of the verdict, each on both sides of its threshold, on made-up tables."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from judged_runs import STEPS, run_of
from made_runs import (
    continue_run,
    make_blocks,
    make_checkpoint,
    make_config,
    make_curve,
    make_metrics,
    open_writer,
)

from resdiag.cli.main import app
from resdiag.diagnose.degraded import compare
from resdiag.diagnose.verdict import judge


def verdict_of(change=None, **options):
    verdict = judge(run_of(change, **options))
    return verdict.name, verdict.block


def test_the_ordinary_run_is_healthy():
    verdict = judge(run_of())
    assert (verdict.name, verdict.findings, verdict.cause) == ("healthy", (), "")


@pytest.mark.parametrize(
    ("column", "value", "cause"),
    [
        ("data_nonfinite", 1e-6, "non-finite input"),
        ("data_std", 0.0, "constant input"),
        ("data_std", 20.1, "input not normalised"),
        ("data_std", 19.9, ""),
        ("data_std", 9e-5, "input not normalised"),
        ("data_mean", 19.9, ""),
        ("label_share", 1.0, "constant labels"),
        ("label_share", 0.99, ""),
    ],
)
def test_faults_of_the_data(column, value, cause):
    def spoil(cell, curve):
        curve[column] = value

    verdict = judge(run_of(spoil))
    assert (verdict.name, verdict.cause) == ("data_fault" if cause else "healthy", cause)


def test_labels_of_two_batches_are_not_believed_to_be_constant():
    def spoil(cell, curve):
        curve["label_share"] = np.where(curve["step"] < 2, 1.0, math.nan)

    assert verdict_of(spoil)[0] == "healthy"


@pytest.mark.parametrize(("factor", "found"), [(0.5, True), (1.5, True), (1.02, False), (-1, True)])
def test_one_scaled_shortcut_is_named(factor, found):
    def scale(cell, curve):
        for name in ("channel_mean_rms", "channel_std"):
            cell(f"shortcut_{name}", abs(factor) * (0.1 if "mean" in name else 1.0), block=3)
        for q, mirrored in ((10, 90), (50, 50), (90, 10)):
            value = {10: -0.1, 50: 0.02, 90: 0.15}[q if factor > 0 else mirrored]
            cell(f"shortcut_mean_q{q}", factor * value, block=3)

    assert verdict_of(scale) == (("shortcut_scaled", 3) if found else ("healthy", None))


def test_shortcuts_that_are_all_scaled_a_little_are_a_design():
    def scale(factor):
        def change(cell, curve):
            cell("shortcut_channel_std", factor)
            cell("shortcut_channel_mean_rms", 0.1 * factor)

        return change

    assert verdict_of(scale(0.9))[0] == "healthy"  # 0.9^6 = 0.53
    assert verdict_of(scale(0.5)) == ("shortcut_scaled", 0)


@pytest.mark.parametrize(("ratio", "name"), [(51, "branch_too_large"), (49, "healthy")])
def test_a_branch_that_becomes_far_larger_than_its_shortcut(ratio, name):
    later = slice(1, None)
    assert verdict_of(lambda cell, _: cell("branch_ratio", ratio, block=2, step=later))[0] == name


@pytest.mark.parametrize(
    ("ratio", "others", "name"),
    [
        (10.1, 0.5, "branch_too_large"),
        (9.9, 0.5, "healthy"),
        (1.01, 0.01, "branch_too_large"),
        (0.99, 0.01, "healthy"),  # smaller than its shortcut
        (1.01, 0.0, "healthy"),  # zero initialisation
    ],
)
def test_a_branch_that_is_larger_than_the_others_at_first(ratio, others, name):
    def begin(size, loss):
        def change(cell, curve):
            curve["loss"] = loss * 0.97 ** curve["step"]
            cell("branch_ratio", others, step=0)
            cell("branch_ratio", ratio, step=0, block=2)
            cell("branch_channel_std", size, step=0, block=2)

        return verdict_of(change)[0]

    assert begin(21.0, 2.3) == name
    assert begin(19.0, 2.3) == "healthy"  # it is its shortcut that is small
    assert begin(21.0, 1.8) == "healthy"  # a network that was trained before


def test_a_branch_among_small_ones():
    def grow(size):
        def change(cell, curve):
            cell("branch_ratio", 0.01)
            cell("branch_ratio", size, block=4, step=slice(1, None))

        return change

    assert verdict_of(grow(6.0)) == ("branch_too_large", 4)
    assert verdict_of(grow(2.0))[0] == "healthy"


def test_one_step_larger_than_the_weights():
    def step(size):
        def change(cell, curve):
            curve["loss"] = 2.4
            cell("update_ratio", size, step=3)

        return judge(run_of(change))

    assert (step(1.1).name, step(1.1).step) == ("lr_too_high", 3)
    assert step(0.9).name == "undetermined"
    recovered = judge(run_of(lambda c, _: c("update_ratio", 1.1, step=3)))
    assert recovered.name == "healthy"  # it learned all the same


def test_branches_that_are_all_large_are_a_design():
    assert verdict_of(lambda cell, curve: cell("branch_ratio", 60.0))[0] == "healthy"


def test_a_frozen_block_among_moving_ones():
    assert verdict_of(lambda c, _: c("update_ratio", 0.0, block=4)) == ("frozen_block", 4)


NOT_REQUIRED = "this tensor does not require a gradient"


def frozen(blocks, *, count=8, beginning=False, gradient=math.nan, unavailable=()):
    """A verdict on a run in which the parameters of some blocks do not move."""

    def freeze(cell, curve):
        for block in blocks:
            cell("update_ratio", 0.0, block=block)
            cell("grad_param", gradient, block=block)
            if beginning:
                cell("grad_output", math.nan, block=block)
                cell("grad_input", math.nan, block=block)

    return judge(run_of(freeze, count=count, unavailable=list(unavailable)))


@pytest.mark.parametrize(
    ("blocks", "beginning"),
    [
        ([0], True),
        ([0, 1, 2, 3], True),
        ([0, 1], False),  # the first stage, behind a stem that is trained
        ([6, 7], False),
        ([0, 2, 4, 6], False),  # every second one, as LoRA of the attention
        ([1, 2, 3, 4, 5, 7], False),
    ],
)
def test_freezing_is_a_method_where_it_is_done_to_many_or_at_an_end(blocks, beginning):
    verdict = frozen(blocks, beginning=beginning)
    assert verdict.name == "healthy"
    (said,) = [line for line in verdict.not_judged if line.startswith("frozen_block")]
    assert f"{len(blocks)} of 8 blocks are frozen" in said
    assert "deliberate fine-tuning" in said


@pytest.mark.parametrize("blocks", [[3], [2, 5], [3, 4], [0], [7]])
@pytest.mark.parametrize(
    ("gradient", "cause"),
    [
        (math.nan, "requires_grad is False"),
        (0.1, "the parameters get gradients, but no optimizer updates them"),
    ],
)
def test_a_few_frozen_blocks_among_moving_ones_are_a_fault(blocks, gradient, cause):
    verdict = frozen(blocks, gradient=gradient)
    assert (verdict.name, verdict.block, verdict.cause) == ("frozen_block", blocks[0], cause)


@pytest.mark.parametrize("gradient", [0.0, 1e-9])  # too small for float32 to add
def test_parameters_that_do_not_move_because_their_gradient_is_0_are_not_called_frozen(gradient):
    verdict = frozen([4], gradient=gradient)
    assert (verdict.name, verdict.cause) == ("frozen_block", "their gradient is 0")


def test_an_optimizer_of_the_head_alone_has_no_rate_that_is_too_low_once_the_loss_falls():
    def probe(end):
        def change(cell, curve):
            curve["loss"] = np.linspace(2.55, end, STEPS)
            cell("update_ratio", 0.0)

        return judge(run_of(change))

    assert probe(2.35).name == "undetermined"
    assert (probe(2.55).name, probe(2.55).cause) == ("lr_too_low", "no optimizer step")


def test_blocks_before_a_detach_are_told_from_a_frozen_beginning():
    """Their outputs require a gradient, which the next block's input does not."""
    detached = [{"metric": "grad_input", "blocks": [3], "reason": NOT_REQUIRED}]
    verdict = frozen([0, 1, 2], beginning=True, unavailable=detached)
    assert (verdict.name, verdict.block) == ("frozen_block", 2)
    assert verdict.cause == "no gradient reaches them, although they require one"
    probe = [
        {"metric": "grad_input", "blocks": [0, 1, 2, 3], "reason": NOT_REQUIRED},
        {"metric": "grad_output", "blocks": [0, 1, 2], "reason": NOT_REQUIRED},
    ]
    assert frozen([0, 1, 2], beginning=True, unavailable=probe).name == "healthy"


def test_blocks_to_which_the_gradient_does_not_come_are_not_called_frozen():
    def vanish(cell, curve):
        for block in range(3):
            cell("update_ratio", 0.0, block=block)
            for name in ("grad_param", "grad_input", "grad_output"):
                cell(name, 1e-9, block=block)

    assert "frozen_block" not in {finding.name for finding in judge(run_of(vanish)).findings}


def test_a_linear_probe_has_no_learning_rate_that_is_too_low():
    def probe(cell, curve):
        curve["loss"] = 2.4
        cell("update_ratio", 0.0)
        for name in ("grad_param", "grad_input", "grad_output"):
            cell(name, math.nan)

    whole = [{"metric": "grad_output", "blocks": list(range(6)), "reason": NOT_REQUIRED}]
    verdict = judge(run_of(probe, unavailable=whole))
    assert verdict.name == "undetermined"
    assert any("linear probe" in line for line in verdict.not_judged)
    verdict = judge(run_of(probe))  # they require one, and get none
    assert (verdict.name, verdict.cause) == ("lr_too_low", "no gradient reaches the blocks")


def test_a_block_whose_units_are_dead_is_shown_with_their_share():
    def shut(cell, curve):
        cell("dead_fraction", 1.0, block=2)

    verdict = judge(run_of(shut))
    assert (verdict.name, verdict.block) == ("dead_block", 2)
    (item,) = [item for item in verdict.evidence if item.metric == "dead_fraction"]
    assert (item.value, item.threshold) == (1.0, 0.999)


def test_dead_units_are_counted_among_the_blocks_that_have_activations():
    def shut(cell, curve):
        cell("dead_fraction", math.nan, block=slice(0, 3))  # attention has none
        cell("dead_fraction", 1.0, block=5)

    assert verdict_of(shut) == ("dead_block", 5)


@pytest.mark.parametrize(
    ("ops", "share", "gradient", "name"),
    [
        (["linear", "gelu", "linear", "dropout"], 1.0, 0.1, "dead_block"),
        (["linear", "gelu", "linear", "dropout"], 0.9999, 0.1, "healthy"),
        (["linear", "gelu", "linear", "dropout"], 1.0, math.nan, "detached_branch"),
        (["linear", "gelu", "linear"], 1.0, 0.1, "healthy"),
    ],
)
def test_the_mask_of_dropout_hides_no_constant_branch(ops, share, gradient, name):
    def mask(cell, curve):
        cell("shortcut_share", share, block=2)
        cell("grad_param", gradient, block=2)

    assert verdict_of(mask, blocks=[{**row, "branch": ops} for row in run_of().blocks])[0] == name


def test_a_detached_branch_and_a_detached_shortcut():
    def detach(cell, curve):
        cell("shortcut_share", 1.0, block=2)
        cell("grad_param", math.nan, block=2)

    assert verdict_of(detach) == ("detached_branch", 2)
    reason = "no gradient leads from the shortcut back to the block's input"
    missing = [{"metric": "shortcut_share", "blocks": [5], "reason": reason}]
    assert verdict_of(unavailable=missing) == ("detached_shortcut", 5)


def test_a_normalisation_that_one_block_lacks():
    blocks = run_of().blocks
    blocks[3] = {**blocks[3], "branch": ["conv2d", "relu", "conv2d"]}
    assert verdict_of(blocks=blocks) == ("missing_norm", 3)
    # another kind of block is another design
    blocks[3] = {**blocks[3], "branch": ["conv2d", "sigmoid", "conv2d"]}
    assert verdict_of(blocks=blocks)[0] == "healthy"


def test_a_constant_branch_is_dead_unless_all_are():
    assert verdict_of(lambda c, _: c("branch_channel_std", 0.0, block=1)) == ("dead_block", 1)
    assert verdict_of(lambda c, _: c("branch_channel_std", 0.0))[0] == "healthy"
    # a branch that begins at zero and grows
    begin = verdict_of(lambda c, _: c("branch_channel_std", 0.0, block=1, step=slice(0, 3)))
    assert begin[0] == "healthy"


def test_saturation_counts_beside_the_other_blocks_and_where_a_curve_saturates():
    blocks = [{**row, "branch": ["linear", "tanh", "linear"]} for row in run_of().blocks]
    saturate = lambda c, _: c("saturated_fraction", 0.95, block=2)  # noqa: E731
    assert verdict_of(saturate, blocks=blocks) == ("saturated_block", 2)
    assert verdict_of(saturate)[0] == "healthy"  # ReLU: closed, not saturated


def test_a_loss_that_gets_worse_with_large_steps_is_a_high_learning_rate():
    def worsen(size):
        def change(cell, curve):
            curve["loss"] = np.linspace(2.3, 12.5, STEPS)
            cell("update_ratio", size)

        return change

    assert verdict_of(worsen(0.05))[0] == "lr_too_high"
    assert verdict_of(worsen(1e-4))[0] == "undetermined"  # it is not the steps
    since = judge(run_of(worsen(0.05))).step
    losses = np.linspace(2.3, 12.5, STEPS)
    assert losses[since - 1] <= 1.5 * math.log(10) < losses[since]


def test_a_loss_that_is_high_for_ten_steps_only_is_no_high_learning_rate():
    def rise(steps):
        def change(cell, curve):
            curve["loss"] = np.nan
            curve.loc[: steps - 1, "loss"] = np.linspace(2.3, 12.5, steps)
            cell("update_ratio", 0.05)

        return change

    assert verdict_of(rise(10))[0] == "undetermined"
    assert verdict_of(rise(20))[0] == "lr_too_high"


def test_a_loss_above_guessing_that_falls_again_waits_for_100_steps():
    def recover(size, end):
        def change(cell, curve):
            half = len(curve) // 2
            curve["loss"] = np.interp(curve["step"], [0, half, len(curve)], [2.3, 12.0, end])
            cell("update_ratio", size)

        return change

    verdict = judge(run_of(recover(5e-3, 5.0), steps=60))
    assert verdict.name == "undetermined"
    assert any("falls again" in line for line in verdict.not_judged)
    assert verdict_of(recover(5e-3, 5.0), steps=100)[0] == "lr_too_high"
    assert verdict_of(recover(0.2, 5.0), steps=60)[0] == "lr_too_high"  # and such steps
    assert verdict_of(recover(5e-3, 12.0), steps=60)[0] == "lr_too_high"


@pytest.mark.parametrize(
    ("size", "end", "step"), [(0.11, 1.6, 45), (0.09, 1.6, None), (0.11, 0.5, None)]
)
def test_a_late_step_that_undoes_what_was_learned(size, end, step):
    def restart(cell, curve):
        curve["loss"] = np.where(curve["step"] < 45, 2.3 * 0.95 ** curve["step"], end)
        cell("update_ratio", size, step=slice(45, None))

    verdict = judge(run_of(restart, steps=60))
    assert (verdict.name, verdict.step) == ("lr_too_high" if step else "healthy", step)


@pytest.mark.parametrize(
    ("size", "loss", "named"),
    [(1.1, 2.4, True), (0.9, 2.4, False), (1.1, 1.0, False), (math.inf, 2.4, False)],
)
def test_one_block_that_is_moved_by_more_than_its_weights(size, loss, named):
    """As a group of parameters with its own learning rate; zero weights move infinitely far."""

    def hurry(cell, curve):
        curve["loss"] = loss
        cell("update_ratio", size, block=3, step=2)
        if size == math.inf:
            cell("update_ratio", 1.5, block=3, step=3)

    verdict = judge(run_of(hurry))
    assert (verdict.name == "lr_too_high") == named
    assert verdict.block == (3 if named else None)


def test_a_number_out_of_nothing_is_no_high_learning_rate():
    def break_down(cell, curve):
        cell("update_ratio", 0.2)
        cell("branch_nonfinite", 0.1, step=9, block=3)
        curve.loc[9:, "loss"] = math.nan

    assert verdict_of(break_down, status="diverged") == ("exploded", 3)


@pytest.mark.parametrize(("size", "name"), [(2e-6, "lr_too_low"), (1e-3, "undetermined")])
def test_steps_that_move_nothing(size, name):
    def stand_still(cell, curve):
        curve["loss"], curve["weight_decay"] = 2.9, 0.0
        cell("update_ratio", size)

    assert verdict_of(stand_still)[0] == name


def test_gradients_that_were_clipped_away_and_an_optimizer_that_never_steps():
    def clip(cell, curve):
        curve["loss"], curve["grad_norm"] = 2.9, 1e-7
        cell("update_ratio", 1e-4)  # ten times lr x weight decay: momentum

    assert judge(run_of(clip)).cause == "gradients almost 0 before the step"

    def idle(cell, curve):
        curve["loss"] = 2.9
        curve[["lr", "momentum", "weight_decay"]] = math.nan
        cell("update_ratio", math.nan)

    verdict = judge(run_of(idle))
    assert (verdict.name, verdict.cause) == ("lr_too_low", "no optimizer step")


@pytest.mark.parametrize(("decay", "name"), [(0.11, "weight_decay_too_large"), (0.09, "healthy")])
def test_weight_decay(decay, name):
    def shrink(cell, curve):
        curve["weight_decay"] = decay

    assert verdict_of(shrink)[0] == name


def test_a_jump_of_the_bias_shift_is_named_by_its_block():
    def shift(cell, curve):
        cell("output_channel_mean_rms", 6.0, block=slice(3, 5))
        for site in ("input", "shortcut"):
            cell(f"{site}_channel_mean_rms", 6.0, block=slice(4, 5))

    assert verdict_of(shift) == ("bias_shift", 3)


def test_signal_or_gradient_that_vanishes():
    def shrink(metric, value, block):
        def change(cell, curve):
            curve["loss"] = 2.4
            cell(metric, value, block=block)

        return verdict_of(change)[0]

    assert shrink("output_channel_std", 1e-4, 5) in ("vanishing", "bias_shift")
    assert shrink("grad_input", 9e-4, 0) == "vanishing"
    assert shrink("grad_input", 1.1e-3, 0) == "undetermined"


def test_two_streams_are_not_compared_with_each_other():
    """As the patches and the class token of CaiT behind layer scales of 1e-6."""

    def split(cell, curve):
        curve["loss"] = 2.4
        for name in ("grad_input", "grad_output"):
            cell(name, 1e-7, block=slice(0, 3))
        for site in ("input", "shortcut", "sum", "output"):
            cell(f"{site}_channel_std", 1e-8, block=slice(4, 5))
        cell("input_channel_std", 0.0, block=4)  # the token is the same for every sample
        for metric in ("channel_mean_rms", "channel_std"):
            cell(f"output_{metric}", 1e-8, block=slice(4, 5))

    assert judge(run_of(split)).findings == ()

    def vanish(cell, curve):
        curve["loss"] = 2.4
        for block in range(6):
            cell("grad_input", 10.0 ** (block - 6), block=block)
            cell("grad_output", 10.0 ** (block - 5), block=block)

    found = [finding.name for finding in judge(run_of(vanish)).findings]
    assert found == ["vanishing", "skip_collapsed"]


def test_a_skip_path_that_collapsed_while_the_network_guessed_is_a_consequence():
    def collapse(since, loss):
        def change(cell, curve):
            curve["loss"] = loss
            cell("skip_gain", 0.01, step=slice(since, None))

        return {finding.name for finding in judge(run_of(change, steps=60)).findings}

    ln10 = math.log(10)
    assert "skip_collapsed" in collapse(30, 2.0)
    assert "skip_collapsed" not in collapse(30, ln10)
    assert "skip_collapsed" in collapse(10, ln10)  # it may be why the loss did not fall
    assert "skip_collapsed" not in collapse(58, 2.0)  # two steps of few samples
    assert "skip_collapsed" in collapse(57, 2.0)


def test_a_condition_does_not_name_the_verdict_on_a_run_that_learned():
    verdict = judge(run_of(lambda c, _: c("grad_input", 9e-4, block=0, step=0)))
    assert verdict.name == "healthy"
    assert [finding.name for finding in verdict.findings] == ["vanishing"]
    assert "learns although vanishing was found" in verdict.summary


def test_a_drift_is_dated_by_the_step_at_which_it_became_large():
    def move(cell, curve):
        for step in range(STEPS):
            cell("output_channel_mean_rms", 0.1 + 0.1 * step, step=step)
            cell("branch_mean", 0.05 + 0.1 * step, step=step)

    (found,) = [one for one in judge(run_of(move)).findings if one.name == "drift"]
    assert found.step == 9  # 0.1 + 0.1 x 9 = 1
    assert "above 1 since step 9" in found.summary


@pytest.mark.parametrize(("end", "found"), [(1.2, True), (1.0, False)])
def test_a_drift_that_comes_with_a_loss_that_fell_to_half_is_what_the_task_asks_for(end, found):
    def move(cell, curve):
        curve["loss"] = np.where(curve["step"] < 4, 2.2, end)
        cell("output_channel_mean_rms", 5.0, step=STEPS - 1)
        cell("branch_mean", 0.5, step=STEPS - 1)

    assert ("drift" in {one.name for one in judge(run_of(move)).findings}) == found


def test_an_overflow_of_float16_is_told_from_other_explosions():
    def overflow(cell, curve):
        cell("output_channel_std", 3000.0, step=slice(5, 7))
        cell("sum_nonfinite", 0.1, step=7, block=2)

    half = [{**row, "dtype": "float16"} for row in run_of().blocks]
    assert verdict_of(overflow, blocks=half, status="diverged") == ("fp16_overflow", 2)
    assert verdict_of(overflow, status="diverged")[0] != "fp16_overflow"


def test_the_verdict_has_a_cause_in_json():
    said = judge(run_of(lambda c, _: c("branch_ratio", 1e3, block=2))).to_dict()
    assert {"name", "cause", "block", "step"} < set(said)
    assert (said["name"], said["block"], said["step"]) == ("branch_too_large", 2, 0)
    assert said["findings"][0]["name"] == "branch_too_large"


def test_a_loss_that_was_reported_as_nan_is_lost_and_a_gap_is_none():
    def lose(cell, curve):
        curve["head_loss"] = curve["loss"]
        curve["loss"] = math.nan

    assert judge(run_of(lose, status="diverged")).step == 0
    assert judge(run_of(lose)).name == "healthy"  # never reported: read off the logits

    def lose_one(cell, curve):
        curve.loc[5, "loss"] = math.nan

    verdict = judge(run_of(lose_one, status="diverged"))
    # every block is finite and as large as before: it is the loss itself
    assert (verdict.name, verdict.step) == ("loss_fault", 5)
    assert "exploded" in {finding.name for finding in verdict.findings}

    def report_each_third(cell, curve):
        curve.loc[curve["step"] % 3 > 0, "loss"] = math.nan
        curve.loc[18:, "loss"] = math.nan

    verdict = judge(run_of(report_each_third, status="diverged"))
    assert (verdict.name, verdict.step) == ("loss_fault", 16)  # after the last finite one


@pytest.mark.parametrize("steps", [19, 20])
def test_a_run_is_healthy_from_20_losses_on(steps):
    verdict = judge(run_of(steps=steps))
    assert verdict.name == ("healthy" if steps >= 20 else "undetermined")
    assert ("19 steps is known, 20 needed" in verdict.why) == (steps < 20)


def test_without_classes_the_loss_has_to_fall():
    def hold(cell, curve):
        curve["loss"] = -3.0 + 0.01 * (curve["step"] % 2)

    flat = judge(run_of(hold, data={}))
    assert flat.name == "undetermined"
    assert "the loss has not fallen" in flat.why
    assert judge(run_of(data={})).name == "healthy"
    sinking = judge(run_of(lambda cell, c: c.update({"loss": -3.0 - c["step"]}), data={}))
    assert sinking.name == "healthy"  # below zero: some losses are


def test_with_few_numbers_nothing_is_called_healthy():
    run = run_of()
    few = run.metrics_frame[["step", "block", "grad_param"]]
    told = run.curve_frame[["step", "loss", "grad_norm"]]
    verdict = judge(replace(run, metrics_frame=few, curve_frame=told))
    assert verdict.name == "undetermined"
    assert "checks had the numbers that they need" in verdict.why


# -- several runs ------------------------------------------------------------------------------


def ended(depth, seed, train, test, *, status="done", data="digits", model="elu"):
    curve = pd.DataFrame({"step": [9], "train_error": [train], "test_error": [test]})
    config = SimpleNamespace(model=model, depth=depth, data=data, steps=10, seed=seed)
    return SimpleNamespace(config=config, status=status, blocks=[], curve=lambda: curve)


def family(train, test, seeds=3):
    """Depth 20 ends with 10 % and 12 %, depth 56 with what is given; a spread of 0.02 points."""
    return [
        ended(depth, seed, a + seed * 1e-4, b + seed * 1e-4)
        for depth, a, b in ((20, 0.10, 0.12), (56, train, test))
        for seed in range(seeds)
    ]


@pytest.mark.parametrize(
    ("train", "test", "name"),
    [
        (0.103, 0.125, "degraded"),
        (0.09, 0.125, "overfit"),
        (0.103, 0.11, "not_degraded"),
        (0.1005, 0.1205, "not_degraded"),  # half a tenth of a point
    ],
)
def test_degradation_by_its_definition(train, test, name):
    (found,) = compare(family(train, test))
    assert found.name == name
    assert (found.finding is not None) == (name in ("degraded", "overfit"))


def test_a_gap_within_two_standard_errors_is_no_degradation():
    noisy = [ended(56, seed, 0.11 + e, 0.13 + e) for seed, e in enumerate((-0.02, 0, 0.02))]
    (found,) = compare([*family(0, 0)[:3], *noisy])
    assert found.name == "not_degraded"


def test_where_only_the_training_error_grows_by_more_than_its_scatter_more_seeds_decide():
    noisy = [ended(56, seed, 0.13, 0.13 + e) for seed, e in enumerate((-0.02, 0, 0.02))]
    (found,) = compare([*family(0, 0)[:3], *noisy])
    assert found.name == "undecidable"
    assert "the training error grows" in found.summary


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (family(0.2, 0.2, seeds=2), "2 seeds at depth 20, 3 are needed"),
        (family(0.2, 0.2)[:3], "runs of one depth only"),
        ([*family(0.2, 0.2), ended(56, 3, 0.2, 0.2, data="cifar10")], "differ in data"),
        ([*family(0.2, 0.2), ended(56, 3, 0.2, 0.2, status="diverged")], "1 of 4 runs at depth 56"),
    ],
)
def test_undecidable_is_an_answer(runs, words):
    (found,) = compare(runs)
    assert found.name == "undecidable"
    assert words in found.summary


# -- the command -------------------------------------------------------------------------------


def test_explain_of_a_run_that_is_still_going(tmp_path, capsys):
    with open_writer(tmp_path, make_config(steps=15)) as writer:
        writer.describe(make_blocks(), [], "local")
        writer.commit(10, make_metrics(0, 10), make_curve(0, 10), *make_checkpoint(10))
        assert app.run(["explain", str(writer.folder), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
    assert set(said) == {"schema", "run", "verdict", "findings"}
    rest = [reason for reason in said["verdict"]["not_judged"] if reason.startswith("the rest")]
    assert rest == ["the rest of the run: it is at step 10 of 15 (running)"]


def test_explain_of_a_run_that_has_not_committed_yet(tmp_path, capsys):
    with open_writer(tmp_path) as writer:
        assert app.run(["explain", str(writer.folder)]) == 0
    assert "it is at step 0 of 15 (new)" in " ".join(capsys.readouterr().out.split())


def test_explain_of_several_runs_says_whether_they_degrade(tmp_path, capsys):
    for depth in (8, 14):
        with open_writer(tmp_path, make_config(depth=depth)) as writer:
            continue_run(writer)
    folders = [str(path) for path in sorted(tmp_path.iterdir())]
    assert app.run(["explain", *folders]) == 0
    out = capsys.readouterr().out
    assert "elu_pre: undecidable. Degradation: 1 seed at depth 8, 3 are needed." in out
    assert app.run(["explain", *folders, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["runs"]) == 2
    assert said["comparisons"][0]["name"] == "undecidable"


def test_a_bare_head_behind_normalised_units_is_a_design_and_a_bare_unit_between_is_not():
    def plain_units(bare):
        kinds = ["conv2d", "batch_norm", "relu"]
        return [
            {"index": i, "stage": 0, "shortcut": "none", "after_add": "none",
             "branch": ["conv2d", "relu"] if i == bare else kinds}
            for i in range(6)
        ]  # fmt: skip

    assert verdict_of(blocks=plain_units(5))[0] == "healthy"
    assert verdict_of(blocks=plain_units(0))[0] == "healthy"
    assert verdict_of(blocks=plain_units(3)) == ("missing_norm", 3)
