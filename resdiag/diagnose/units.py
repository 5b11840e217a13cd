"""Rules about what is left of the units: dead and saturated blocks, bias shift, drift, overflow."""

import math

import numpy as np
import pandas as pd

from resdiag.catalog.table import SITES
from resdiag.diagnose.finding import Finding, Outcome, Rule, Threshold
from resdiag.diagnose.progress import share_left
from resdiag.diagnose.rundata import RunData, held_since

CONSTANT_BRANCH = Threshold(
    1e-5,
    "Standard deviation of a branch within its channels over that of the shortcut.",
)
CONSTANT_OUTPUT = Threshold(
    1e-6,
    "The same of an output over that of the input, where there is no branch to look at.",
)
DEAD = Threshold(
    0.999,
    "Share of a block's activation channels that pass nothing, for every sample looked at.",
)
NO_SHARE = Threshold(
    1e-6, "Distance from 1 of the gradient's share through the shortcut, of a branch with dropout."
)
SATURATED = Threshold(
    0.9,
    "Share of a block's activation outputs whose slope is below 0.05, of curves that saturate.",
)
BESIDE_OTHERS = Threshold(0.2, "How much larger than the median of the other blocks.")
LARGEST_SHIFT = Threshold(
    5.0,
    "Bias shift B2 of the sum: means over channels beside the spread within them.",
)
SHIFT_JUMP = Threshold(3.0, "Growth of the channel means within the block that is named.")
LARGEST_DRIFT = Threshold(1.0, "Bias shift B2 at the last block's output that came with training.")
MOSTLY_LEARNED = Threshold(
    0.5, "Mean loss of the last fifth of the steps over that of the first; below, it does no harm."
)
HALF_RANGE = Threshold(65504.0, "Largest number in float16.")
NEAR_RANGE = Threshold(
    100.0,
    "RMS of a float16 tensor from which on single elements are taken to have overflowed.",
)
_SATURATING = ("tanh", "sigmoid", "hardtanh", "softsign", "hardsigmoid", "elu", "selu", "celu")


def dead_block(seen: RunData) -> Outcome:
    """A block's branch is constant at the end: nothing passes it, and it cannot learn.

    The spread of the branch within its channels is below 1e-5 of the shortcut's in the last
    recorded steps before any breakdown, after an update; where other blocks' branches are as small,
    it is a design (zero initialisation, layer scale) until they grow. Without an addition: the
    output is constant, or 99.9 % of the activation channels pass nothing. Dropout gives a constant
    branch the spread of its mask; there it is constant if all gradient comes back through the
    shortcut although the block's parameters have one.
    """
    spreads = seen.table("output_channel_std")
    known = [int(s) for s in spreads[np.isfinite(spreads)].dropna(how="all").index] or seen.steps
    steps = [s for s in known if s > 0][-3:]
    if len(steps) < 2:
        reason = "fewer than 2 steps after the first update were recorded"
        yield DEAD_BLOCK.not_judged(reason, "3 steps")
        return
    with np.errstate(all="ignore"):
        ratio = seen.table("branch_channel_std") / seen.table("shortcut_channel_std")
        bar = CONSTANT_BRANCH
        if ratio.notna().sum().sum() == 0:
            ratio = seen.table("output_channel_std") / seen.table("input_channel_std")
            bar = CONSTANT_OUTPUT
    worst = ratio.reindex(steps).max().dropna()  # behind a dead network there is only 0 / 0
    dead = seen.table("dead_fraction")
    closed = dead.reindex(steps).min().dropna() if len(dead) else pd.Series(dtype=float)
    alive, masked = worst[worst > 100 * bar], _only_masks(seen, steps)
    for block in worst.index:
        gone = worst[block] <= bar and 2 * len(alive) >= len(worst)
        shut = closed.get(block, math.nan) >= DEAD and 2 * (closed < DEAD).sum() >= len(closed)
        if gone or shut:
            yield _dead(seen, int(block), float(worst[block]), bar, ratio, dead)
            return
        if block in masked:
            yield _masked(seen, int(block), steps[0])
            return


