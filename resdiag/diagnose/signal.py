"""Rules about signal and gradient over the depth, before any update."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from resdiag.diagnose.advice import lower_lr, normalised_variant, plots, run_variant, variant_of
from resdiag.diagnose.breakdown import describe_end, find_breakdown
from resdiag.diagnose.finding import (
    Evidence,
    Finding,
    Outcome,
    Rule,
    Threshold,
)
from resdiag.diagnose.rundata import RunData
from resdiag.diagnose.units import CONSTANT_OUTPUT

INIT_GROWTH = Threshold(
    1.4,
    "Growth of E[H^2] per block, in two stages, that BatchNorm networks do not reach (<= 1.26).",
)
INIT_LOSS = Threshold(3.0, "Loss at step 0 in units of ln K.")
LEAST_GRADIENT_ELSEWHERE = Threshold(
    1e-3,
    "The same for models other than ours, whose blocks differ in size and place: a collapse "
    "only. Of 11 stock networks at initialisation (convolutional, transformers) the least had "
    "0.1, an nfnet.",
)
LEAST_SIGNAL = Threshold(
    1e-3,
    "Spread within channels of the last block's output over the first block's input's, at first.",
)
LARGEST_SIGNAL = Threshold(
    100.0,
    "RMS of the last block's output at initialisation, and over that of the first block's input.",
)

_LONG = 6
_RATIOS = 2  # a single ratio cannot tell geometric from additive growth


def grows_at_init(seen: RunData) -> Outcome:
    """E[H^2] grows by 1.4 per block in two stages, or the loss is above 3 ln K, at step 0.

    With BatchNorm the second moment grows by a constant per block, which at the beginning of a
    stage looks like a factor. So a stage counts from 3 blocks on, and where stages are that short
    (depth 20) every one has to grow: over 16 seeds and two kinds of images the slowest stage then
    has at most 1.32 with BatchNorm and at least 1.59 in a and b. Of other models nothing is known
    beforehand: there growth counts that goes on, in both halves of a stage of 7 blocks or more;
    a sum of equal branches, which at first looks like a factor, has slowed down by then.
    """
    steep, total = [], None
    if not seen.variant and 0 in seen.steps:
        steep = _steep_halves(seen)
        if not any(row[1] >= _LONG for row in seen.stage_growth(0).values()):
            yield GROWS_AT_INIT.not_judged(
                f"growth at initialisation: no stage of {_LONG + 1} blocks"
            )
        total = _total_growth(seen) if not steep else None
    elif 0 not in seen.steps:
        yield GROWS_AT_INIT.not_judged("growth at initialisation: step 0 was not recorded")
    else:
        stages = seen.stage_growth(0)
        long = {stage: row for stage, row in stages.items() if row[1] >= _RATIOS}
        if len(long) < 2:
            reason = f"growth at initialisation: {len(long)} stages with 3 blocks or more, 2 needed"
            yield GROWS_AT_INIT.not_judged(reason)
        else:
            steep = [(stage, row) for stage, row in long.items() if row[0] >= INIT_GROWTH]
            short = sum(row[1] > _RATIOS for row in long.values()) < 2
            steep = steep if len(steep) >= (len(long) if short else 2) else []
    evidence = [_stage_evidence(seen, stage, *row) for stage, row in steep]
    evidence += [total] if total else []
    loss, classes = seen.scalar("loss", 0), seen.classes
    if classes is None or 0 not in seen.cross_entropy.index:
        missing = "the number of classes" if classes is None else "the loss"
        yield GROWS_AT_INIT.not_judged(f"loss at step 0 against 3 ln K: {missing} is unknown")
    elif seen.first_nonfinite and seen.first_nonfinite.step == 0:
        pass  # a block is broken: its numbers did not grow
    elif not loss <= INIT_LOSS * math.log(classes):  # NaN as well
        guess = math.log(classes)
        text = f"loss at step 0 is {loss:.3g}, guessing is ln {classes} = {guess:.2f}"
        evidence.append(GROWS_AT_INIT.evidence("loss", loss, INIT_LOSS * guess, text, step=0))
    if evidence:
        yield _explain_growth(seen, evidence, find_breakdown(seen))


def _explain_growth(
    seen: RunData, signs: Sequence[Evidence], broken: Sequence[Evidence]
) -> Finding:
    """The finding; `broken` is what followed, if anything did."""
    growth, loss = seen.growth_per_block(0), seen.scalar("loss", 0)
    parts = []
    if math.isfinite(growth):
        parts.append(
            f"the mean square of the blocks' outputs, E[H^2], grows {growth:.2f} times per block "
            "at step 0, before any update"
        )
    if not math.isnan(loss):
        parts.append(f"the loss at step 0 is {loss:.3g}")
    parts.append(describe_end(seen, broken))
    return GROWS_AT_INIT.found(
        *(*signs, *_theory_of_growth(seen, growth), *broken),
        cause=_init_cause(seen, growth, grows=signs[0].block is not None),
        summary="; ".join(filter(None, parts)),
        why=_why_growth(seen, growth),
        next=(
            *plots(*GROWS_AT_INIT.plots, *["nonfinite"] * bool(broken)),
            *(
                run_variant(
                    seen, normalised_variant(seen), "normalised branch, nothing on the skip path"
                )
                or [GROWS_AT_INIT.untried]
            ),
            *(lower_lr(seen) if broken else ()),
        ),
    )


def _why_growth(seen: RunData, growth: float) -> str:
    """The mechanism of growth at initialisation."""
    theory, row = seen.prediction, variant_of(seen)
    if row is None or row.norm or not math.isfinite(growth):
        if _is_bare(seen):
            return "Nothing normalises the branches: each block adds to the signal in proportion."
        return "The signal is multiplied from block to block by the weights as initialised."
    predicted = "" if theory is None else f" (theory: {theory.growth_per_block:.2f})"
    not_elu = {"elu": "The exponential is not the cause: ELU's slope is at most 1"}.get(
        row.activation, "ELU is not the cause: this is a network with ReLU"
    )
    return (
        "Nothing normalises the residual sum, and under He's initialisation each block adds a "
        f"branch as large as its shortcut, so the signal grows {growth:.2f} times per "
        f"block{predicted}. {not_elu}."
    )


def _theory_of_growth(seen: RunData, growth: float) -> list[Evidence]:
    """Growth per block and gradient ratio, measured beside predicted; illustrations."""
    theory = seen.prediction
    if theory is None:
        return []
    ratio = seen.gradient_ratio(0)
    bound = ", which is a lower bound here" if "lower bound" in theory.basis else ""
    pairs = (
        (
            "forward_growth",
            growth,
            theory.growth_per_block,
            "the mean square grows {:.3g} times per block",
        ),
        (
            "grad_input",
            ratio,
            theory.gradient_ratio,
            "the gradient at the first block is {:.3g} times that at the last",
        ),
    )
    return [
        Evidence(
            metric=metric,
            step=0,
            value=measured,
            text=f"{words.format(measured)}, {predicted:.3g} by theory"
            + bound * (metric == "grad_input"),
            source=theory.basis,
        )
        for metric, measured, predicted, words in pairs
        if math.isfinite(measured)
    ]


def _init_cause(seen: RunData, growth: float, *, grows: bool) -> str:
    """What makes a network explode before any update, in a few words.

    `grows` says that growth is what fired; else it was the loss, and growth that a normalised
    network may have is not its cause.
    """
    rows = seen.run.blocks
    if any(row.get("frozen_norm") for row in rows):
        return "BatchNorm in evaluation mode"
    bare = _is_bare(seen)
    variant = variant_of(seen)
    if growth >= 1.2 and (grows or bare or (variant and not variant.norm)):
        bare = bare or bool(variant and not variant.norm)
        return (
            f"the signal grows {growth:.2f} times per block" + ", and nothing normalises it" * bare
        )
    return "logits too large at initialisation"


def _is_bare(seen: RunData) -> bool:
    """Whether the branches are known and have no normalisation."""
    names = [str(name) for row in seen.run.blocks for name in row.get("branch") or ()]
    return bool(names) and not any("norm" in name for name in names)


def _steep_halves(seen: RunData) -> list[tuple[int, tuple[float, int, int]]]:
    """The stages whose second moment grows by `INIT_GROWTH` per block in both halves."""
    moments = seen.profile("output_second_moment", 0)
    steep = []
    for stage, row in seen.stage_growth(0).items():
        members = [b["index"] for b in seen.run.blocks if b["stage"] == stage]
        with np.errstate(all="ignore"):
            logs = np.diff(np.log(moments.reindex(members).to_numpy(dtype=float)))
        halves = [half[np.isfinite(half)] for half in np.array_split(logs, 2)]
        grows = all(len(half) and half.mean() >= math.log(INIT_GROWTH) for half in halves)
        if row[1] >= _LONG and grows:
            steep.append((stage, row))
    return steep


def _total_growth(seen: RunData) -> Evidence | None:
    """A signal that is 100 times as large behind the last block as before the first, and 100."""
    first, last = seen.indices[0], seen.indices[-1]
    begin, end = (
        seen.sizes(s, 0).get(b, math.nan) for s, b in (("input", first), ("output", last))
    )
    if not (end >= LARGEST_SIGNAL and end >= LARGEST_SIGNAL * begin):
        return None
    text = f"the RMS grows from {begin:.3g} before the first block to {end:.3g} behind the last"
    return GROWS_AT_INIT.evidence(
        "output_second_moment", end, LARGEST_SIGNAL, text, step=0, block=first
    )


def _stage_evidence(seen: RunData, stage: int, growth: float, ratios: int, first: int) -> Evidence:
    text = f"E[H^2] grows {growth:.2f} times per block in stage {stage}, from {seen.name(first)}"
    text += f": geometric mean of {ratios} ratios"
    return GROWS_AT_INIT.evidence(
        "output_second_moment", growth, INIT_GROWTH, text, step=0, block=first
    )


def vanishing(seen: RunData) -> Outcome:
    """At the first recorded step signal or gradient falls by 1000 over the network.

    The spread within channels of the last block's output, which is what differs between samples,
    is below 1e-3 of that of the first block's input, or the gradient at that input below 1e-3 of
    that at that output; and the product of these ratios over the blocks is below 1e-3 as well,
    which leaves out what lies between two blocks: a downsampling, a normalisation, or the change
    to another stream, such as the class token's in CaiT. Not where one block loses it all: that is
    `dead_block`. What happens over time inside a recurrent module is not recorded, which is said.
    """
    names = ", ".join(map(str, seen.inventory.get("recurrent") or ()))
    if names:
        yield VANISHING.not_judged(f"gradients over time inside {names} are not recorded")
    if not seen.steps or len(seen.indices) < 2:
        yield VANISHING.not_judged("fewer than 2 blocks were recorded")
        return
    step, first, last = seen.steps[0], seen.indices[0], seen.indices[-1]
    if _is_cut(seen, step):
        return
    signal, gradient = kept_signal(seen, step), kept_gradient(seen, step)
    evidence = []
    for value, metric, least, what in (
        (signal, "output_channel_std", LEAST_SIGNAL, "spread behind the last block"),
        (gradient, "grad_input", LEAST_GRADIENT_ELSEWHERE, "gradient at the first block"),
    ):
        if 0 < value < least:
            text = f"the {what} is {value:.2g} of that at the other end at step {step}"
            block = first if metric == "grad_input" else last
            evidence.append(VANISHING.evidence(metric, value, least, text, step=step, block=block))
    if evidence:
        forward = evidence[0].metric == "output_channel_std"
        cause = "the signal shrinks from block to block" if forward else "the gradient shrinks"
        finding = VANISHING.found(
            *evidence,
            cause=cause + " at initialisation",
            summary="; ".join(item.text for item in evidence),
        )
        yield replace(finding, block=None)


def kept_signal(seen: RunData, step: int) -> float:
    """The spread behind the last block over that before the first, as `kept_gradient`."""
    first, last = seen.indices[0], seen.indices[-1]
    with np.errstate(all="ignore"):
        end = np.float64(seen.value("output_channel_std", step, last))
        whole = float(end / np.float64(seen.value("input_channel_std", step, first)))
    return max(whole, _along_blocks(seen, step, "output_channel_std", "input_channel_std"))


def kept_gradient(seen: RunData, step: int) -> float:
    """The gradient at the first block's input over that at the last one's output.

    Where the blocks are of several streams, these gradients do not belong together: at least the
    product of the ratios of every block counts.
    """
    return max(seen.gradient_ratio(step), _along_blocks(seen, step, "grad_input", "grad_output"))


def _along_blocks(seen: RunData, step: int, end: str, start: str) -> float:
    """The product over the blocks of `end` over `start`; 0 where more than one block lacks it.

    The first unit of a network has no gradient at its input. Ratios of 0 and to 0 are left out.
    """
    with np.errstate(all="ignore"):
        logs = np.log((seen.profile(end, step) / seen.profile(start, step)).to_numpy(dtype=float))
        if np.isnan(logs).sum() > 1:
            return 0.0
        return float(np.exp(logs[np.isfinite(logs)].sum()))


def _is_cut(seen: RunData, step: int) -> bool:
    """Whether one block's output is constant, and those before it have kept the signal."""
    with np.errstate(all="ignore"):
        kept = seen.profile("output_channel_std", step) / seen.profile("input_channel_std", step)
    cut = (kept <= CONSTANT_OUTPUT).to_numpy()
    if not cut.any():
        return False
    before = kept.to_numpy(dtype=float)[: int(cut.argmax())]
    return bool(np.prod(before) >= LEAST_SIGNAL)


