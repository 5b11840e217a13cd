"""Rules about single blocks that differ from their neighbours: scale, gradient, normalisation.

What all blocks have in common is a design; what one of them has alone is a fault.
"""

import math
from collections.abc import Sequence

import numpy as np

from resdiag.diagnose.finding import DEFINITION, Outcome, Rule, Threshold
from resdiag.diagnose.freezing import (
    CUT_OFF,
    FROZEN,
    FROZEN_BEGINNING,
    MOST_FROZEN,
    NOT_OWNED,
    STARVED,
    VANISHED,
    explain_still,
    is_method,
)
from resdiag.diagnose.progress import STALL_STEPS, find_doubts
from resdiag.diagnose.rundata import RunData, held_since, trailing
from resdiag.watch.base.names import NORMALISATIONS

FIRST_BRANCH = Threshold(1.0, "RMS of a branch over that of its shortcut, at the first step.")
TRAINED = Threshold(0.8, "First loss over ln K below which a network was trained before.")
LARGEST_BRANCH = Threshold(50.0, "The same at any later step: training makes branches differ.")
BESIDE_OTHERS = Threshold(20.0, "The same, in units of the other blocks' median.")
OUTLIER = (
    Threshold(5.0, "RMS of a branch over that of its shortcut, where branches are small"),
    Threshold(300.0, "the same, in units of the other blocks' median"),
)

LEAST_BRANCH = Threshold(
    1e-6,
    "RMS of a branch over that of its shortcut, and over the other blocks' median.",
)
LARGEST_JUMP = Threshold(
    50.0,
    "RMS of a block's output over that of its input, where there is no branch to look at.",
)
LARGEST_SHIFT = Threshold(
    5.0,
    "Bias shift B2 of a branch from which on it is large by a constant, not by its scale.",
)
SCALE = Threshold(0.03, "Distance from 1 of the factor on an identity shortcut.")
PRODUCT = Threshold(
    5.0,
    "Product of the shortcuts' factors over the network, or its inverse, that is no design.",
)
LEAST_STILL = Threshold(5, "Recorded steps at the end in which nothing of a block moves.")
LEAST_DETACHED = Threshold(5, "Recorded steps at the end in which a branch got no gradient.")
SHARE = Threshold(1e-6, "Distance from 1 of the gradient's share through the shortcut.")
GROWTH_WITHOUT_NORM = Threshold(
    1.2,
    "Growth of E[H^2] per block that a frozen BatchNorm must show before it is blamed.",
)
_DETACHED = "no gradient leads from the shortcut back to the block's input"
_NORMS = NORMALISATIONS | {"rsqrt"}


def shortcut_scaled(seen: RunData) -> Outcome:
    """An identity shortcut multiplies by something else than 1, at step 0.

    The factor is the RMS of the shortcut over that of the block's input, negative if the quantiles
    of their channel means say so. It counts if it is negative, if at most half of the blocks have
    one, or if the product over all blocks is beyond 5 or 1/5; not where a normalisation follows
    the addition, which undoes it.
    """
    if not seen.steps:
        yield SHORTCUT_SCALED.not_judged("no step was recorded")
        return
    step = seen.steps[0]
    factors = seen.shortcut_factors(step)
    off = factors[(factors - 1).abs() > SCALE]
    if off.empty:
        return
    product = float(np.prod(np.abs(off.to_numpy(dtype=float))))
    extreme = max(product, 1 / product if product else math.inf)
    if not ((off < 0).any() or 2 * len(off) <= len(seen.rows) or extreme > PRODUCT):
        return
    block = int(off.index[0])
    many = f" and {len(off) - 1} more" if len(off) > 1 else ""
    factor = float(off.to_numpy(dtype=float)[0])
    text = f"the shortcut of {seen.name(block)}{many} multiplies by {factor:.3g}"
    text += f"; product over all blocks {product:.3g}" if len(off) > 1 else ""
    item = SHORTCUT_SCALED.evidence(
        "shortcut_channel_std", factor, 1.0, text, step=step, block=block
    )
    yield SHORTCUT_SCALED.found(item)


