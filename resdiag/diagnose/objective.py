"""Rules about the loss: its sign, what it takes for logits and labels, and what it is summed over.

All is read off the gradient at the logits, (p - y) / N for a mean cross-entropy: the loss itself is
computed outside the model, where no hook is.
"""

import math

import numpy as np
import pandas as pd

from resdiag.diagnose.breakdown import find_breakdown
from resdiag.diagnose.finding import Evidence, Finding, Outcome, Rule, Threshold
from resdiag.diagnose.overshoot import LARGE_STEP, SUDDEN
from resdiag.diagnose.progress import find_doubts
from resdiag.diagnose.rundata import RunData, first_step, held_since, trailing
from resdiag.runs.watched_config import WatchedConfig

LEAST_BATCHES = Threshold(3, "Recorded batches before a property of the loss is believed.")
ALL_ROWS = Threshold(0.8, "Share of rows, and of recorded steps, that have to fit.")
COPIES = Threshold(0.99, "Share of labels that equal the input, in every recorded batch.")
SUMMED = Threshold(8.0, "Factor on the mean cross-entropy, where a step is too large for it.")


def loss_fault(seen: RunData) -> Outcome:
    """The loss does not fit what it is given: see the causes.

    - *wrong sign of the loss*: 3 gradients in a row are those of minus a cross-entropy;
    - *softmax twice*, *activation on the logits*: the gradient is that of a cross-entropy of what
      an activation made of the logits, in 3 recorded steps or more;
    - *every label is ignored*: no row of the logits has a gradient;
    - *the targets are the input*: of a language model, the label of a place is its own token;
    - *the loss is not finite*: it is not, while everything before it is and has its usual size;
    - *the loss is summed over the batch*: the gradient is 8 times that of a mean or more, and the
      run breaks down or its steps are too large.

    All but the last two need a cross-entropy with one label a row and 3 classes or more.
    """
    losses = seen.series("head_loss").dropna()
    found = (
        _sign(losses)
        or _activation(seen)
        or _ignored(seen)
        or _copies(seen)
        or _not_finite(seen)
        or _summed(seen)
    )
    if found is not None:
        yield found
    elif losses.empty:
        yield LOSS_FAULT.not_judged("no cross-entropy could be read off the logits")
    elif len(losses) < LEAST_BATCHES:
        yield LOSS_FAULT.not_judged(f"{len(losses)} losses read", f"{LEAST_BATCHES} steps")


def _sign(losses: "pd.Series[float]") -> Finding | None:
    least = int(LEAST_BATCHES)
    negative = (losses < 0).astype(float).rolling(least).sum().to_numpy() >= least
    if not negative.any():
        return None
    at = int(negative.argmax()) - least + 1
    step, value = int(losses.index[at]), float(losses.iloc[at])
    text = f"the gradient at the logits is that of minus a cross-entropy of {-value:.3g}"
    item = LOSS_FAULT.evidence("head_loss", value, 0, text, step=step)
    return _fault(LOSS_FAULT.cause, item, LOSS_FAULT.why)


def _activation(seen: RunData) -> Finding | None:
    """What the loss takes for logits is the output of an activation, in the model or behind it."""
    behind, name = seen.series("output_loss").dropna(), seen.inventory.get("activation")
    twice = seen.series("softmax_twice").dropna()
    if name and len(behind) >= LEAST_BATCHES:
        step, value = int(behind.index[0]), float(behind.iloc[0])
        text = f"the model ends with {name}, and the gradient there is that of a cross-entropy "
        text += f"of {value:.3g} which takes it for logits"
        item = LOSS_FAULT.evidence("output_loss", value, math.nan, text, step=step)
        softmax = name == "softmax"
        cause = "softmax twice" if softmax else f"activation on the logits: {name}"
        return _fault(cause, item, _TWICE if softmax else _BOUNDED)
    fits = twice >= ALL_ROWS
    if len(twice) >= LEAST_BATCHES and fits.mean() >= ALL_ROWS:
        step, value = first_step(fits), float(twice.median())
        text = f"{value:.0%} of the rows of the gradient at the logits are those of a "
        text += "cross-entropy of probabilities, which takes them for logits"
        item = LOSS_FAULT.evidence("softmax_twice", value, ALL_ROWS, text, step=step)
        return _fault("softmax twice", item, _TWICE)
    return None


