"""Whether a run shows that it learns: enough steps, and a loss below guessing or one that falls."""

import math
from typing import TYPE_CHECKING

import numpy as np

from resdiag.diagnose.finding import Threshold
from resdiag.diagnose.rundata import once_per_run

if TYPE_CHECKING:
    import pandas as pd

    from resdiag.diagnose.rundata import RunData

STALL = Threshold(0.02, "How far below ln K the loss is, in units of ln K, where guessing ends.")
STALL_STEPS = Threshold(50, "Steps of a stall, the least: healthy networks may guess that long.")
SETTLED_FALL = Threshold(
    0.03, "Fall of the loss over those steps in units of ln K, which two standard errors exclude."
)
FALLING = Threshold(
    0.005,
    "Fall of the loss over the steps looked at, in units of ln K, that is more than noise.",
)
FALLEN = Threshold(
    0.02,
    "Fall of the loss from the first fifth of the steps to the last, where no ln K is known, in "
    "units of the first.",
)
LEARNED = Threshold(
    0.9,
    "Mean loss of the last fifth of the steps over that of guessing, or of the first fifth, below "
    "which a condition did not keep the run from learning.",
)
LEAST_LOSSES = Threshold(20, "Losses before a run can be called healthy.")
LEAST_RECORDED = Threshold(2, "Recorded steps after the first update, likewise.")
LEAST_CHECKS = Threshold(
    1 / 3,
    "Share of the rules, without those that need the inventory alone, that had all that they need "
    "before a run can be called healthy.",
)
ERRORS = Threshold(3.0, "Standard errors that a fall of the loss exceeds.")


@once_per_run
def find_doubts(seen: "RunData") -> tuple[str, ...]:
    """What is missing to say that the run learns, in words; empty if it does."""
    found, losses = [], seen.cross_entropy
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
        if not is_below_guessing(losses, seen.classes):
            found.append(
                f"the mean loss of the last {span_words(last)}, {last.mean():.3g}, is not below "
                f"that of guessing, ln {seen.classes} = {guess:.3g}"
            )
    elif not has_fallen(losses):
        first, last = _ends(losses)
        found.append(
            f"the loss has not fallen: its mean is {first.mean():.3g} over the first "
            f"{span_words(first)}, {last.mean():.3g} over the last {span_words(last)}"
        )
    return tuple(found)


def count_steps(values: "pd.Series[float]") -> int:
    """How many steps values stand for that are known every few steps, such as logged losses.

    >>> import pandas as pd
    >>> count_steps(pd.Series(1.0, index=[0, 1, 2])), count_steps(pd.Series(1.0, index=[9, 19, 29]))
    (3, 30)
    """
    steps = values.index.to_numpy()
    if len(steps) < 2:
        return len(steps)
    return int(steps[-1] - steps[0] + np.median(np.diff(steps)))


def span_words(values: "pd.Series[float]") -> str:
    """The steps that values stand for, and how many values there are if those are fewer.

    >>> import pandas as pd
    >>> span_words(pd.Series(1.0, index=[0, 1, 2])), span_words(pd.Series(1.0, index=[9, 19, 29]))
    ('3 steps', '30 steps (3 values)')
    """
    steps = count_steps(values)
    return f"{steps} steps" + ("" if steps == len(values) else f" ({len(values)} values)")


def is_below_guessing(losses: "pd.Series[float]", classes: int) -> bool:
    """Whether the mean of the last fifth of the losses is below ln K, by 2 % or more.

    Args:
        losses: By step, the finite ones; at least one.
        classes: K.
    """
    return bool(_ends(losses)[1].mean() < (1 - STALL) * math.log(classes))


def has_learned(seen: "RunData") -> bool:
    """Whether the last losses are clearly below guessing; where that is unknown, the first ones."""
    losses = seen.cross_entropy
    losses = losses[np.isfinite(losses)]
    if losses.empty:
        return False
    first, last = _ends(losses)
    before = math.log(seen.classes) if seen.classes else float(first.mean())
    return float(last.mean()) < LEARNED * before


def has_fallen(losses: "pd.Series[float]") -> bool:
    """Whether the last fifth lies below the first by 2 % and by 3 standard errors."""
    first, last = _ends(losses[np.isfinite(losses)])
    if not len(last):
        return False
    fall = float(first.mean() - last.mean())
    noise = math.sqrt(sum(part.var(ddof=0) / len(part) for part in (first, last)))
    return fall > max(FALLEN * abs(float(first.mean())), ERRORS * noise)


def share_left(losses: "pd.Series[float]") -> float:
    """The mean of the last fifth over that of the first; NaN where the first is not above 0."""
    first, last = _ends(losses[np.isfinite(losses)])
    return float(last.mean() / first.mean()) if first.mean() > 0 else math.nan


def is_falling(losses: "pd.Series[float]", unit: float) -> bool:
    """Whether a straight line through the losses falls by more than noise: 3 standard errors.

    Args:
        losses: By step.
        unit: What the fall is measured in, such as ln K.
    """
    fall, error = fall_of_line(losses)
    return fall > ERRORS * error and fall > FALLING * unit


def fall_of_line(losses: "pd.Series[float]") -> tuple[float, float]:
    """How far a straight line through the losses falls from end to end, and its standard error.

    NaN and infinity where there are fewer than 3.
    """
    y = losses.to_numpy(dtype=float)
    if len(y) < 3:
        return math.nan, math.inf
    x = np.arange(len(y)) - (len(y) - 1) / 2
    slope = float(x @ y / (x @ x))
    noise = float(np.std(y - y.mean() - slope * x)) / math.sqrt(float(x @ x))
    return -slope * len(y), noise * len(y)


def has_settled(losses: "pd.Series[float]", unit: float) -> bool:
    """Whether a fall that would matter, 3 % of the unit, is excluded by 2 standard errors."""
    fall, error = fall_of_line(losses)
    return fall + 2 * error < SETTLED_FALL * unit and not is_falling(losses, unit)


def spans_at_end(seen: "RunData", losses: "pd.Series[float]") -> dict[str, "pd.Series[float]"]:
    """The losses of the last epoch, of 50 steps at least, and of the last half of the steps."""
    epochs = seen.series("epoch").reindex(losses.index)
    epochs = epochs.where(np.isfinite(epochs))
    epoch = losses[epochs > epochs.max() - 1]
    last = losses[losses.index > losses.index[-1] - int(STALL_STEPS)]
    spans = {f"the last {span_words(last)}": last}
    if epochs.max() - epochs.min() >= 1 and count_steps(epoch) >= STALL_STEPS:
        spans = {"the last epoch": epoch}
    half = losses.iloc[len(losses) // 2 :]
    if count_steps(half) > STALL_STEPS:
        spans[f"the last {span_words(half)}"] = half
    return spans


def sum_updates(seen: "RunData", losses: "pd.Series[float]") -> float:
    """The median block's updates over its weights, added up over all steps; NaN if not known.

    Steps that were not recorded count as the recorded ones around them.
    """
    known = seen.median_updates
    if known.empty:
        return math.nan if seen.table("update_ratio").dropna(how="all").empty else 0.0
    return float(np.interp(losses.index, known.index, known.to_numpy(dtype=float)).sum())


def _ends(losses: "pd.Series[float]") -> tuple["pd.Series[float]", "pd.Series[float]"]:
    """The first and the last fifth."""
    fifth = max(1, len(losses) // 5)
    return losses.iloc[:fifth], losses.iloc[-fifth:]