def detached_shortcut(seen: RunData) -> Outcome:
    """No gradient leads through a block's shortcut, which adds its input all the same."""
    rows = [
        set(entry["blocks"]) if isinstance(entry.get("blocks"), list) else set()
        for entry in seen.run.unavailable
        if entry.get("metric") == "shortcut_share" and entry.get("reason") == _DETACHED
    ]
    if not seen.steps:
        yield DETACHED_SHORTCUT.not_judged("no step was recorded")
    blocks = sorted(set[int]().union(*rows) & set(seen.indices))
    if blocks:
        text = f"no gradient leads through the shortcut of {seen.name(blocks[0])}"
        item = DETACHED_SHORTCUT.evidence(
            "shortcut_share", 0.0, math.nan, text, step=seen.steps[0], block=blocks[0]
        )
        yield DETACHED_SHORTCUT.found(item)


def detached_branch(seen: RunData) -> Outcome:
    """All gradient comes back through a block's shortcut although its branch adds something."""
    share, ratio = seen.table("shortcut_share"), seen.table("branch_ratio")
    gradient = seen.table("grad_param")
    if share.dropna(how="all", axis=1).empty:
        yield DETACHED_BRANCH.not_judged("the shortcut's share of the gradient is not known")
        return
    for block in map(int, share.columns):
        known = share[block].dropna()
        own = gradient[block].reindex(known.index) if block in gradient else known * math.nan
        through = ((known - 1).abs() <= SHARE) & ~(own > 0)
        count = trailing(through)
        if count and count >= min(len(known), LEAST_DETACHED) and block in ratio:
            step = int(known.index[len(known) - count])
            adds = ratio[block][ratio.index >= step].dropna() > LEAST_BRANCH
            if block not in gradient or not adds.any() or not adds.iloc[-1]:
                continue
            if _is_dead(seen, block):
                continue
            text = f"the branch of {seen.name(block)} adds to the sum and gets no gradient"
            item = DETACHED_BRANCH.evidence(
                "shortcut_share", 1.0, math.nan, text, step=step, block=block
            )
            yield DETACHED_BRANCH.found(item)
            return


def frozen_block(seen: RunData) -> Outcome:
    """A block's parameters do not move in the last 5 recorded steps, while other blocks' do.

    Not where that is the method, as in a probe, with adapters or LoRA, or in a fine-tuning: more
    than a quarter of the blocks are frozen, or several at one end of the network. That is only
    mentioned. A block is not blamed where the gradient has vanished behind it, or where its output
    is constant, which is `dead_block`.
    """
    updates = seen.table("update_ratio").dropna(how="all")
    moved = updates.iloc[-int(LEAST_STILL) :].max().dropna()
    still = [int(b) for b in moved.index if moved[b] == 0]
    if updates.empty:
        yield FROZEN_BLOCK.not_judged(*seen.why_no_updates)
    if not still or not (moved > 0).any():
        return
    # blocks that stop moving later are told apart by what came to them since
    since = {b: held_since(updates[b].fillna(0) == 0) for b in still}
    causes = {b: explain_still(seen, b, since[b]) for b in still}
    asked = [b for b in still if causes[b] in (FROZEN_BEGINNING, FROZEN, NOT_OWNED)]
    if not is_method(asked, [int(b) for b in moved.index]):
        asked = [b for b in asked if causes[b] == FROZEN_BEGINNING]
    if asked:
        reason = f"{len(asked)} of {len(moved)} blocks are frozen, {seen.name(asked[0])} first"
        yield FROZEN_BLOCK.not_judged(f"{reason}: taken for a deliberate fine-tuning")
    blamed = [b for b in still if b not in asked and causes[b] != VANISHED]
    blamed = [b for b in blamed if not _is_dead(seen, b)]
    if not blamed:
        return
    cut = [b for b in blamed if causes[b] == CUT_OFF]
    block = cut[-1] if cut else blamed[0]
    text = f"the parameters of {seen.name(block)} do not move: {causes[block]}"
    item = FROZEN_BLOCK.evidence("update_ratio", 0.0, 0.0, text, step=since[block], block=block)
    yield FROZEN_BLOCK.found(item, cause=causes[block])


