"""Rules about the data: inputs and labels."""

import math

import numpy as np
import pandas as pd

from resdiag.diagnose.finding import Evidence, Finding, Outcome, Rule, Threshold
from resdiag.diagnose.rundata import RunData, first_step, held_since, trailing

LARGEST_INPUT = Threshold(
    20.0,
    "RMS of the input: standardised it is 1, pixels in 0..1 have 0.5, pixels in 0..255 about 100.",
)
LEAST_INPUT = Threshold(1e-4, "RMS of the input below which it is lost beside any bias.")
LARGEST_OFFSET = Threshold(20.0, "Mean of the input in units of its standard deviation.")
SAME_SAMPLES = Threshold(1e-5, "Spread between the samples of a batch over that of the input.")
CHANGED = (
    Threshold(5.0, "Standard deviation of the input over its median so far, or its inverse,"),
    Threshold(3.0, "or distance of its mean from the median so far, in such deviations."),
)
SPIKE = Threshold(10.0, "The same ratio of single batches.")
BEFORE_CHANGE = Threshold(5, "Recorded steps before a change of the input is one.")
CONSTANT_LABELS = Threshold(0.999, "Share of the most frequent label, in every recorded batch.")
LATE_LABELS = Threshold(10, "Batches of one label at the end, after others.")
LEAST_BATCHES = Threshold(3, "Recorded batches before constant labels are believed.")


def data_fault(seen: RunData) -> Outcome:
    """The input is broken, not normalised, or changes; or all samples, or all labels, are the same.

    - RMS of the input above 20 or below 1e-4, or its mean above 20 standard deviations, at the
      first step; a share of it that is not finite, at any;
    - *every sample is the same*: the samples of a batch do not differ, in the last 3 recorded
      batches or more;
    - *normalisation changes*: its standard deviation changes 5-fold, or its mean by 3 of them, and
      stays there; *input spikes*: single batches are 10 times as large as the others;
    - *constant labels*: one label for 99.9 % of every batch, in 3 recorded batches or more, or in
      the last 10.
    """
    outcomes = [*_input(seen), *_same_samples(seen), *_changes(seen)]
    yield from (one for one in outcomes if not isinstance(one, Finding))
    yield from [one for one in outcomes if isinstance(one, Finding)][:1]
    share = seen.series("label_share").dropna()
    # of a loss that is maximised the labels are not what the gradient shows
    share = share[~(seen.series("head_loss").reindex(share.index) < 0).cummax()]
    if len(share) < LEAST_BATCHES:
        reason = f"labels: {len(share)} batches of class labels seen, {LEAST_BATCHES} needed"
        yield DATA_FAULT.not_judged(reason, f"{LEAST_BATCHES} labelled batches")
        return
    count = trailing(share >= CONSTANT_LABELS)
    if count == len(share) or count >= LATE_LABELS:
        onward = share.iloc[len(share) - count :]
        step, least = int(onward.index[0]), float(onward.min())
        text = f"every recorded batch from step {step} on has one label: its share is {least:.4g} "
        text += "at least"
        why = "Whatever the network is shown, one answer is right; it learns the bias of its head"
        seen_in = DATA_FAULT.evidence("label_share", least, CONSTANT_LABELS, text, step=step)
        yield _fault("constant labels", seen_in, why)


def _input(seen: RunData) -> Outcome:
    broken = seen.series("data_nonfinite").dropna()
    means, stds = seen.series("data_mean").dropna(), seen.series("data_std").dropna()
    if broken.empty:
        yield DATA_FAULT.not_judged("input: no floating-point input was recorded")
        return
    if (broken > 0).any():
        step = first_step(broken > 0)
        share = float(broken[step])
        text = f"a share of {share:.2g} of the input is not finite at step {step}"
        why = "A NaN spreads to everything that is computed from it, normalisations first"
        item = DATA_FAULT.evidence("data_nonfinite", share, 0, text, step=step)
        yield _fault("non-finite input", item, why)
        return
    if means.empty or stds.empty:
        return
    step = int(means.index[0])
    mean, std = float(means.iloc[0]), float(stds.iloc[0])
    rms = math.hypot(mean, std)
    words = f"the input has mean {mean:.3g} and standard deviation {std:.3g} at step {step}"
    if float(np.nanmax(stds)) <= 1e-6 * max(abs(mean), 1e-30):
        why = "A constant input carries no information; only labels' frequencies can be learned"
        item = DATA_FAULT.evidence("data_std", std, 0, words, step=step)
        yield _fault("constant input", item, why)
    elif rms > LARGEST_INPUT or rms < LEAST_INPUT:
        limit = LARGEST_INPUT if rms > LARGEST_INPUT else LEAST_INPUT
        why = "Weights and learning rates are made for inputs of size 1: standardise the input"
        item = DATA_FAULT.evidence("data_std", rms, limit, words, step=step)
        yield _fault("input not normalised", item, why)
    elif abs(mean) > LARGEST_OFFSET * std:
        why = "A mean far larger than the spread hides it: subtract the mean"
        ratio = abs(mean) / std
        item = DATA_FAULT.evidence("data_mean", ratio, LARGEST_OFFSET, words, step=step)
        yield _fault("input not centred", item, why)


