"""Rules about what an optimizer remembers of the gradients."""

import numpy as np
import pandas as pd

from resdiag.diagnose.finding import NotJudged, Outcome, Rule, Threshold
from resdiag.diagnose.rundata import RunData, trailing

LEAST_JUMP = Threshold(5.0, "Second moment's root after a step over that before it.")
STALE = Threshold(0.3, "Gradient over the second moment's root, after the jump.")
FRESH = Threshold(0.4, "The same in the median of the steps before.")
LEAST_STALE = Threshold(8, "Records in a row after the jump, up to the last one, that show it.")
LEAST_BEFORE = Threshold(3, "Records before the jump.")


def second_moment_stale(seen: RunData) -> Outcome:
    """One step multiplied Adam's second moment, and the gradients are small beside it since then.

    In the median over the blocks its root has grown 5-fold from one record to the next, and the
    gradient over it is below 0.3 in all records since, 8 at least, while its median before was 0.4
    or more.
    """
    roots, fits = (_median(seen, name) for name in ("moment_second", "moment_mismatch"))
    if roots.empty or fits.empty:
        yield _without_moments(seen)
        return
    with np.errstate(all="ignore"):
        jumps = pd.Series(np.log(roots.to_numpy()), index=roots.index).diff()
    step = int(jumps.index[int(np.nan_to_num(jumps.to_numpy(), nan=-np.inf).argmax())])
    before, after = fits[fits.index < step], fits[fits.index > step]
    if len(before) < LEAST_BEFORE or len(after) < LEAST_STALE:
        return
    factor = float(np.exp(jumps.loc[step]))
    if factor >= LEAST_JUMP and before.median() >= FRESH and trailing(after < STALE) == len(after):
        value = float(after.median())
        text = f"step {step} multiplied the root of the second moment by {factor:.3g}; since then "
        text += f"the gradient is {value:.2g} of it, {before.median():.2g} before"
        item = SECOND_MOMENT_STALE.evidence("moment_mismatch", value, STALE, text, step=step)
        yield SECOND_MOMENT_STALE.found(item)


def _median(seen: RunData, metric: str) -> "pd.Series[float]":
    """By recorded step, the median over the blocks."""
    table = seen.table(metric)
    return table.median(axis=1).dropna() if len(table) else pd.Series(dtype=float)


def _without_moments(seen: RunData) -> NotJudged:
    if not seen.inspected:
        return seen.without_inventory(SECOND_MOMENT_STALE)
    return SECOND_MOMENT_STALE.not_applicable(
        "no second moment was recorded: attach(..., metrics={'optimizer': 1}) with Adam"
    )


SECOND_MOMENT_STALE = Rule(
    name="second_moment_stale",
    judge=second_moment_stale,
    needs=("moment_second", "moment_mismatch"),
    applies="Adam and its relatives, with the set of metrics `optimizer`",
    cause="one gradient far too large",
    why="Adam divides by what it remembers: after one large gradient its updates stay small for "
    "about 1 / (1 - beta2) steps",
    remedy="look at that step's batch, and clip gradients or skip such steps; a smaller beta2 "
    "forgets sooner",
    thresholds=(LEAST_JUMP, STALE, FRESH, LEAST_STALE, LEAST_BEFORE),
    source="Kingma & Ba 2014, arXiv:1412.6980; Wortsman et al. 2023, arXiv:2304.13013, section 3.4",
)
