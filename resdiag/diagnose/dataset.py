"""Rules about the data and the objective: inputs, labels, the sign of the loss."""

import math

import numpy as np

from resdiag.diagnose.finding import Evidence, Finding, Outcome, Rule, Threshold
from resdiag.diagnose.rundata import RunData

LARGEST_INPUT = Threshold(
    20.0,
    "RMS of the input: standardised it is 1, pixels in 0..1 have 0.5, pixels in 0..255 about 100.",
)
LEAST_INPUT = Threshold(1e-4, "RMS of the input below which it is lost beside any bias.")
LARGEST_OFFSET = Threshold(20.0, "Mean of the input in units of its standard deviation.")
CONSTANT_LABELS = Threshold(0.999, "Share of the most frequent label, in every recorded batch.")
LEAST_BATCHES = Threshold(3, "Recorded batches before constant labels are believed.")


def data_fault(seen: RunData) -> Outcome:
    """The input is not finite, constant or not normalised, or every label is the same.

    Thresholds: RMS of the input above 20 or below 1e-4, or its mean above 20 standard deviations,
    at step 0; one label for 99.9 % of every batch, in 3 recorded batches or more.
    """
    yield from _input(seen)
    share = seen.series("label_share").dropna()
    if len(share) < LEAST_BATCHES:
        reason = f"labels: {len(share)} batches of class labels seen, {LEAST_BATCHES} needed"
        yield DATA_FAULT.not_judged(reason, f"{LEAST_BATCHES} labelled batches")
    elif share.min() >= CONSTANT_LABELS:
        step, least = int(share.index[0]), float(share.min())
        text = f"every recorded batch has one label: its share is {least:.4g} at least"
        why = "Whatever the network is shown, one answer is right; it learns the bias of its head"
        seen_in = DATA_FAULT.evidence("label_share", least, CONSTANT_LABELS, text, step=step)
        yield _fault("constant labels", seen_in, why)


def loss_fault(seen: RunData) -> Outcome:
    """The loop maximises its loss: read off the logits it is minus a cross-entropy, first 3 times.

    A cross-entropy with one label a row and 3 classes or more shows it; other losses do not.
    """
    losses = seen.series("head_loss").dropna()
    if losses.empty:
        yield LOSS_FAULT.not_judged("no cross-entropy could be read off the logits")
    elif len(losses) < LEAST_BATCHES:
        yield LOSS_FAULT.not_judged(f"{len(losses)} losses read", f"{LEAST_BATCHES} steps")
    elif (losses.iloc[: int(LEAST_BATCHES)] < 0).all():  # later ones saturate, and show no sign
        step, value = int(losses.index[0]), float(losses.iloc[0])
        text = f"the gradient at the logits is that of minus a cross-entropy of {-value:.3g}"
        sign = LOSS_FAULT.evidence("head_loss", value, 0, text, step=step)
        summary = f"{LOSS_FAULT.cause}: {text}"
        yield LOSS_FAULT.found(sign, summary=summary)


def _input(seen: RunData) -> Outcome:
    broken = seen.series("data_nonfinite").dropna()
    means, stds = seen.series("data_mean").dropna(), seen.series("data_std").dropna()
    if broken.empty:
        yield DATA_FAULT.not_judged("input: no floating-point input was recorded")
        return
    if (broken > 0).any():
        step = int(broken.index[int((broken > 0).to_numpy().argmax())])
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


def _fault(cause: str, item: Evidence, why: str) -> Finding:
    summary = f"{cause}: {item.text}"
    return DATA_FAULT.found(item, summary=summary, cause=cause, why=why)


_SOURCE = "LeCun et al. 1998, Efficient BackProp, section 4.3; definition of the rule"
_REMEDY = "look at one batch as the model gets it: range, mean, labels"

DATA_FAULT = Rule(
    name="data_fault",
    judge=data_fault,
    needs=("data_mean", "data_std", "data_nonfinite", "label_share"),
    cause="input or labels are broken",
    why="No network learns from inputs that are lost or labels that say nothing",
    remedy=_REMEDY,
    thresholds=(LARGEST_INPUT, LEAST_INPUT, LARGEST_OFFSET, CONSTANT_LABELS, LEAST_BATCHES),
    source=_SOURCE,
)
LOSS_FAULT = Rule(
    name="loss_fault",
    judge=loss_fault,
    needs=("head_loss",),
    applies="a cross-entropy of 3 classes or more, read off the logits",
    cause="wrong sign of the loss",
    why="Gradient descent on minus a loss makes every answer worse without end",
    remedy=_REMEDY,
    thresholds=(LEAST_BATCHES,),
    source=_SOURCE,
)