def _ignored(seen: RunData) -> Finding | None:
    ignored = seen.series("rows_ignored").dropna()
    count = trailing(ignored >= 1)
    if count < LEAST_BATCHES:
        return None
    since = held_since(ignored >= 1)
    told = seen.series("loss")
    lost = told[told.index >= since].isna().any()
    if since != ignored.index[0] and not lost:
        return None  # a network that has learned its labels to the last bit
    text = f"no row of the logits has a gradient from step {since} on, in {count} recorded steps"
    item = LOSS_FAULT.evidence("rows_ignored", 1.0, 1.0, text, step=since)
    return _fault("every label is ignored", item, "Without a label there is nothing to learn")


def _copies(seen: RunData) -> Finding | None:
    copies = seen.series("label_copies").dropna()
    if len(copies) < LEAST_BATCHES or copies.min() < COPIES:
        return None
    value = float(copies.min())
    text = f"{value:.0%} of the labels or more are the token that the model gets at that place"
    item = LOSS_FAULT.evidence("label_copies", value, COPIES, text, step=int(copies.index[0]))
    why = "The network learns to copy: shift the labels by one, or mask what it has to predict"
    return _fault("the targets are the input", item, why)


def _not_finite(seen: RunData) -> Finding | None:
    losses, broken = seen.series("loss"), seen.first_nonfinite
    lost = losses.isna() | np.isinf(losses)
    if not lost.any() or not isinstance(seen.run.config, WatchedConfig):
        return None  # the loss of `resdiag run` is torch's own
    step = first_step(lost)
    if broken is not None and broken.direction == "forward" and broken.step <= step:
        return None
    outputs, sizes = seen.profile("output_nonfinite", step), seen.table("output_channel_std")
    before = sizes[sizes.index < step].max(axis=1)
    now = sizes.max(axis=1).get(step, math.nan)
    if outputs.empty or (outputs > 0).any() or not math.isfinite(now):
        return None
    if len(before) and not now <= SUDDEN * before.iloc[:3].median():
        return None
    norms = seen.series("grad_norm")
    earlier = norms[norms.index < step].dropna()
    moved = seen.table("update_ratio").max(axis=1)
    if not np.isfinite(earlier).all() or (moved[moved.index < step] >= 1).any():
        return None
    value = float(losses[step])
    text = f"the loss is {value} at step {step}, while every block's output is finite and of its "
    text += "usual size"
    item = LOSS_FAULT.evidence("loss", value, math.inf, text, step=step)
    why = "The number that is not finite comes from the loss: a logarithm or a root of 0, a "
    why += "division by a count of 0, a label out of range"
    return _fault("the loss is not finite", item, why)


def _summed(seen: RunData) -> Finding | None:
    factors = seen.series("head_factor").dropna().iloc[: int(LEAST_BATCHES)]
    if factors.empty or factors.min() < SUMMED:
        return None
    moved = seen.table("update_ratio").max(axis=1).dropna()
    large = bool(len(moved)) and float(moved.max()) >= LARGE_STEP
    if not (find_breakdown(seen) or (large and find_doubts(seen))):
        return None
    value = float(factors.median())
    text = f"the gradient at the logits is {value:.3g} times that of the mean cross-entropy"
    item = LOSS_FAULT.evidence("head_factor", value, SUMMED, text, step=int(factors.index[0]))
    why = "A sum over the batch makes every step as many times as long: take the mean, or divide "
    why += "the learning rate by the size of the batch"
    return _fault("the loss is summed over the batch", item, why)


def _fault(cause: str, item: Evidence, why: str) -> Finding:
    return LOSS_FAULT.found(item, summary=f"{cause}: {item.text}", cause=cause, why=why)


_TWICE = (
    "Probabilities taken for logits differ by 1 at most: the loss cannot fall far, and its "
    "gradient is small"
)
_BOUNDED = "What the activation cuts off cannot be told apart, and gets no gradient"

LOSS_FAULT = Rule(
    name="loss_fault",
    judge=loss_fault,
    needs=("head_loss",),
    applies="a cross-entropy of 3 classes or more, read off the logits; any loss that is told",
    cause="wrong sign of the loss",
    why="Gradient descent on minus a loss makes every answer worse without end",
    remedy="hand the loss the output of the last linear layer as it is, and the mean over labels",
    thresholds=(LEAST_BATCHES, ALL_ROWS, COPIES, SUMMED, LARGE_STEP, SUDDEN),
)
