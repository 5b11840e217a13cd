"""Rules about attention: logits that grow, and weights that have collapsed."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from resdiag.diagnose.finding import Finding, Outcome, Rule, Threshold
from resdiag.diagnose.rundata import RunData, held_since, last_known

NO_ENTROPY = Threshold(0.02, "Entropy of attention over that of uniform weights.")
NO_SPREAD = Threshold(1e-6, "Largest logit of attention minus the smallest, of uniform weights.")
LARGE_LOGIT = Threshold(
    100.0,
    "Largest logit of an attention, in nats.",
    "Kimi Team 2025, arXiv:2507.20534 (QK-Clip acts above 100)",
)
LEAST_GROWTH = Threshold(4.0, "The last such logit over the first one, or over 1 if that is less.")
LEAST_RISES = Threshold(4, "Records of that growth that are 10 % above the highest before.")
LARGEST_JUMP = Threshold(0.6, "Share of the logarithm of the growth that lies between two records.")
LEAST_RECORDS = Threshold(5, "Records of attention before growth is told from a jump.")


def attention_logits_grow(seen: RunData) -> Outcome:
    """The largest logit of an attention is above 100, and grew to that little by little.

    It is 4 times the first one or more, 4 records are 10 % above the highest before, and no two
    successive ones have more than 60 % of the growth between them, in its logarithm: a jump is no
    growth. Named is the block with the largest logit.
    """
    table = seen.table("attention_logit").dropna(how="all")
    if table.empty:
        yield from _without_attention(seen, ATTENTION_LOGITS_GROW)
        return
    if len(table) < LEAST_RECORDS:
        reason = f"attention was recorded in {len(table)} steps, {LEAST_RECORDS} needed"
        yield ATTENTION_LOGITS_GROW.not_judged(reason, "more records of attention")
        return
    last = last_known(table)
    for block in last.sort_values(ascending=False).index:
        values = table[block].dropna()
        since = _growing_since(values)
        if since is not None:
            yield _growing(seen, int(block), values, since)
            return


def _growing_since(values: "pd.Series[float]") -> int | None:
    """The step since when a logit grows; None if it does not."""
    sizes = values.to_numpy(dtype=float)
    first, last = max(1.0, sizes[0]), sizes[-1]
    if len(sizes) < LEAST_RECORDS or not last >= max(LARGE_LOGIT, LEAST_GROWTH * first):
        return None
    lowest = np.minimum.accumulate(sizes[::-1])[::-1]  # from each record on
    begins = max(0, int(np.searchsorted(lowest, 1.5 * first, side="right")) - 1)
    grown = np.maximum(sizes[begins:], 1e-3)
    steps = np.diff(np.log(grown))
    gradual = bool(len(steps)) and steps.max() <= LARGEST_JUMP * steps.sum()
    return int(values.index[begins]) if gradual and _rises(grown) >= LEAST_RISES else None


def _rises(sizes: Iterable[float]) -> int:
    """How many numbers are 10 % above the last one that was so, or the first one."""
    level, count = math.nan, -1
    for size in sizes:
        if not size < 1.1 * level:
            level, count = size, count + 1
    return count


def _growing(seen: RunData, block: int, values: "pd.Series[float]", since: int) -> Finding:
    first, last, step = values.loc[since], values.iloc[-1], int(values.index[-1])
    text = f"the largest attention logit of {seen.name(block)} grew from {first:.3g} at step "
    text += f"{since} to {last:.3g} at step {step}"
    head = seen.value("attention_logit_head", step, block)
    text += f", in head {head:.0f}" if math.isfinite(head) else ""
    item = ATTENTION_LOGITS_GROW.evidence(
        "attention_logit", float(last), LARGE_LOGIT, text, step=since, block=block
    )
    return ATTENTION_LOGITS_GROW.found(item)


def _without_attention(seen: RunData, row: Rule) -> Outcome:
    """Why a rule about recorded attention is not applied."""
    if not seen.inspected:
        yield seen.without_inventory(row)
    elif seen.inventory["attentions"]:
        yield row.not_judged("attention was not recorded: attach(..., metrics={'attention': 10})")
    else:
        yield row.not_applicable("no attention was seen")


def attention_collapsed(seen: RunData) -> Outcome:
    """An attention looks at one key only, or at all keys alike.

    Its weights have an entropy below 2 % of that of uniform weights, in the mean over its heads; or
    its logits are all equal, in the first recorded step and still in the last one that was looked
    at. Looked at are passes that were traced, and every step in which attention was recorded.
    """
    table = seen.table("attention_entropy_share").dropna(how="all")
    looked = [seen.inventory.get(part) or [] for part in ("attentions", "later_attentions")]
    if table.empty and not seen.inspected:
        yield seen.without_inventory(ATTENTION_COLLAPSED)
    elif table.empty and not looked[0]:
        yield ATTENTION_COLLAPSED.not_applicable("no attention was seen")
    elif (finding := next(_collapses(seen, table, *looked), None)) is not None:
        yield finding
    elif not looked[1] and len(table) < 2:
        reason = "whether uniform weights stay: attention was looked at in one step only"
        yield ATTENTION_COLLAPSED.not_judged(reason, "10 recorded steps")


def _collapses(
    seen: RunData,
    table: pd.DataFrame,
    first: Sequence[Mapping[str, Any]],
    later: Sequence[Mapping[str, Any]],
) -> Iterator[Finding]:
    """What the traced passes show, then what the records do."""
    began = {entry["name"]: entry for entry in first}
    for entry in later or first:
        entropy, spread = _number(entry, "entropy"), _number(entry, "spread")
        before = began.get(entry["name"], entry)
        was = _number(before, "entropy") < NO_ENTROPY or _number(before, "spread") <= NO_SPREAD
        step = 0 if was else int(seen.inventory.get("later_step", 0))
        name = entry["name"] or "attention"
        if entropy < NO_ENTROPY:
            text = f"the entropy of {name} is {entropy:.2g} of that of uniform weights"
            yield _collapsed(entry, step, "entropy of 0", text, entropy, NO_ENTROPY)
        if spread <= NO_SPREAD and later:
            text = f"the logits of {name} differ by {spread:.2g} at most"
            yield _collapsed(entry, step, "uniform weights", text, spread, NO_SPREAD)
    last = last_known(table)
    for block in last.index[last < NO_ENTROPY]:
        shares = table[block].dropna()
        value, since = float(shares.iloc[-1]), held_since(shares < NO_ENTROPY)
        text = f"the entropy of attention in {seen.name(int(block))} is {value:.2g} of that of "
        text += f"uniform weights, below {NO_ENTROPY:g} of it since step {since}"
        item = ATTENTION_COLLAPSED.evidence(
            "attention_entropy_share", value, NO_ENTROPY, text, step=since, block=int(block)
        )
        yield ATTENTION_COLLAPSED.found(item, cause="entropy of 0")


def _collapsed(
    entry: Mapping[str, Any], step: int, cause: str, text: str, value: float, limit: float
) -> Finding:
    item = ATTENTION_COLLAPSED.evidence(
        "inventory", value, limit, text, step=step, block=entry.get("block")
    )
    return ATTENTION_COLLAPSED.found(item, cause=cause)


def _number(entry: Mapping[str, Any], key: str) -> float:
    value = entry.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


ATTENTION_LOGITS_GROW = Rule(
    name="attention_logits_grow",
    judge=attention_logits_grow,
    needs=("attention_logit",),
    applies="networks with attention, recorded in 5 steps",
    cause="attention logits grow",
    why="Nothing bounds q.k: queries and keys grow together, until the softmax is one-hot and "
    "passes no gradient, and low precision rounds its logits",
    remedy="normalise queries and keys (QK norm), cap the logits, or lower the learning rate of "
    "their weights",
    thresholds=(LARGE_LOGIT, LEAST_GROWTH, LEAST_RISES, LARGEST_JUMP, LEAST_RECORDS),
    source="Dehghani et al. 2023, arXiv:2302.05442, section 2; Wortsman et al. 2023, "
    "arXiv:2309.14322, section 3.1",
)
ATTENTION_COLLAPSED = Rule(
    name="attention_collapsed",
    judge=attention_collapsed,
    needs=("inventory",),
    applies="networks with attention",
    cause="attention has collapsed",
    why="A softmax at its ends passes no gradient to queries and keys; one of equal logits is a "
    "mean",
    remedy="look at the scale of queries and keys: normalise them, or divide by the root of their "
    "width",
    thresholds=(NO_ENTROPY, NO_SPREAD),
    source="Zhai et al. 2023, arXiv:2303.06296 (attention entropy collapse)",
)
