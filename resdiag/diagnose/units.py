"""Rules about what is left of the units: dead and saturated blocks, bias shift, drift, overflow."""

import math

import numpy as np
import pandas as pd

from resdiag.diagnose.finding import Evidence, Finding, NotJudged, Outcome, confidence
from resdiag.diagnose.rundata import RunData

CONSTANT_BRANCH = 1e-5
"""Standard deviation of a branch within its channels over that of the shortcut."""

CONSTANT_OUTPUT = 1e-6
"""The same of an output over that of the input, where there is no branch to look at."""

DEAD = 0.999
"""Share of a block's activation channels that pass nothing, for every sample looked at."""

SATURATED = 0.9
"""Share of a block's activation outputs whose slope is below 0.05, of curves that saturate."""

BESIDE_OTHERS = 0.2
"""How much larger than the median of the other blocks."""

LARGEST_SHIFT = 5.0
"""Bias shift B2 of the sum: means over channels beside the spread within them."""

SHIFT_JUMP = 3.0
"""Growth of the channel means within the block that is named."""

DRIFT = 1.0
"""Bias shift B2 at the last block's output that came with training."""

HALF_RANGE = 65504.0
"""Largest number in float16."""

NEAR_RANGE = 100.0
"""RMS of a float16 tensor from which on single elements are taken to have overflowed."""

_SATURATING = ("tanh", "sigmoid", "hardtanh", "softsign", "hardsigmoid", "elu", "selu", "celu")
_SOURCE = "definition of resdiag.diagnose.units"


def dead_block(seen: RunData) -> Outcome:
    """A block's branch is constant at the end: nothing passes it, and it cannot learn.

    The spread of the branch within its channels is below 1e-5 of the shortcut's in the last
    recorded steps before any breakdown, after an update; where other blocks' branches are as small,
    it is a design (zero initialisation, layer scale) until they grow. Without an addition: the
    output is constant, or 99.9 % of the activation channels pass nothing.
    """
    spreads = seen.table("output_channel_std")
    known = [int(s) for s in spreads[np.isfinite(spreads)].dropna(how="all").index] or seen.steps
    steps = [s for s in known if s > 0][-3:]
    if len(steps) < 2:
        reason = "fewer than 2 steps after the first update were recorded"
        yield NotJudged("dead_block", reason, "3 steps")
        return
    with np.errstate(all="ignore"):
        ratio = seen.table("branch_channel_std") / seen.table("shortcut_channel_std")
        bar = CONSTANT_BRANCH
        if ratio.notna().sum().sum() == 0:
            ratio = seen.table("output_channel_std") / seen.table("input_channel_std")
            bar = CONSTANT_OUTPUT
    worst = ratio.reindex(steps).max().dropna()  # behind a dead network there is only 0 / 0
    dead = seen.table("dead_fraction")
    closed = dead.reindex(steps).min() if len(dead) else pd.Series(dtype=float)
    alive = worst[worst > 100 * bar]
    for block in worst.index:
        gone = worst[block] <= bar and 2 * len(alive) >= len(worst)
        shut = closed.get(block, math.nan) >= DEAD and 2 * (closed < DEAD).sum() >= len(closed)
        if gone or shut:
            yield _dead(seen, int(block), float(worst[block]), bar, ratio, dead)
            return


def _dead(
    seen: RunData, block: int, value: float, bar: float, ratio: pd.DataFrame, dead: pd.DataFrame
) -> Finding:
    since = _since(ratio[block] <= bar) if value <= bar else _since(dead[block] >= DEAD)
    share = float(dead[block].iloc[-1]) if block in dead else math.nan
    cause = "the branch is constant"
    if share > BESIDE_OTHERS and share > float(dead.drop(columns=block).iloc[-1].median()) + 0.2:
        cause = "its activations pass nothing"
    text = f"the branch of {seen.name(block)} is constant since step {since}: spread {value:.2g}"
    text += " of the shortcut's" + (f", {share:.0%} dead channels" if share == share else "")
    metric = "branch_channel_std" if value <= bar else "dead_fraction"
    return _found("dead_block", cause, block, since, value, bar, metric, text, 0.95,
                  "Without a spread in it there is no gradient for its parameters")  # fmt: skip


def saturated_block(seen: RunData) -> Outcome:
    """90 % of a block's activation outputs lie where a saturating curve is flat, at the end.

    And 20 % more than in the median of the other blocks; not asked of ReLU, whose closed half is
    its purpose, nor where no saturating activation is on the branch.
    """
    table = seen.table("saturated_fraction")
    if table.dropna(how="all").empty:
        yield NotJudged("saturated_block", "no known activation inside the blocks")
        return
    last = table.dropna(how="all").iloc[-1]
    curved = _curved(seen)
    for block in last.index:
        others = float(last.drop(block).median()) if len(last) > 1 else 0.0
        above = last[block] >= SATURATED and not last[block] - others < BESIDE_OTHERS
        if above and curved.get(int(block), not curved):
            since, value = _since(table[block] >= SATURATED), float(last[block])
            text = f"{value:.0%} of the activation outputs of {seen.name(int(block))} are saturated"
            text += f" since step {since}, in the median of the others {others:.0%}"
            why = "A flat curve passes no gradient: the units stay where they are"
            yield _found("saturated_block", "activations saturated", int(block), since, value,
                         SATURATED, "saturated_fraction", text, 0.9, why)  # fmt: skip
            return


def _curved(seen: RunData) -> dict[int, bool]:
    """By block, whether a saturating activation is on the branch; empty where that is not known."""
    known = {}
    for row in seen.rows:
        names = [str(name) for name in row.get("branch") or ()]
        if names:
            known[int(row["index"])] = any(name in _SATURATING for name in names)
    return known