def _only_masks(seen: RunData, steps: list[int]) -> set[int]:
    """Blocks through whose branch no gradient comes although it is trained and has dropout.

    None where half of the branches are so small that no gradient is seen to come through them.
    """
    share, own = (seen.table(name).reindex(steps) for name in ("shortcut_share", "grad_param"))
    distance = (share - 1).abs().max().dropna()
    if 2 * (distance > 100 * NO_SHARE).sum() < len(distance):
        return set()
    drops = {int(row["index"]) for row in seen.rows if "dropout" in (row.get("branch") or ())}
    learning = {int(block) for block in own.columns[(own > 0).all()]}
    return {int(b) for b in distance[distance <= NO_SHARE].index} & drops & learning


def _masked(seen: RunData, block: int, step: int) -> Finding:
    text = f"no gradient comes back through the branch of {seen.name(block)}, which is trained: "
    text += "it is constant, and only the mask of its dropout varies"
    item = DEAD_BLOCK.evidence("shortcut_share", 1.0, 1 - NO_SHARE, text, step=step, block=block)
    return DEAD_BLOCK.found(item)


def _dead(
    seen: RunData, block: int, value: float, bar: float, ratio: pd.DataFrame, dead: pd.DataFrame
) -> Finding:
    since = held_since(ratio[block] <= bar) if value <= bar else held_since(dead[block] >= DEAD)
    share = float(dead[block].iloc[-1]) if block in dead else math.nan
    cause = ""
    if share > BESIDE_OTHERS and share > float(dead.drop(columns=block).iloc[-1].median()) + 0.2:
        cause = "its activations pass nothing"
    what = "is constant" if value <= bar else "passes nothing"
    text = f"the branch of {seen.name(block)} {what} since step {since}: spread {value:.2g}"
    text += " of the shortcut's" + (f", {share:.0%} dead channels" if share == share else "")
    metric, shown, limit = "branch_channel_std", value, bar
    if value > bar:
        metric, shown, limit = "dead_fraction", share, DEAD
    item = DEAD_BLOCK.evidence(metric, shown, limit, text, step=since, block=block)
    return DEAD_BLOCK.found(item, cause=cause)


def saturated_block(seen: RunData) -> Outcome:
    """90 % of a block's activation outputs lie where a saturating curve is flat, at the end.

    And 20 % more than in the median of the other blocks; not asked of ReLU, whose closed half is
    its purpose, nor where no saturating activation is on the branch.
    """
    table = seen.table("saturated_fraction")
    if table.dropna(how="all").empty:
        yield SATURATED_BLOCK.not_judged("no known activation inside the blocks")
        return
    last = table.dropna(how="all").iloc[-1]
    curved = _curved(seen)
    for block in last.index:
        others = float(last.drop(block).median()) if len(last) > 1 else 0.0
        above = last[block] >= SATURATED and not last[block] - others < BESIDE_OTHERS
        if above and curved.get(int(block), not curved):
            since, value = held_since(table[block] >= SATURATED), float(last[block])
            text = f"{value:.0%} of the activation outputs of {seen.name(int(block))} are saturated"
            text += f" since step {since}, in the median of the others {others:.0%}"
            yield SATURATED_BLOCK.found(
                SATURATED_BLOCK.evidence(
                    "saturated_fraction", value, SATURATED, text, step=since, block=int(block)
                )
            )
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
        yield BIAS_SHIFT.not_judged("the moments of the outputs were not recorded")
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
        begun = table[block][table.index <= step] >= LARGEST_SHIFT
        item = BIAS_SHIFT.evidence(
            "output_bias", value, LARGEST_SHIFT, text, step=held_since(begun), block=block
        )
        yield BIAS_SHIFT.found(item)
        return