def branch_too_large(seen: RunData) -> Outcome:
    """A branch is larger than its shortcut and 20 times the other blocks' median, at first.

    At the first recorded step of a network that is not trained yet, and only if the branch itself
    is 20 times the others, not its shortcut small: the largest of 30 healthy networks was 3 times
    the median. Trained ones come to 50 times, so later a branch counts that is 50 times its
    shortcut and 20 times the others' median, or 5 times its shortcut and 300 times the median. Not
    where it is large by a constant. Of blocks without an addition it is the growth of the RMS.
    """
    ratio = seen.table("branch_ratio")
    if not seen.steps:
        yield BRANCH_TOO_LARGE.not_judged("no step was recorded")
    limit, metric, what = LARGEST_BRANCH, "branch_ratio", "branch over shortcut"
    if ratio.notna().sum().sum() == 0:
        growth = seen.table("forward_growth")
        with np.errstate(all="ignore"):
            ratio = growth**0.5
        limit, metric, what = LARGEST_JUMP, "forward_growth", "output over input"
    for step, row in ratio.iterrows():
        known = row[np.isfinite(row)]
        if len(known) < 2:
            continue
        block = int(known.index[int(known.to_numpy().argmax())])
        others = float(known.drop(block).median())
        value = float(known[block])
        first = int(str(step)) == seen.steps[0] and _is_larger_than_others(seen, block)
        pairs = ((FIRST_BRANCH if first else limit, BESIDE_OTHERS), OUTLIER)
        if any(value > least and value > times * others > 0 for least, times in pairs):
            if seen.value("branch_bias", int(str(step)), block) >= LARGEST_SHIFT:
                continue  # a constant, which is bias_shift's to name
            text = f"{what} is {value:.3g} in {seen.name(block)} at step {step}, "
            text += f"the other blocks' median is {others:.3g}"
            item = BRANCH_TOO_LARGE.evidence(
                metric, value, pairs[0][0], text, step=int(str(step)), block=block
            )
            yield BRANCH_TOO_LARGE.found(item)
            return


def _is_larger_than_others(seen: RunData, block: int) -> bool:
    """Whether a branch, or a unit's output, is far larger at first, in a network without training.

    In a trained one a first block may far exceed the embedding that it is added to.
    """
    losses, step = seen.series("loss"), seen.steps[0]
    if seen.classes and len(losses) and losses.iloc[0] < TRAINED * math.log(seen.classes):
        return False
    sizes = seen.sizes("branch", step)
    sizes = (sizes if sizes.notna().any() else seen.sizes("output", step)).dropna()
    return block in sizes and sizes[block] > BESIDE_OTHERS * sizes.drop(block).median()


def missing_norm(seen: RunData) -> Outcome:
    """A few blocks lack the normalisation of their likes, or BatchNorm does not normalise.

    Blocks are alike if the operations on their branches are the same but for normalisations. Units
    without an addition lack one only between others that have it: stems and heads are bare by
    design. A BatchNorm on running statistics is blamed if E[H^2] grows by 1.2 per block at step 0.
    """
    rows = [row for row in seen.rows if row.get("branch")]
    if not rows:
        yield MISSING_NORM.not_judged("the operations on the branches are not known")
        return
    kinds: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for row in rows:
        names = [str(name) for name in row["branch"]]
        bare = tuple(name for name in names if name not in _NORMS)
        after = sum(name in str(row.get("after_add", "")) for name in NORMALISATIONS)
        kinds.setdefault(bare, []).append((row["index"], len(names) - len(bare) + after))
    units = {row["index"] for row in rows if row.get("shortcut") == "none"}
    lacking: list[int] = []
    for members in kinds.values():
        most = max(count for _, count in members)
        full = [index for index, count in members if count == most]
        less = [i for i, n in members if n < most and (i not in units or full[0] < i < full[-1])]
        if 2 * len(less) <= len(members):
            lacking += less
    if lacking:
        block = min(lacking)
        text = f"{seen.name(block)} lacks a normalisation that {len(rows) - len(lacking)} of "
        text += f"{len(rows)} blocks have" + f"; so do {len(lacking) - 1} more" * (len(lacking) > 1)
        yield MISSING_NORM.found(
            MISSING_NORM.evidence("branch", len(lacking), math.nan, text, step=0, block=block)
        )
    yield from _frozen_norm(seen, rows)


