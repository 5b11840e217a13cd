"""Why a block's parameters do not move, and whether that is a method: a probe, adapters, LoRA."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from resdiag.diagnose.finding import Threshold
from resdiag.diagnose.rundata import RunData

MOST_FROZEN = Threshold(
    0.25, "Share of the blocks that are frozen by mistake; where more are, it is a method."
)
STARVED = Threshold(
    1e-6, "A gradient over the largest of all blocks; below, it is lost before it comes to them."
)
FROZEN = "requires_grad is False"
NOT_OWNED = "the parameters get gradients, but no optimizer updates them"
NO_GRADIENT = "their gradient is 0"
CUT_OFF = "no gradient reaches them, although they require one"
FROZEN_BEGINNING = "neither they nor anything before them requires a gradient"
VANISHED = "the gradient has vanished behind them"

_DOES_NOT_REQUIRE = "this tensor does not require a gradient"


def explain_still(seen: RunData, block: int, since: int) -> str:
    """Why a block's parameters do not move, as one of the sentences above.

    Args:
        seen: The run.
        block: Its index.
        since: The step since when they do not.
    """
    arriving, own = (
        table[table.index >= since] for table in map(seen.table, ("grad_output", "grad_param"))
    )
    most, most_own = (float(np.nanmax(t.to_numpy(), initial=0.0)) for t in (arriving, own))
    frozen, cut = (without_gradient(seen, metric) for metric in ("grad_output", "grad_input"))
    at_output, at_weights = _known(arriving, block), _known(own, block)
    if not len(at_output):
        is_cut = block not in frozen and any(later > block for later in cut)
        return CUT_OFF if is_cut else FROZEN_BEGINNING
    if not at_output.max() > STARVED * most:
        return VANISHED
    if not len(at_weights):
        return FROZEN
    return NOT_OWNED if at_weights.max() > STARVED * most_own else NO_GRADIENT


def is_method(still: Sequence[int], every: Sequence[int]) -> bool:
    """Whether so many blocks are frozen, or such ones, that it is meant.

    More than a quarter of the blocks, or several at one end of the network.

    Args:
        still: Blocks whose parameters do not move, in order.
        every: Blocks with parameters, in order.
    """
    at_an_end = list(still) in (list(every[: len(still)]), list(every[-len(still) :]))
    return len(still) > 1 and (at_an_end or len(still) > MOST_FROZEN * len(every))


def without_gradient(seen: RunData, metric: str) -> set[int]:
    """The blocks of which a gradient is missing because the tensor does not require one."""
    found: set[int] = set()
    for entry in seen.run.unavailable:
        if (entry.get("metric"), entry.get("reason")) == (metric, _DOES_NOT_REQUIRE):
            blocks = entry.get("blocks")
            found |= set(blocks) if isinstance(blocks, list) else set(seen.indices)
    return found


def _known(table: pd.DataFrame, block: int) -> "pd.Series[float]":
    return table[block].dropna() if block in table else pd.Series(dtype=float)