def drift(seen: RunData) -> Outcome:
    """The mean of the stream moves with training, by the same sign in 4 of 5 blocks of a stage.

    On identity shortcuts without an after-add the gradient of the last BatchNorm's bias is the same
    vector in every block, so all move together (shared beta). Threshold: B2 at the last block is
    1 or more and twice what it was at the first recorded step. Not where the loss has fallen to
    half: then such a mean is what the task asks for, as targets that are not centred do.
    """
    blocks = seen.rows
    free = [
        b["index"]
        for b in blocks
        if b.get("shortcut") == "identity" and b.get("after_add") == "none"
    ]
    if len(seen.steps) < 2:
        yield DRIFT.not_judged(f"{len(seen.steps)} recorded steps, 2 needed", "2 steps")
        return
    last = seen.indices[-1]
    learned = share_left(seen.series("loss")) < MOSTLY_LEARNED
    if 2 * len(free) < len(blocks) or last not in free or learned:
        return
    start, end = seen.steps[0], seen.steps[-1]
    first, now = (seen.value("output_bias", s, last) for s in (start, end))
    stage = [b["index"] for b in blocks if b.get("stage") == blocks[-1].get("stage")]
    moves = [seen.value("branch_mean", end, b) - seen.value("branch_mean", start, b) for b in stage]
    signs = np.sign([m for m in moves if math.isfinite(m)])
    together = len(signs) >= 3 and abs(signs.sum()) >= 0.6 * len(signs)
    if now >= LARGEST_DRIFT and now >= 2 * first and together:
        mean = seen.value("output_mean", end, last)
        bar = max(float(LARGEST_DRIFT), 2 * first)
        since = held_since(seen.table("output_bias")[last] >= bar)
        text = f"the mean of the stream is {mean:.3g} behind {seen.name(last)} at step {end}: "
        text += f"B2 {now:.2g}, it began at {first:.2g}; above {bar:.2g} since step {since}"
        item = DRIFT.evidence("output_bias", now, LARGEST_DRIFT, text, step=since, block=last)
        yield DRIFT.found(item)


def fp16_overflow(seen: RunData) -> Outcome:
    """The first non-finite activation is in a float16 block whose numbers were large before."""
    found = seen.first_nonfinite
    if not seen.steps:
        yield FP16_OVERFLOW.not_judged("no step was recorded")
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
    if near >= NEAR_RANGE or found.step == seen.steps[0]:
        text = f"{seen.name(found.block)} leaves the range of float16 ({HALF_RANGE:.0f}) at step "
        text += f"{found.step}, site {found.site}; the largest RMS before is {near:.3g}"
        metric = f"{found.site}_nonfinite"
        yield FP16_OVERFLOW.found(
            FP16_OVERFLOW.evidence(
                metric, HALF_RANGE, HALF_RANGE, text, step=found.step, block=found.block
            )
        )


_PLOTS = ("biasshift", "signal")

DEAD_BLOCK = Rule(
    name="dead_block",
    judge=dead_block,
    needs=("branch_channel_std", "output_channel_std", "dead_fraction"),
    applies="runs with 2 recorded steps after the first update",
    cause="the branch is constant",
    why="Without a spread in it there is no gradient for its parameters",
    remedy="look for a bias that closes the activations, and for a weight or factor of zero",
    plots=_PLOTS,
    thresholds=(CONSTANT_BRANCH, CONSTANT_OUTPUT, DEAD, NO_SHARE),
)
SATURATED_BLOCK = Rule(
    name="saturated_block",
    judge=saturated_block,
    needs=("saturated_fraction",),
    applies="blocks with a saturating activation on their branch: tanh, sigmoid, ELU, ...",
    cause="activations saturated",
    why="A flat curve passes no gradient: the units stay where they are",
    remedy="normalise what enters the activation, or begin with smaller weights",
    plots=_PLOTS,
    thresholds=(SATURATED, BESIDE_OTHERS),
)
BIAS_SHIFT = Rule(
    name="bias_shift",
    judge=bias_shift,
    needs=("output_channel_mean_rms", "output_channel_std"),
    cause="bias shift",
    why="The part of the signal that is the same for every sample dominates it",
    remedy="look for a constant that the block adds; a normalisation of its branch removes it",
    plots=_PLOTS,
    thresholds=(LARGEST_SHIFT, SHIFT_JUMP),
)
DRIFT = Rule(
    name="drift",
    judge=drift,
    needs=("output_channel_mean_rms", "output_channel_std", "branch_mean"),
    applies="identity shortcuts with nothing after the addition",
    cause="shared bias drift",
    why="All branches of a stage get the same gradient for their bias, n blocks move the stream n "
    "times as far",
    remedy="lower the learning rate of the branches' last biases, or leave them out",
    plots=_PLOTS,
    thresholds=(LARGEST_DRIFT, MOSTLY_LEARNED),
)
FP16_OVERFLOW = Rule(
    name="fp16_overflow",
    judge=fp16_overflow,
    needs=tuple(f"{site}_nonfinite" for site in SITES),
    applies="blocks that compute in float16",
    cause="float16 overflow",
    why="float32 or bfloat16 holds such numbers; so does a smaller branch",
    remedy="compute this block in bfloat16 or float32",
    plots=_PLOTS,
    thresholds=(HALF_RANGE, NEAR_RANGE),
)