GROWS_AT_INIT = Rule(
    name="grows_at_init",
    judge=grows_at_init,
    needs=("output_channel_std", "loss"),
    applies="runs recorded at step 0",
    is_condition=True,
    cause="the signal grows from block to block before any update",
    why="The signal is multiplied from block to block by the weights as initialised",
    remedy="normalise the branches, or begin them near zero (Fixup, SkipInit)",
    plots=("signal", "gradnorms"),
    thresholds=(INIT_GROWTH, INIT_LOSS, LARGEST_SIGNAL),
    source="thresholds between measured families at depths 20, 56, 110; Zhang et al. 2019 (Fixup)",
)
VANISHING = Rule(
    name="vanishing",
    judge=vanishing,
    needs=("input_channel_std", "output_channel_std", "grad_input", "grad_output"),
    applies="networks of 2 blocks or more",
    is_condition=True,
    cause="signal or gradient shrinks at initialisation",
    why="The weights as initialised multiply by less than 1 in every block; "
    "He's variance, a normalisation or a shortcut keeps the scale",
    remedy="initialise with He's variance, or add a normalisation or shortcuts",
    plots=("signal", "gradnorms"),
    thresholds=(LEAST_SIGNAL, LEAST_GRADIENT_ELSEWHERE),
    source="Glorot & Bengio 2010; He et al. 2015, arXiv:1502.01852, section 2.2",
)
