"""Rules about the training loop: what the optimizer holds, what it is given, and at which rate."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from resdiag.diagnose.breakdown import find_breakdown
from resdiag.diagnose.finding import Outcome, Rule, Threshold
from resdiag.diagnose.progress import find_doubts
from resdiag.diagnose.rundata import RunData, first_step, held_since, trailing

LEAST_KEPT = Threshold(3, "Steps in a row that began with gradients of the step before.")
KEPT = Threshold(0.9, "Share of such steps among those from the first one on.")
NO_RATE = Threshold(1e-6, "Learning rate over its maximum that is none.")
LEAST_IDLE = (
    Threshold(5, "Recorded steps at the end without a learning rate,"),
    Threshold(0.1, "and their share of all recorded steps."),
)
RATE_JUMP = Threshold(30.0, "Learning rate over the largest of all recorded steps before.")
BEFORE_JUMP = Threshold(5, "Recorded steps at lower rates before a jump of the rate.")
LEAST_SKIPPED = Threshold(10, "Recorded steps at the end in which nothing was updated.")
HIGH_GROUP = Threshold(30.0, "Learning rate of a group over that of most, where the run suffers.")
FAR_GROUP = Threshold(100.0, "The same, whatever becomes of the run.")
LOW_GROUP = Threshold(2e-3, "The same, from which on down the group hardly learns.")
LADDER = Threshold(3, "Different rates beyond which they are a schedule over depth.")


def optimizer_mismatch(seen: RunData) -> Outcome:
    """Parameters that require gradients are in no optimizer, or an optimizer has none of them.

    Seen as soon as the optimizer is known, before the first step.
    """
    if not seen.inventory:
        yield seen.without_inventory(OPTIMIZER_MISMATCH)
        return
    about = seen.part("parameters")
    missing, total = int(about.get("unheld", 0)), int(about.get("trainable", 0))
    if not about.get("known"):
        yield OPTIMIZER_MISMATCH.not_judged(*seen.why_no_updates)
    elif missing and total:
        blocks, names = about.get("blocks", []), ", ".join(map(str, about.get("names", [])[:3]))
        more = f" and {missing - 3} more" if missing > 3 else ""
        text = f"{missing} of {total} parameters that require gradients are in no optimizer: "
        foreign = int(about.get("foreign", 0))
        cause = ""
        if foreign and about.get("copies"):
            cause = "the optimizer holds copies of the parameters"
        elif foreign and missing == total:
            cause = "the optimizer holds the parameters of another model"
        alone = blocks[0] if len(blocks) == 1 and not about.get("outside") else None
        item = OPTIMIZER_MISMATCH.evidence(
            "inventory", missing, 0, text + names + more, step=0, block=alone
        )
        summary = f"{cause}: {item.text}" if cause else item.text
        yield OPTIMIZER_MISMATCH.found(item, cause=cause, summary=summary)


def eval_mode(seen: RunData) -> Outcome:
    """The optimizer steps although every forward pass of the step was in evaluation mode."""
    if not seen.inventory:
        yield seen.without_inventory(EVAL_MODE)
        return
    event = seen.event("update_in_evaluation")
    if event is None:
        if seen.event("update") is None:
            yield EVAL_MODE.not_judged("no update was seen", "updates")
        return
    kinds = ", ".join(map(str, seen.inventory.get("evaluating", [])))
    text = f"{event['count']} steps updated the weights in evaluation mode, from step "
    text += f"{event['first']} to {event['last']}"
    text += f"; {kinds} act otherwise in training" if kinds else ""
    item = EVAL_MODE.evidence("inventory", event["count"], 0, text, step=event["first"])
    yield EVAL_MODE.found(item)


def gradients_not_zeroed(seen: RunData) -> Outcome:
    """Backward passes begin with the gradients of earlier steps, 3 steps in a row or more.

    Read at recorded steps with one forward pass that follow an update.
    """
    kept = seen.series("grad_kept").dropna()
    if len(kept) < LEAST_KEPT:
        reason = f"{len(kept)} steps show which gradients were left, {LEAST_KEPT} needed"
        yield GRADIENTS_NOT_ZEROED.not_judged(reason, f"{LEAST_KEPT} recorded steps in a row")
        return
    left = kept > 0
    if not left.any():
        return
    since = first_step(left)
    onward = left[left.index >= since]
    if len(onward) >= LEAST_KEPT and onward.mean() >= KEPT:
        value = float(kept[since])
        text = f"gradients of earlier steps were still there, norm {value:.2g}, when the backward "
        text += f"pass of step {since} began, and of {int(onward.sum())} of {len(onward)} since"
        yield GRADIENTS_NOT_ZEROED.found(
            GRADIENTS_NOT_ZEROED.evidence("grad_kept", value, 0, text, step=since)
        )


def lr_schedule(seen: RunData) -> Outcome:
    """The learning rate falls to 0 while training goes on, or jumps 30-fold above all before.

    A rate of 0 counts if it lasts for 5 recorded steps and a tenth of them, to the end. Warm
    restarts return to a rate that was there before.
    """
    rates = seen.series("lr").dropna()
    if len(rates) < LEAST_IDLE[0]:
        reason = f"{len(rates)} steps with a learning rate, {LEAST_IDLE[0]} needed"
        yield LR_SCHEDULE.not_judged(reason, f"{LEAST_IDLE[0]} steps")
        return
    highest = float(rates.max())
    idle = trailing(rates <= NO_RATE * highest)
    least = max(LEAST_IDLE[0], LEAST_IDLE[1] * len(rates))
    if highest > 0 and len(rates) > idle >= least:
        since = held_since(rates <= NO_RATE * highest)
        text = f"the learning rate is {float(rates[since]):.2g} from step {since} on, for {idle} "
        text += f"recorded steps; it was {highest:.3g}"
        limit = NO_RATE * highest
        item = LR_SCHEDULE.evidence("lr", float(rates[since]), limit, text, step=since)
        yield LR_SCHEDULE.found(item, cause="the learning rate falls to 0", why=_IDLE)
        return
    before = rates.cummax().shift()
    jumps = rates >= RATE_JUMP * before.where(before > 0)
    jumps.iloc[: int(BEFORE_JUMP)] = False
    if jumps.any():
        at = first_step(jumps)
        value, was = float(rates[at]), float(before[at])
        text = f"the learning rate jumps from {was:.3g} at most to {value:.3g} at step {at}"
        item = LR_SCHEDULE.evidence("lr", value, RATE_JUMP * was, text, step=at)
        yield LR_SCHEDULE.found(item, cause="the learning rate jumps")


def steps_skipped(seen: RunData) -> Outcome:
    """No update in the last 10 recorded steps: the gradient is not finite, or the loop has stopped.

    As where a loss scaler skips every step. A loop that never updated anything although its
    gradients are finite is `lr_too_low`.
    """
    if not seen.inventory:
        yield seen.without_inventory(STEPS_SKIPPED)
        return
    if len(seen.steps) < LEAST_SKIPPED:
        reason = f"{len(seen.steps)} recorded steps, {LEAST_SKIPPED} needed"
        yield STEPS_SKIPPED.not_judged(reason, f"{LEAST_SKIPPED} steps")
        return
    rates, norms, losses = (seen.series(n).reindex(seen.steps) for n in ("lr", "grad_norm", "loss"))
    moved = seen.table("update_ratio").reindex(seen.steps).max(axis=1)
    idle = rates.isna() | (moved == 0)
    broken = ~np.isfinite(norms.to_numpy(float)) & ~np.isinf(losses.to_numpy(float))
    count = trailing(idle)
    since = seen.steps[len(seen.steps) - count] if count else 0
    nonfinite = bool(count) and broken[-count:].mean() > 0.5 and _is_alive(seen, since)
    ever = rates.notna().any()
    if count < LEAST_SKIPPED or not (nonfinite or (ever and rates.isna().iloc[-count:].all())):
        return
    cause = "the gradient is not finite, and the steps are skipped" if nonfinite else ""
    text = f"nothing was updated in {count} recorded steps from step {since} to the end"
    text += ": their gradients are not finite" if nonfinite else ""
    item = STEPS_SKIPPED.evidence("lr", count, LEAST_SKIPPED, text, step=since)
    yield STEPS_SKIPPED.found(item, cause=cause)


def _is_alive(seen: RunData, since: int) -> bool:
    """Whether the forward passes are finite where the gradients are not."""
    outputs = seen.table("output_nonfinite")
    return not (outputs[outputs.index >= since] > 0).any(axis=None)


def group_lr(seen: RunData) -> Outcome:
    """A group of parameters has 100 times the learning rate of most, or a 500th of it.

    From 30 times on if the run breaks down or does not show that it learns. More than 3 rates in
    one optimizer are a schedule over depth.
    """
    if not seen.inventory:
        yield seen.without_inventory(GROUP_LR)
        return
    groups = [g for g in seen.inventory.get("groups", []) if g.get("size") and g.get("highest")]
    if not groups:
        yield GROUP_LR.not_judged(*seen.why_no_updates)
    suffers = bool(find_breakdown(seen)) or bool(find_doubts(seen))
    for kind in dict.fromkeys(g["optimizer"] for g in groups):
        own = [g for g in groups if g["optimizer"] == kind]
        if len({g["highest"] for g in own}) > LADDER:
            continue
        usual = _usual(own)
        for group in own:
            ratio = float(group["highest"]) / usual if usual else math.nan
            high = ratio >= FAR_GROUP or (ratio >= HIGH_GROUP and suffers)
            if high or ratio <= LOW_GROUP:
                yield GROUP_LR.found(*_group_evidence(group, ratio, usual))
                return


def _usual(groups: Sequence[Mapping[str, Any]]) -> float:
    """The rate of most parameters: the median over them."""
    ordered = sorted(groups, key=lambda g: float(g["highest"]))
    half, seen = sum(int(g["size"]) for g in ordered) / 2, 0
    for group in ordered:
        seen += int(group["size"])
        if seen >= half:
            return float(group["highest"])
    return math.nan


def _group_evidence(group: Mapping[str, Any], ratio: float, usual: float) -> tuple[Any, ...]:
    names = ", ".join(map(str, group.get("names", [])))
    text = f"the learning rate of {group['parameters']} parameters ({names}, ...) is "
    text += f"{float(group['highest']):.3g}, {ratio:.2g} times that of most, {usual:.3g}"
    blocks = group.get("blocks", [])
    block = blocks[0] if len(blocks) == 1 else None
    limit = HIGH_GROUP if ratio > 1 else LOW_GROUP
    return (GROUP_LR.evidence("lr", ratio, limit, text, step=0, block=block),)


_IDLE = "The schedule ends before the training does: its steps change nothing"

OPTIMIZER_MISMATCH = Rule(
    name="optimizer_mismatch",
    judge=optimizer_mismatch,
    needs=("inventory",),
    applies="runs whose optimizer is known",
    cause="parameters are in no optimizer",
    why="What no optimizer holds stays as it was initialised",
    remedy="make the optimizer after the model has all its parameters, from model.parameters(); "
    "freeze on purpose by requires_grad = False",
)
EVAL_MODE = Rule(
    name="eval_mode",
    judge=eval_mode,
    needs=("inventory",),
    applies="runs that were watched by `attach`",
    cause="trained in evaluation mode",
    why="Dropout does nothing, and BatchNorm normalises with running statistics that do not follow",
    remedy="call model.train() after every evaluation, before the next step",
)
GRADIENTS_NOT_ZEROED = Rule(
    name="gradients_not_zeroed",
    judge=gradients_not_zeroed,
    needs=("grad_kept",),
    applies="steps with one forward pass, after an update",
    cause="gradients are never set to zero",
    why="Each step follows the sum of all gradients so far, as momentum of 1 would",
    remedy="call optimizer.zero_grad() once per update, before the backward pass",
    thresholds=(LEAST_KEPT, KEPT),
)
LR_SCHEDULE = Rule(
    name="lr_schedule",
    judge=lr_schedule,
    needs=("lr",),
    applies="runs whose optimizer is known",
    cause="learning rate schedule",
    why="The step after the jump overshoots what the gradient knows",
    remedy="check the schedule's length and unit (steps or epochs): print the rate of every step",
    thresholds=(NO_RATE, *LEAST_IDLE, RATE_JUMP, BEFORE_JUMP),
)
STEPS_SKIPPED = Rule(
    name="steps_skipped",
    judge=steps_skipped,
    needs=("inventory", "grad_norm"),
    applies="runs that were watched by `attach`, with 10 recorded steps",
    cause="the loop no longer updates the weights",
    why="A step that is skipped changes nothing, whatever the loss says",
    remedy="look for the first non-finite gradient; lower the initial loss scale, or compute in "
    "bfloat16",
    thresholds=(LEAST_SKIPPED,),
)
GROUP_LR = Rule(
    name="group_lr",
    judge=group_lr,
    needs=("inventory",),
    applies="optimizers with several groups of parameters",
    cause="learning rate of one group out of scale",
    why="One part of the network moves by far more, or by far less, than the others can follow",
    remedy="give the group the rate of the others, and change it by small factors",
    thresholds=(HIGH_GROUP, FAR_GROUP, LOW_GROUP, LADDER),
)