def _frozen_norm(seen: RunData, rows: Sequence[dict[str, object]]) -> Outcome:
    frozen = [row["index"] for row in rows if row.get("frozen_norm")]
    growth = seen.growth_per_block(0) if 0 in seen.steps else math.nan
    stuck = len(seen.series("loss").dropna()) >= STALL_STEPS
    # fine-tuning on the statistics of a trained network is a method
    if frozen and find_doubts(seen) and (growth >= GROWTH_WITHOUT_NORM or stuck):
        text = f"BatchNorm of {len(frozen)} blocks runs on running statistics in training"
        text += f"; the signal grows {growth:.3g} times per block at step 0"
        yield MISSING_NORM.found(
            MISSING_NORM.evidence("forward_growth", growth, GROWTH_WITHOUT_NORM, text, step=0),
            cause="BatchNorm in evaluation mode",
            why="It does not normalise what it is given",
        )


def _is_dead(seen: RunData, block: int) -> bool:
    """Whether a branch, or a unit's output, is constant: nothing of it can learn."""
    spread, whole = seen.table("branch_channel_std"), seen.table("shortcut_channel_std")
    if not spread.notna().any(axis=None):
        spread, whole = seen.table("output_channel_std"), seen.table("input_channel_std")
    if block not in spread or block not in whole:
        return False
    ratio = (spread[block] / whole[block]).dropna()
    return len(ratio) > 0 and bool((ratio <= LEAST_BRANCH).all())


_PLOTS = ("signal", "skip")

SHORTCUT_SCALED = Rule(
    name="shortcut_scaled",
    judge=shortcut_scaled,
    needs=("input_channel_std", "shortcut_channel_std"),
    applies="identity shortcuts without a normalisation after the addition",
    cause="shortcut is not the identity",
    why="Gradient and signal on the skip path are multiplied by the product of these factors",
    remedy="add the block's input as it is; put a factor on the branch instead",
    plots=_PLOTS,
    thresholds=(SCALE, PRODUCT),
    source="He et al. 2016, arXiv:1603.05027, section 3.1",
)
DETACHED_SHORTCUT = Rule(
    name="detached_shortcut",
    judge=detached_shortcut,
    needs=("unavailable",),
    cause="shortcut is cut off from the graph",
    why="The value is added, but all gradient has to pass the branch (detach, no_grad?)",
    remedy="remove the detach or no_grad on the shortcut",
    plots=_PLOTS,
)
DETACHED_BRANCH = Rule(
    name="detached_branch",
    judge=detached_branch,
    needs=("shortcut_share", "branch_ratio", "grad_param"),
    cause="branch is cut off from the graph",
    why="Its parameters never learn (detach, no_grad, or a function without a gradient?)",
    remedy="remove the detach or no_grad on the branch",
    plots=_PLOTS,
    thresholds=(SHARE, LEAST_BRANCH, LEAST_DETACHED),
)
FROZEN_BLOCK = Rule(
    name="frozen_block",
    judge=frozen_block,
    needs=("update_ratio",),
    applies="runs whose optimizer is known",
    cause="parameters do not move",
    why="The block stays as initialised while its neighbours learn",
    remedy="give the optimizer this block's parameters, and let them require gradients",
    plots=_PLOTS,
    thresholds=(MOST_FROZEN, STARVED),
)
BRANCH_TOO_LARGE = Rule(
    name="branch_too_large",
    judge=branch_too_large,
    needs=("branch_ratio",),
    cause="one branch is far too large",
    why="One block drowns what all blocks before it have computed",
    remedy="look at that block's initialisation and at factors on its branch",
    plots=_PLOTS,
    thresholds=(
        FIRST_BRANCH,
        TRAINED,
        LARGEST_BRANCH,
        BESIDE_OTHERS,
        *OUTLIER,
        LARGEST_JUMP,
        LARGEST_SHIFT,
    ),
    source="De & Smith 2020, arXiv:2002.10444; " + DEFINITION,
)
MISSING_NORM = Rule(
    name="missing_norm",
    judge=missing_norm,
    needs=("blocks",),
    cause="normalisation missing",
    why="Its branch has another scale than all others",
    remedy="give these blocks the normalisation of the others; call model.train() before training",
    plots=_PLOTS,
    thresholds=(GROWTH_WITHOUT_NORM,),
)
