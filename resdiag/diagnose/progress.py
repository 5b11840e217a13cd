"""Whether a run shows that it learns: enough steps, and a loss below guessing or one that falls."""

import math
from typing import TYPE_CHECKING

import numpy as np

from resdiag.diagnose.finding import Threshold

if TYPE_CHECKING:
    import pandas as pd

    from resdiag.diagnose.rundata import RunData

STALL = Threshold(0.02, "How far below ln K the loss is, in units of ln K, where guessing ends.")
FALLING = Threshold(
    0.005,
    "Fall of the loss over the steps looked at, in units of ln K, that is more than noise.",
)
FALLEN = Threshold(
    0.02,
    "Fall of the loss from the first fifth of the steps to the last, where no ln K is known, in "
    "units of the first.",
)
LEAST_LOSSES = Threshold(20, "Losses before a run can be called healthy.")
LEAST_RECORDED = Threshold(2, "Recorded steps after the first update, likewise.")
LEAST_CHECKS = Threshold(
    1 / 3, "Share of the rules that had all that they need before a run can be called healthy."
)
ERRORS = Threshold(3.0, "Standard errors that a fall of the loss exceeds.")


def find_doubts(seen: "RunData") -> list[str]:
    """What is missing to say that the run learns, in words; empty if it does."""
    found, losses = [], seen.series("loss")
    losses = losses[np.isfinite(losses)]
    recorded = sum(step > 0 for step in seen.steps)
    if recorded < LEAST_RECORDED:
        word = "step was" if recorded == 1 else "steps were"
        found.append(
            f"{recorded or 'no'} {word} recorded after the first update, {LEAST_RECORDED} needed"
        )
    if losses.empty:
        found.append("the loss is not known")
    elif len(losses) < LEAST_LOSSES:
        found.append(f"the loss of {len(losses)} steps is known, {LEAST_LOSSES} needed")
    elif seen.classes:
        last, guess = _ends(losses)[1], math.log(seen.classes)
        if not last.mean() < (1 - STALL) * guess:
            found.append(
                f"the mean loss of the last {len(last)} steps, {last.mean():.3g}, is not below that"
                f" of guessing, ln {seen.classes} = {guess:.3g}"
            )
    elif not has_fallen(losses):
        first, last = _ends(losses)
        found.append(
            f"the loss has not fallen: its mean is {first.mean():.3g} over the first {len(first)} "
            f"steps, {last.mean():.3g} over the last {len(last)}"
        )
    return found


def has_fallen(losses: "pd.Series[float]") -> bool:
    """Whether the last fifth lies below the first by 2 % and by 3 standard errors."""
    first, last = _ends(losses[np.isfinite(losses)])
    if not len(last):
        return False
    fall = float(first.mean() - last.mean())
    noise = math.sqrt(sum(part.var(ddof=0) / len(part) for part in (first, last)))
    return fall > max(FALLEN * abs(float(first.mean())), ERRORS * noise)


def is_falling(losses: "pd.Series[float]", unit: float) -> bool:
    """Whether a straight line through the losses falls by more than noise: 3 standard errors.

    Args:
        losses: By step.
        unit: What the fall is measured in, such as ln K.
    """
    y = losses.to_numpy(dtype=float)
    if len(y) < 3:
        return False
    x = np.arange(len(y)) - (len(y) - 1) / 2
    slope = float(x @ y / (x @ x))
    noise = float(np.std(y - y.mean() - slope * x)) / math.sqrt(float(x @ x))
    return slope < -ERRORS * noise and -slope * len(y) > FALLING * unit


def _ends(losses: "pd.Series[float]") -> tuple["pd.Series[float]", "pd.Series[float]"]:
    """The first and the last fifth."""
    fifth = max(1, len(losses) // 5)
    return losses.iloc[:fifth], losses.iloc[-fifth:]
