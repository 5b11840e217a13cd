"""Rules about the step: a learning rate that is too high or too low, too much weight decay."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from resdiag.diagnose.breakdown import find_breakdown
from resdiag.diagnose.finding import Evidence, Finding, Outcome, Rule, Threshold
from resdiag.diagnose.freezing import without_gradient
from resdiag.diagnose.overshoot import (
    BESIDE_MEDIAN,
    LARGE_STEP,
    PATIENCE,
    PEAK,
    REPLACING_STEP,
    SETTLED,
    SOURCE,
    SUDDEN,
    WHOLE_STEP,
    WORSE,
    evidence_of,
    large_step_before,
    learning_undone,
    loss_got_worse,
    loss_peaked,
    recovers,
    replaces_one_block,
    replaces_weights,
)
from resdiag.diagnose.progress import FALLEN, find_doubts, has_fallen
from resdiag.diagnose.rundata import RunData, first_step

USUAL_STEP = Threshold(
    1e-3, "Update over weights of the first step at the learning rate that is proposed."
)
LEAST_STEP = Threshold(3e-6, "Update over weights, the largest of all steps and blocks.")
STILL = (
    Threshold(0.9, "loss at the end over the beginning, below which something moves the weights"),
    Threshold(1.2, "the same, above which something moves the weights"),
)

LEAST_STEPS = Threshold(10, "Recorded steps before updates are called too small.")
LARGEST_DECAY = Threshold(
    0.01,
    "Learning rate times weight decay: the share of the weights that each step takes away.",
)
DECAY_SHARE = Threshold(
    0.25,
    "What the decay takes over what the step moves, in all: the largest of the first steps.",
)
FIRST_STEPS = Threshold(
    3,
    "Recorded steps, from where the decay is that large, of which the largest counts.",
)


def lr_too_high(seen: RunData) -> Outcome:
    """Steps are too large: the loss gets worse, or breaks down, and the weights are replaced.

    Any of: (1) the mean loss of the last fifth of the steps, 20 steps or more, is 1.5 times that of
    step 0 and that of guessing, unless it falls again, in 100 steps; (2) the loss peaks at 8 times
    those; (3) the run breaks down, not out of nothing, and before it a step moved the median block
    by 10 % of its weights or, at step 0, lr x ||g_0|| >= 0.6; (4) such a step undoes what the run
    had learned: the loss is 1.5 times its best since; (5) a step replaces half of the median
    block's weights at most of the steps while nothing is learned; (6) one step moves the median
    block by more than its weights, or one block so and 20 times as far as the median. All need a
    step of 1e-3 at least, if steps are known. But for (3) and (4), not where the run shows in the
    end that it learned. Its step is the first at which one of these thresholds was crossed.
    """
    losses = seen.series("loss")
    updates = seen.median_updates
    if len(losses) < 3 and updates.empty and not seen.steps:
        yield LR_TOO_HIGH.not_judged("neither losses nor updates were recorded")
        return
    if len(updates) and not float(seen.table("update_ratio").max().max()) > 1e-3:
        return  # whatever gets worse, it is not the steps
    broken, undone = find_breakdown(seen), learning_undone(seen, losses, updates)
    if not broken and undone is None and not find_doubts(seen):
        return
    worse, peak = loss_got_worse(seen, losses), loss_peaked(seen, losses)
    if worse and not (broken or undone or peak) and recovers(losses, updates):
        reason = "the loss is above that of guessing, and falls again"
        yield LR_TOO_HIGH.not_judged(reason, f"{PATIENCE} steps")
        return
    evidence = [e for e in (undone, worse, peak) if e is not None]
    if broken and (large := large_step_before(seen, updates, broken[0].step or 0)) is not None:
        evidence = [large, *evidence, *broken[:2]]
    evidence = evidence or replaces_weights(updates, losses) or replaces_one_block(seen)
    if evidence:
        yield _explain_rate(seen, evidence, updates)
    elif len(losses) < SETTLED:
        reason = f"whether the loss gets worse: {len(losses)} losses, {SETTLED} needed"
        yield LR_TOO_HIGH.not_judged(reason, f"{SETTLED} steps")


def _explain_rate(
    seen: RunData, evidence: Sequence[Evidence], updates: "pd.Series[float]"
) -> Finding:
    since = min(e.step for e in evidence if e.step is not None)
    rates = seen.series("lr").dropna()
    before = rates[rates.index <= since]
    lr = float(before.iloc[-1]) if len(before) else seen.lr
    momentum = seen.series("momentum").max() if len(seen.series("momentum")) else math.nan
    rate = "A" if math.isnan(lr) else f"At learning rate {lr:.3g} a"
    cause, why = "", f"{rate} step overshoots what the gradient knows"
    if momentum > 0.99:
        cause = f"momentum {momentum:g} makes every step {1 / (1 - momentum):.0f} times as long"
        why = cause[:1].upper() + cause[1:]
    remedy = LR_TOO_HIGH.remedy
    moved = updates[(updates > 0) & np.isfinite(updates)]
    # an update is proportional to the rate
    gentle = lr * USUAL_STEP / float(moved.iloc[0]) if len(moved) else math.inf
    if gentle < lr / 10:
        remedy = f"learning rate {gentle:.2g}: the first step then moves 0.1 % of the weights"
    elif lr > 0:
        remedy += f": {lr / 10:.2g}"
    block = evidence[0].block if len(evidence) == 1 else None
    finding = LR_TOO_HIGH.found(*evidence, cause=cause, why=why, next=(f"{remedy} (not tried)",))
    return replace(finding, step=since, block=block)


def lr_too_low(seen: RunData) -> Outcome:
    """No step moves any block by 3e-6 of its weights, and the loss stays, in 10 steps.

    Where weight decay alone moves more, by three times what it moves. Also where no optimizer was
    seen to step at all while gradients were recorded. Not where no block requires a gradient, nor
    where the loss has fallen: as in a linear probe.
    """
    updates = seen.table("update_ratio").dropna(how="all")
    losses, rates = seen.series("loss"), seen.series("lr").dropna()
    idle = rates.empty and len(seen.series("grad_norm").dropna()) >= LEAST_STEPS
    if updates.empty and not idle:
        yield LR_TOO_LOW.not_judged(*seen.why_no_updates)
        return
    largest = 0.0 if idle else float(updates.max().max())
    if not largest < _least_step(seen) or _changed(losses) or has_fallen(losses):
        return
    if not idle and len(updates) < LEAST_STEPS:
        return
    gradient = seen.table("grad_param")
    if len(without_gradient(seen, "grad_output")) == len(seen.indices):
        reason = "no watched block requires a gradient: taken for a linear probe"
        yield LR_TOO_LOW.not_judged(reason)
        return
    norms = seen.series("grad_norm").dropna()
    lr = float(rates.max()) if len(rates) else math.nan
    if largest == 0 and not (gradient > 0).any(axis=None):
        cause, why = "no gradient reaches the blocks", "They require one: detached behind the last?"
    elif idle or largest == 0:
        cause, why = "no optimizer step", "No optimizer was seen to move any watched parameter"
    elif len(norms) and norms.median() < 1e-4:
        cause = "gradients almost 0 before the step"
        why = f"The gradient's norm is {norms.median():.2g} where the optimizer reads it: clipped?"
    else:
        cause, why = LR_TOO_LOW.cause, f"At learning rate {lr:.3g} nothing moves"
    text = f"the largest update of any block is {largest:.2g} of its weights in "
    text += f"{len(seen.steps)} recorded steps"
    item = evidence_of("update_ratio", seen.steps[0], largest, _least_step(seen), text)
    yield LR_TOO_LOW.found(
        item,
        cause=cause,
        why=why,
        next=("about 1e-3 of the weights is usual: resdiag plot updates",),
    )


def weight_decay_too_large(seen: RunData) -> Outcome:
    """Learning rate times weight decay takes 1 % of the weights or more in the median step.

    And a quarter at least of what the steps move once it does: else it is the learning rate.
    """
    rates, decays = seen.series("lr"), seen.series("weight_decay")
    if decays.dropna().empty:
        yield WEIGHT_DECAY_TOO_LARGE.not_judged(*seen.why_no_updates)
        return
    taken = (rates * decays).dropna()
    value = float(taken.median()) if len(taken) else math.nan
    updates = seen.median_updates
    if value >= LARGEST_DECAY:
        since = first_step(taken >= LARGEST_DECAY)
        # of more steps momentum would sum up the decay; a single one may have no gradient yet
        moved = updates[updates.index >= since].iloc[: int(FIRST_STEPS)]
        if len(moved) and taken[since] < DECAY_SHARE * moved.max():
            return  # such a learning rate moves the weights by far more than the decay does
        text = f"lr x weight decay = {value:.2g}: each step takes that share of the weights away"
        item = evidence_of("weight_decay", since, value, LARGEST_DECAY, text)
        yield WEIGHT_DECAY_TOO_LARGE.found(item)


def _changed(losses: "pd.Series[float]") -> bool:
    """Whether the loss has moved by more than the batches do: something moves the weights."""
    known = losses[np.isfinite(losses)]
    if len(known) < 2:
        return False
    fifth = max(1, len(known) // 5)
    return not STILL[0] < known.iloc[-fifth:].mean() / known.iloc[:fifth].mean() < STILL[1]


def _least_step(seen: RunData) -> float:
    """The update below which nothing is learned: more than weight decay alone makes."""
    decay = (seen.series("lr") * seen.series("weight_decay")).dropna()
    momentum = seen.series("momentum").dropna()
    long = 1 - min(0.99, float(momentum.max())) if len(momentum) else 1.0
    alone = float(decay.max()) / long if len(decay) else 0.0
    return max(LEAST_STEP, 3 * alone) if alone < LARGEST_DECAY / 10 else LEAST_STEP


LR_TOO_HIGH = Rule(
    name="lr_too_high",
    judge=lr_too_high,
    needs=("loss", "update_ratio", "grad_norm"),
    cause="learning rate too high",
    why="A step overshoots what the gradient knows",
    remedy="the same at a tenth of the learning rate",
    plots=("curves", "updates"),
    thresholds=(
        WORSE,
        SETTLED,
        PATIENCE,
        PEAK,
        WHOLE_STEP,
        LARGE_STEP,
        SUDDEN,
        REPLACING_STEP,
        BESIDE_MEDIAN,
        USUAL_STEP,
        FALLEN,
    ),
    source=SOURCE,
)
LR_TOO_LOW = Rule(
    name="lr_too_low",
    judge=lr_too_low,
    needs=("update_ratio", "grad_norm"),
    applies="runs whose optimizer is known",
    cause="learning rate too low",
    why="Nothing moves",
    remedy="raise the learning rate until a step moves about 1e-3 of the weights; check that "
    "gradients reach the optimizer",
    plots=("updates",),
    thresholds=(LEAST_STEP, *STILL, LEAST_STEPS),
    source=SOURCE,
)
WEIGHT_DECAY_TOO_LARGE = Rule(
    name="weight_decay_too_large",
    judge=weight_decay_too_large,
    needs=("lr", "weight_decay"),
    applies="runs whose optimizer is known",
    cause="weight decay too large",
    why="The weights shrink faster than the gradient can rebuild them",
    remedy="lower the weight decay",
    plots=("updates",),
    thresholds=(LARGEST_DECAY, DECAY_SHARE, FIRST_STEPS),
    source=SOURCE,
)