def _same_samples(seen: RunData) -> Outcome:
    between = seen.series("data_between").dropna()
    count = trailing(between <= SAME_SAMPLES)
    if count >= LEAST_BATCHES:
        since, value = held_since(between <= SAME_SAMPLES), float(between.iloc[-1])
        text = f"the samples of a batch do not differ from step {since} on"
        item = DATA_FAULT.evidence("data_between", value, SAME_SAMPLES, text, step=since)
        yield _fault("every sample is the same", item, "One sample, however often, teaches one")


def _changes(seen: RunData) -> Outcome:
    """The input's size or mean leaves what it was so far, for good or in single batches."""
    means, stds = (seen.series(name).dropna() for name in ("data_mean", "data_std"))
    stds = stds[stds.index.isin(means.index)]
    if len(stds) <= BEFORE_CHANGE:
        return
    # the median of what came before: a few spikes do not move it
    usual, middle = (s.expanding(int(BEFORE_CHANGE)).median().shift() for s in (stds, means))
    larger, other = stds / usual, _differs(stds, means, usual, middle)
    for cause, limit, off in (
        ("normalisation changes", CHANGED[0], other),
        ("input spikes", SPIKE, larger > SPIKE),
    ):
        if not off.any():
            continue
        at = first_step(off)
        # of a change that stays the median of all steps so far becomes what is usual
        late = stds.index >= at
        was = float(stds[~late].median()), float(means[stds.index][~late].median())
        away = _differs(stds[late], means, *was)
        stays = trailing(away) >= max(LEAST_BATCHES, 0.8 * len(away))
        if stays is (cause == "input spikes"):
            continue
        text = f"the input has mean {means[at]:.3g} and standard deviation {stds[at]:.3g} at step "
        text += f"{at}, before it {middle[at]:.3g} and {usual[at]:.3g} in the median"
        item = DATA_FAULT.evidence("data_std", float(larger[at]), limit, text, step=at)
        yield _fault(cause, item, "What was learned so far is of inputs of another size")
        return


def _differs(
    stds: "pd.Series[float]",
    means: "pd.Series[float]",
    usual: "pd.Series[float] | float",
    middle: "pd.Series[float] | float",
) -> "pd.Series[bool]":
    """Whether size or mean of the input are far from these, step by step."""
    ratio = stds / usual
    shift = (means[stds.index] - middle).abs() / usual
    return (ratio > CHANGED[0]) | (ratio < 1 / CHANGED[0]) | (shift > CHANGED[1])


def _fault(cause: str, item: Evidence, why: str) -> Finding:
    summary = f"{cause}: {item.text}"
    return DATA_FAULT.found(item, summary=summary, cause=cause, why=why)


_SOURCE = "LeCun et al. 1998, Efficient BackProp, section 4.3; definition of the rule"
_REMEDY = "look at one batch as the model gets it: range, mean, labels"

DATA_FAULT = Rule(
    name="data_fault",
    judge=data_fault,
    needs=("data_mean", "data_std", "data_nonfinite", "data_between", "label_share"),
    cause="input or labels are broken",
    why="No network learns from inputs that are lost or labels that say nothing",
    remedy=_REMEDY,
    thresholds=(
        *(LARGEST_INPUT, LEAST_INPUT, LARGEST_OFFSET, SAME_SAMPLES, *CHANGED, SPIKE),
        *(BEFORE_CHANGE, CONSTANT_LABELS, LATE_LABELS, LEAST_BATCHES),
    ),
    source=_SOURCE,
)
