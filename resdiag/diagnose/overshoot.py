"""Evidence that steps are too large: a loss that gets worse, steps that replace the weights."""

import math

import numpy as np
import pandas as pd

from resdiag.diagnose.finding import DEFINITION, Evidence, Threshold
from resdiag.diagnose.progress import (
    has_fallen,
    is_falling,
    span_words,
)
from resdiag.diagnose.rundata import RunData, first_step
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
BESIDE_MEDIAN = Threshold(20.0, "The same of one block, in units of the median block's.")
PATIENCE = Threshold(100, "Steps in which a loss that got worse, and falls again, may come back.")
SOURCE = "You et al. 2017, arXiv:1708.03888; " + DEFINITION


def loss_got_worse(seen: RunData, losses: "pd.Series[float]") -> Evidence | None:
    """A mean loss of the last fifth of the steps that is 1.5 times the first and ln K."""
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
    since = first_step((known > bar) & (onward > bar))
    text = f"the mean loss of the last {span_words(last)} is {last.mean():.3g}, "
    text += f"it began at {float(known.iloc[0]):.3g}; above {bar:.3g} since step {since}"
    return evidence_of("loss", since, float(last.mean()), bar, text)


def recovers(losses: "pd.Series[float]", updates: "pd.Series[float]") -> bool:
    """Whether a loss that got worse falls again, before 100 steps and by steps of usual size.

    Args:
        losses: By step.
        updates: Of the median block, by recorded step.
    """
    known = losses[np.isfinite(losses)]
    half = known.iloc[len(known) // 2 :]
    late = updates[updates.index >= half.index[0]] if len(half) else updates
    gentle = len(late) > 0 and late.max() < LARGE_STEP
    return gentle and len(known) < PATIENCE and is_falling(half, abs(float(known.iloc[0])))


def learning_undone(
    seen: RunData, losses: "pd.Series[float]", updates: "pd.Series[float]"
) -> Evidence | None:
    """A large step after which the loss is far above the least that it had come to.

    The mean loss of the last fifth is 1.5 times that of the best fifth before, and has risen by a
    tenth of what the run began with.
    """
    known = losses[np.isfinite(losses)]
    if len(known) < SETTLED:
        return None
    fifth = len(known) // 5
    means = known.rolling(fifth).mean().iloc[fifth - 1 :]
    best, end = float(means.min()), float(means.iloc[-1])
    since = int(means.index[int(means.to_numpy().argmin())])
    large = updates[(updates.index > since) & (updates >= LARGE_STEP)]
    if large.empty or not end > max(WORSE * best, best + 0.1 * abs(float(known.iloc[0]))):
        return None
    at = int(large.index[0])
    text = f"step {at} moves the median block by {large[at]:.2g} of its weights: "
    text += f"the mean loss was {best:.3g} at step {since}, it is {end:.3g} at the end"
    return evidence_of("update_ratio", at, float(large[at]), LARGE_STEP, text)


def loss_peaked(seen: RunData, losses: "pd.Series[float]") -> Evidence | None:
    """A loss that peaks at 8 times the first and ln K."""
    known = losses[np.isfinite(losses)]
    if len(known) < 2 or not seen.classes:
        return None
    bar = PEAK * max(float(known.iloc[0]), math.log(seen.classes))
    if not known.max() > bar:
        return None
    top = int(known.index[int(known.to_numpy().argmax())])
    text = f"the loss peaks at {known.max():.3g} at step {top}, it began at {known.iloc[0]:.3g}"
    return evidence_of("loss", first_step(known > bar), float(known.max()), bar, text)


def replaces_weights(updates: "pd.Series[float]", losses: "pd.Series[float]") -> list[Evidence]:
    """Steps that replace the weights: most of them by half while nothing is learned, or one."""
    whole = updates > WHOLE_STEP
    if len(updates) >= 3 and whole.mean() > 0.5 and len(losses) and not has_fallen(losses):
        value = float(updates.median())
        text = f"the median step moves the median block by {value:.2g} of its weights"
        return [evidence_of("update_ratio", first_step(whole), value, WHOLE_STEP, text)]
    if len(updates) and updates.max() >= REPLACING_STEP:
        at = first_step(updates >= REPLACING_STEP)
        text = f"step {at} moves the median block by {updates[at]:.2g} of its weights"
        return [evidence_of("update_ratio", at, float(updates[at]), REPLACING_STEP, text)]
    return []


def replaces_one_block(seen: RunData) -> list[Evidence]:
    """A step that moves one block by more than its weights, and 20 times as far as the others.

    As in a group of parameters with a learning rate of its own. Weights that are still zero are
    left out: their first step is infinite, and their second one whole.
    """
    updates = seen.table("update_ratio").dropna(how="all")
    if len(updates.columns) < 2:
        return []
    # the step after the first of weights that began at zero is as large as they are
    grown = updates.where((updates < math.inf) & (updates.shift(1) != math.inf))
    others = updates.median(axis=1)
    alone = grown.gt(REPLACING_STEP) & grown.gt(BESIDE_MEDIAN * others, axis=0)
    if not alone.any(axis=None):
        return []
    at = first_step(alone.any(axis=1))
    block = int(alone.columns[int(alone.loc[at].to_numpy().argmax())])
    value = float(updates[block][at])
    text = f"step {at} moves {seen.name(block)} by {value:.2g} of its weights, the median block by "
    text += f"{others[at]:.2g}: has it a learning rate of its own?"
    return [evidence_of("update_ratio", at, value, REPLACING_STEP, text, block)]


def large_step_before(seen: RunData, updates: "pd.Series[float]", step: int) -> Evidence | None:
    """A step that was too large before a breakdown that did not come out of nothing."""
    if step == 0 or _is_sudden(seen, step):
        return None
    before = updates[updates.index < step]
    if len(before) and before.max() >= LARGE_STEP:
        at = first_step(before >= LARGE_STEP)
        text = f"step {at} moved the median block by {before[at]:.2g} of its weights"
        return evidence_of("update_ratio", at, float(before[at]), LARGE_STEP, text)
    kick = seen.scalar("lr", 0) * seen.scalar("grad_norm", 0)
    if not len(before) and kick >= CRITICAL:
        text = f"lr x ||g_0|| = {kick:.3g} at step 0"
        return evidence_of("lr_grad_norm", 0, kick, CRITICAL, text)
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


def evidence_of(
    metric: str, step: int, value: float, threshold: float, text: str, block: int | None = None
) -> Evidence:
    """A number of a rule about steps, with their common source."""
    return Evidence(
        metric=metric, step=step, block=block, value=value, threshold=threshold, text=text,
        source=SOURCE,
    )  # fmt: skip
