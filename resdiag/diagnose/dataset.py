"""Rules about what goes in and what is asked for: inputs, labels, the sign of the loss."""

import math

import numpy as np

from resdiag.diagnose.finding import Evidence, Finding, NotJudged, Outcome, confidence
from resdiag.diagnose.rundata import RunData

LARGEST_INPUT = 20.0
"""RMS of the input: standardised it is 1, pixels in 0..1 have 0.5, pixels in 0..255 about 100."""

LEAST_INPUT = 1e-4
"""RMS of the input below which it is lost beside any bias."""

LARGEST_OFFSET = 20.0
"""Mean of the input in units of its standard deviation."""

CONSTANT_LABELS = 0.999
"""Share of the most frequent label, in every recorded batch."""

LEAST_BATCHES = 3
"""Recorded batches before constant labels are believed."""

_SOURCE = "LeCun et al. 1998, Efficient BackProp, section 4.3; definition of the rule"


def data_fault(seen: RunData) -> Outcome:
    """The input is not finite, constant or not normalised, or every label is the same.

    Thresholds: RMS of the input above 20 or below 1e-4, or its mean above 20 standard deviations,
    at step 0; one label for 99.9 % of every batch, in 3 recorded batches or more.
    """
    yield from _input(seen)
    share = seen.series("label_share").dropna()
    if len(share) < LEAST_BATCHES:
        reason = f"labels: {len(share)} batches of class labels seen, {LEAST_BATCHES} needed"
        yield NotJudged("data_fault", reason, f"{LEAST_BATCHES} labelled batches")
    elif share.min() >= CONSTANT_LABELS:
        step, least = int(share.index[0]), float(share.min())
        text = f"every recorded batch has one label: its share is {least:.4g} at least"
        why = "Whatever the network is shown, one answer is right; it learns the bias of its head"
        yield _fault(
            "constant labels", "label_share", step, least, CONSTANT_LABELS, text, why, 0.95
        )


def loss_fault(seen: RunData) -> Outcome:
    """The loop maximises its loss: read off the logits it is minus a cross-entropy, first 3 times.

    A cross-entropy with one label a row and 3 classes or more shows it; other losses do not.
    """
    name = "loss_fault"
    losses = seen.series("head_loss").dropna()
    if losses.empty:
        yield NotJudged(name, "no cross-entropy could be read off the logits")
    elif len(losses) < LEAST_BATCHES:
        yield NotJudged(name, f"{len(losses)} losses read", f"{LEAST_BATCHES} steps")
    elif (losses.iloc[:LEAST_BATCHES] < 0).all():  # later ones saturate, and show no sign
        step, value = int(losses.index[0]), float(losses.iloc[0])
        text = f"the gradient at the logits is that of minus a cross-entropy of {-value:.3g}"
        why = "Gradient descent on minus a loss makes every answer worse without end"
        yield _fault("wrong sign of the loss", "head_loss", step, value, 0, text, why, 0.99, name)


def _input(seen: RunData) -> Outcome:
    broken = seen.series("data_nonfinite").dropna()
    means, stds = seen.series("data_mean").dropna(), seen.series("data_std").dropna()
    if broken.empty:
        yield NotJudged("data_fault", "input: no floating-point input was recorded")
        return
    if (broken > 0).any():
        step = int(broken.index[int((broken > 0).to_numpy().argmax())])
        text = f"a share of {float(broken[step]):.2g} of the input is not finite at step {step}"
        why = "A NaN spreads to everything that is computed from it, normalisations first"
        yield _fault(
            "non-finite input", "data_nonfinite", step, float(broken[step]), 0, text, why, 0.99
        )
        return
    if means.empty or stds.empty:
        return
    step = int(means.index[0])
    mean, std = float(means.iloc[0]), float(stds.iloc[0])
    rms = math.hypot(mean, std)
    words = f"the input has mean {mean:.3g} and standard deviation {std:.3g} at step {step}"
    if float(np.nanmax(stds)) <= 1e-6 * max(abs(mean), 1e-30):
        why = "A constant input carries no information; only labels' frequencies can be learned"
        yield _fault("constant input", "data_std", step, std, 0, words, why, 0.95)
    elif rms > LARGEST_INPUT or rms < LEAST_INPUT:
        limit = LARGEST_INPUT if rms > LARGEST_INPUT else LEAST_INPUT
        why = "Weights and learning rates are made for inputs of size 1: standardise the input"
        sure = confidence(rms, limit)
        yield _fault("input not normalised", "data_std", step, rms, limit, words, why, sure)
    elif abs(mean) > LARGEST_OFFSET * std:
        why = "A mean far larger than the spread hides it: subtract the mean"
        sure = confidence(abs(mean) / std, LARGEST_OFFSET)
        ratio = abs(mean) / std
        yield _fault(
            "input not centred", "data_mean", step, ratio, LARGEST_OFFSET, words, why, sure
        )


def _fault(
    cause: str,
    metric: str,
    step: int,
    value: float,
    threshold: float,
    text: str,
    why: str,
    sure: float,
    name: str = "data_fault",
) -> Finding:
    evidence = Evidence(
        metric=metric, step=step, value=value, threshold=threshold, text=text, source=_SOURCE
    )
    return Finding(
        name=name,
        step=step,
        cause=cause,
        summary=f"{cause[:1].upper()}{cause[1:]}: {text}.",
        why=why + ".",
        evidence=(evidence,),
        next=("look at one batch as the model gets it: range, mean, labels",),
        confidence=sure,
    )
