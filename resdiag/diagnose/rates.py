"""Rules about the step: a learning rate that is too high or too low, too much weight decay."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from resdiag.diagnose.breakdown import find_breakdown
from resdiag.diagnose.finding import DEFINITION, Evidence, Finding, Outcome, Rule, Threshold
from resdiag.diagnose.progress import FALLEN, find_doubts, has_fallen
from resdiag.diagnose.rundata import RunData
from resdiag.theory.prediction import CRITICAL

WORSE = Threshold(
    1.5,
    "Mean loss of the last fifth of the steps over the loss at step 0 and over ln K.",
)
SETTLED = Threshold(
    20,
    "Steps before a higher loss counts: at depth 110 and rate 0.1 that of the first ten is "
    "passing.",
)
PEAK = Threshold(8.0, "Largest loss over the larger of ln K and the loss at step 0.")
WHOLE_STEP = Threshold(
    0.5,
    "Median over the blocks of update over weights: such a step replaces the weights.",
)
LARGE_STEP = Threshold(0.1, "The same before an explosion or beside a loss that got worse.")
SUDDEN = Threshold(
    30.0,
    "Growth of the largest activation in the step before a breakdown that is no sudden fault.",
)
REPLACING_STEP = Threshold(
    1.0,
    "The same in any one step: it moves the weights by more than they are.",
)
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
_SOURCE = "You et al. 2017, arXiv:1708.03888; " + DEFINITION


def lr_too_high(seen: RunData) -> Outcome:
    """Steps are too large: the loss gets worse, or breaks down, and the weights are replaced.

    Any of: (1) the mean loss of the last fifth of the steps, 20 steps or more, is 1.5 times that of
    step 0 and that of guessing; (2) the loss peaks at 8 times those; (3) the run breaks down, not
    out of nothing, and before it a step moved the median block by 10 % of its weights or, at
    step 0, lr x ||g_0|| >= 0.6; (4) a step replaces half of the median block's weights at most of
    the steps while nothing is learned; (5) one step moves the median block by more than its
    weights. All need a step of 1e-3 at least, if steps are known. Not where the run shows in the
    end that it learned. Its step is the first at which one of these thresholds was crossed.
    """
    losses = seen.series("loss")
    updates = _updates(seen)
    if len(losses) < 3 and updates.empty and not seen.steps:
        yield LR_TOO_HIGH.not_judged("neither losses nor updates were recorded")
        return
    if len(updates) and not updates.max() > 1e-3:
        return  # whatever gets worse, it is not the steps
    broken = find_breakdown(seen)
    if not broken and not find_doubts(seen):
        return
    evidence = [e for e in (_worse(seen, losses), _peak(seen, losses)) if e is not None]
    if broken and (large := _large_before(seen, updates, broken[0].step or 0)) is not None:
        evidence = [large, *evidence, *broken[:2]]
    evidence = evidence or _replaces(updates, losses)
    if evidence:
        yield _explain_rate(seen, evidence, updates)
    elif len(losses) < SETTLED:
        reason = f"whether the loss gets worse: {len(losses)} steps, {SETTLED} needed"
        yield LR_TOO_HIGH.not_judged(reason, f"{SETTLED} steps")


def _explain_rate(
    seen: RunData, evidence: Sequence[Evidence], updates: "pd.Series[float]"
) -> Finding:
    since = min(e.step for e in evidence if e.step is not None)
    rates = seen.series("lr").dropna()
    before = rates[rates.index <= since]
    lr = float(before.iloc[-1]) if len(before) else seen.lr
    momentum = seen.series("momentum").max() if len(seen.series("momentum")) else math.nan
    cause, why = "", f"At learning rate {lr:.3g} a step overshoots what the gradient knows"
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
    finding = LR_TOO_HIGH.found(*evidence, cause=cause, why=why, next=(f"{remedy} (not tried)",))
    return replace(finding, step=since, block=None)


def lr_too_low(seen: RunData) -> Outcome:
    """No step moves any block by 3e-6 of its weights, and the loss stays, in 10 steps.

    Where weight decay alone moves more, by three times what it moves. Also where no optimizer was
    seen to step at all while gradients were recorded.
    """
    updates = seen.table("update_ratio").dropna(how="all")
    losses, rates = seen.series("loss"), seen.series("lr").dropna()
    idle = rates.empty and len(seen.series("grad_norm").dropna()) >= LEAST_STEPS
    if updates.empty and not idle:
        yield LR_TOO_LOW.not_judged(*seen.why_no_updates)
        return
    largest = 0.0 if idle else float(updates.max().max())
    if not largest < _least_step(seen) or _changed(losses):
        return
    if not idle and len(updates) < LEAST_STEPS:
        return
    norms = seen.series("grad_norm").dropna()
    lr = float(rates.max()) if len(rates) else math.nan
    if largest == 0 and not (seen.table("grad_param") > 0).any(axis=None):
        cause, why = "no gradient reaches the blocks", "Detached, under no_grad, or frozen"
    elif idle or largest == 0:
        cause, why = "no optimizer step", "No optimizer was seen to move any watched parameter"
    elif len(norms) and norms.median() < 1e-4:
        cause = "gradients almost 0 before the step"
        why = f"The gradient's norm is {norms.median():.2g} where the optimizer reads it: clipped?"
    else:
        cause, why = LR_TOO_LOW.cause, f"At learning rate {lr:.3g} nothing moves"
    text = f"the largest update of any block is {largest:.2g} of its weights in "
    text += f"{len(seen.steps)} recorded steps"
    item = _evidence("update_ratio", seen.steps[0], largest, _least_step(seen), text)
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
    updates = _updates(seen)
    if value >= LARGEST_DECAY:
        since = _first(taken >= LARGEST_DECAY)
        # of more steps momentum would sum up the decay; a single one may have no gradient yet
        moved = updates[updates.index >= since].iloc[: int(FIRST_STEPS)]
        if len(moved) and taken[since] < DECAY_SHARE * moved.max():
            return  # such a learning rate moves the weights by far more than the decay does
        text = f"lr x weight decay = {value:.2g}: each step takes that share of the weights away"
        item = _evidence("weight_decay", since, value, LARGEST_DECAY, text)
        yield WEIGHT_DECAY_TOO_LARGE.found(item)


def _worse(seen: RunData, losses: "pd.Series[float]") -> Evidence | None:
    known = losses[np.isfinite(losses)]
    if len(known) < SETTLED:
        return None
    guess = math.log(seen.classes) if seen.classes else -math.inf
    last = known.iloc[-max(2, len(known) // 5) :]
    bar = WORSE * max(float(known.iloc[0]), guess)
    if not (bar > 0 and last.mean() > bar):
        return None
    # from there on it is above the bar in the mean
    onward = known.iloc[::-1].expanding().mean().iloc[::-1]
    since = _first((known > bar) & (onward > bar))
    text = f"the mean loss of the last {len(last)} steps is {last.mean():.3g}, "
    text += f"it began at {float(known.iloc[0]):.3g}; above {bar:.3g} since step {since}"
    return _evidence("loss", since, float(last.mean()), bar, text)


def _peak(seen: RunData, losses: "pd.Series[float]") -> Evidence | None:
    known = losses[np.isfinite(losses)]
    if len(known) < 2 or not seen.classes:
        return None
    bar = PEAK * max(float(known.iloc[0]), math.log(seen.classes))
    if not known.max() > bar:
        return None
    top = int(known.index[int(known.to_numpy().argmax())])
    text = f"the loss peaks at {known.max():.3g} at step {top}, it began at {known.iloc[0]:.3g}"
    return _evidence("loss", _first(known > bar), float(known.max()), bar, text)


def _replaces(updates: "pd.Series[float]", losses: "pd.Series[float]") -> list[Evidence]:
    """Steps that replace the weights: most of them by half while nothing is learned, or one."""
    whole = updates > WHOLE_STEP
    if len(updates) >= 3 and whole.mean() > 0.5 and len(losses) and not has_fallen(losses):
        value = float(updates.median())
        text = f"the median step moves the median block by {value:.2g} of its weights"
        return [_evidence("update_ratio", _first(whole), value, WHOLE_STEP, text)]
    if len(updates) and updates.max() >= REPLACING_STEP:
        at = _first(updates >= REPLACING_STEP)
        text = f"step {at} moves the median block by {updates[at]:.2g} of its weights"
        return [_evidence("update_ratio", at, float(updates[at]), REPLACING_STEP, text)]
    return []


def _first(crossed: "pd.Series[bool]") -> int:
    """The first step at which it is so."""
    return int(crossed.index[int(crossed.to_numpy().argmax())])


def _large_before(seen: RunData, updates: "pd.Series[float]", step: int) -> Evidence | None:
    """A step that was too large before a breakdown that did not come out of nothing."""
    if step == 0 or _is_sudden(seen, step):
        return None
    before = updates[updates.index < step]
    if len(before) and before.max() >= LARGE_STEP:
        at = _first(before >= LARGE_STEP)
        text = f"step {at} moved the median block by {before[at]:.2g} of its weights"
        return _evidence("update_ratio", at, float(before[at]), LARGE_STEP, text)
    kick = seen.scalar("lr", 0) * seen.scalar("grad_norm", 0)
    if not len(before) and kick >= CRITICAL:
        text = f"lr x ||g_0|| = {kick:.3g} at step 0"
        return _evidence("lr_grad_norm", 0, kick, CRITICAL, text)
    return None


def _is_sudden(seen: RunData, step: int) -> bool:
    """Whether everything was as usual in the recorded step before the breakdown.

    The largest RMS of an output and the largest gradient are within 30 times their medians so far.
    """
    for metric in ("output_channel_std", "grad_output"):
        table = seen.table(metric)
        before = table[table.index < step].max(axis=1)
        if before.empty or not before.iloc[-1] <= SUDDEN * before.iloc[:3].median():
            return False
    losses = seen.series("loss")
    before = losses[losses.index < step]
    return not len(before) or bool(before.iloc[-1] <= 2 * before.iloc[0] + 1)


def _updates(seen: RunData) -> "pd.Series[float]":
    """Median over the blocks of update over weights, by recorded step."""
    updates = seen.table("update_ratio").dropna(how="all")
    moving = updates.loc[:, (updates > 0).any()]
    return moving.median(axis=1).dropna()


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


def _evidence(metric: str, step: int, value: float, threshold: float, text: str) -> Evidence:
    return Evidence(
        metric=metric, step=step, value=value, threshold=threshold, text=text, source=_SOURCE
    )


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
        PEAK,
        WHOLE_STEP,
        LARGE_STEP,
        SUDDEN,
        REPLACING_STEP,
        USUAL_STEP,
        FALLEN,
    ),
    source=_SOURCE,
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
    source=_SOURCE,
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
    source=_SOURCE,
)