def bias_shift(seen: RunData) -> Outcome:
    """The channel means at an output are 5 times the spread within channels, at either end.

    Looked at are the first recorded step and the last; named is the block in which the means grow
    most, 3-fold at least. Where the spread is lost instead, it is `vanishing` or `dead_block`.
    """
    table, spread = seen.table("output_bias"), seen.table("output_channel_std")
    with np.errstate(all="ignore"):
        means, before = table * spread, seen.table("input_bias") * seen.table("input_channel_std")
    known = table.dropna(how="all")
    if known.empty:
        yield NotJudged("bias_shift", "the moments of the outputs were not recorded")
        return
    for step in dict.fromkeys((int(known.index[0]), int(known.index[-1]))):
        values = pd.Series(known.loc[step], dtype=float)
        high = values[(values >= LARGEST_SHIFT) & np.isfinite(values)]
        entering = pd.Series(before.loc[step] if step in before.index else None, dtype=float)
        leaving = pd.Series(means.loc[step] if step in means.index else None, dtype=float)
        growth = (leaving / entering.reindex(leaving.index)).reindex(high.index).dropna()
        if growth.empty or not growth.max() >= SHIFT_JUMP:
            continue
        block = int(growth.index[int(growth.to_numpy().argmax())])
        value = float(values[block])
        text = f"channel means are {value:.3g} times the spread behind {seen.name(block)}, "
        text += f"and {growth[block]:.3g} times the means before it, at step {step}"
        yield _found(
            "bias_shift", "bias shift", block, step, value, LARGEST_SHIFT, "output_bias", text,
            confidence(value, LARGEST_SHIFT),
            "The part of the signal that is the same for every sample dominates it",
        )  # fmt: skip
        return


def drift(seen: RunData) -> Outcome:
    """The mean of the stream moves with training, by the same sign in 4 of 5 blocks of a stage.

    On identity shortcuts without an after-add the gradient of the last BatchNorm's bias is the same
    vector in every block, so all move together (shared beta). Threshold: B2 at the last block is
    1 or more and twice what it was at the first recorded step.
    """
    blocks = seen.rows
    free = [
        b["index"]
        for b in blocks
        if b.get("shortcut") == "identity" and b.get("after_add") == "none"
    ]
    if len(seen.steps) < 2:
        yield NotJudged("drift", f"{len(seen.steps)} recorded steps, 2 needed", "2 steps")
        return
    last = seen.indices[-1]
    if 2 * len(free) < len(blocks) or last not in free:
        return
    start, end = seen.steps[0], seen.steps[-1]
    first, now = (seen.value("output_bias", s, last) for s in (start, end))
    stage = [b["index"] for b in blocks if b.get("stage") == blocks[-1].get("stage")]
    moves = [seen.value("branch_mean", end, b) - seen.value("branch_mean", start, b) for b in stage]
    signs = np.sign([m for m in moves if math.isfinite(m)])
    together = len(signs) >= 3 and abs(signs.sum()) >= 0.6 * len(signs)
    if now >= DRIFT and now >= 2 * first and together:
        mean = seen.value("output_mean", end, last)
        text = f"the mean of the stream is {mean:.3g} behind {seen.name(last)} at step {end}: "
        text += f"B2 {now:.2g}, it began at {first:.2g}"
        yield _found("drift", "shared bias drift", int(last), int(end), now, DRIFT, "output_bias",
                     text, confidence(now, DRIFT),
                     "All branches of a stage get the same gradient for their bias, n blocks move "
                     "the stream n times as far")  # fmt: skip


def fp16_overflow(seen: RunData) -> Outcome:
    """The first non-finite activation is in a float16 block whose numbers were large before."""
    found = seen.first_nonfinite
    if not seen.steps:
        yield NotJudged("fp16_overflow", "no step was recorded")
    halves = {row["index"] for row in seen.rows if row.get("dtype") == "float16"}
    if not halves or found is None or found.direction != "forward" or found.block not in halves:
        return
    earlier = [s for s in seen.steps if s <= found.step][-2:]
    sizes = [
        float(np.nanmax([v for v in seen.sizes(site, s) if math.isfinite(v)] or [0.0]))
        for s in earlier
        for site in ("input", "branch", "shortcut", "output")
    ]
    near = max(sizes, default=0.0)
    started = found.step == 0 or seen.first_nonfinite is not None
    if near >= NEAR_RANGE or (found.step == seen.steps[0] and started):
        text = f"{seen.name(found.block)} leaves the range of float16 ({HALF_RANGE:.0f}) at step "
        text += f"{found.step}, site {found.site}; the largest RMS before is {near:.3g}"
        why = "float32 or bfloat16 holds such numbers; so does a smaller branch"
        yield _found("fp16_overflow", "float16 overflow", found.block, found.step, HALF_RANGE,
                     HALF_RANGE, f"{found.site}_nonfinite", text, 0.9, why)  # fmt: skip


def _since(bad: "pd.Series[bool]") -> int:
    """The first step from which on it holds until the end."""
    held = bad.to_numpy()[::-1]
    count = int(np.argmin(held)) if not held.all() else len(held)
    return int(bad.index[len(held) - max(1, count)])


def _found(
    name: str,
    cause: str,
    block: int,
    step: int,
    value: float,
    threshold: float,
    metric: str,
    text: str,
    sure: float,
    why: str,
) -> Finding:
    evidence = Evidence(
        metric=metric, step=step, block=block, value=value, threshold=threshold, text=text,
        source=_SOURCE,
    )  # fmt: skip
    return Finding(
        name=name, step=step, block=block, cause=cause, summary=text[:1].upper() + text[1:] + ".",
        why=why + ".", evidence=(evidence,), next=("resdiag plot biasshift", "resdiag plot signal"),
        confidence=sure,
    )  # fmt: skip
