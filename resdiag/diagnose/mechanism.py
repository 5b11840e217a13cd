"""Mechanisms: each finding's summary, its why with theory beside measurement, and what to do."""

import math
from collections.abc import Sequence
from pathlib import Path

from resdiag.diagnose.finding import Evidence, Finding, confidence
from resdiag.diagnose.rundata import RunData
from resdiag.errors import UsageError
from resdiag.models.variants import Variant, find_variant
from resdiag.theory.prediction import CRITICAL, critical_lr


def explain_init(
    seen: RunData, block: int | None, signs: Sequence[Evidence], broken: Sequence[Evidence]
) -> Finding:
    """Exploded at initialisation; `broken` is what followed, if anything did."""
    growth, loss = seen.growth_per_block(0), seen.scalar("loss", 0)
    parts = []
    if math.isfinite(growth):
        parts.append(f"E[H^2] is multiplied by {growth:.2f} per block at step 0, before any update")
    if not math.isnan(loss):
        parts.append(f"the loss at step 0 is {loss:.3g}")
    parts.append(_end_of(seen, broken))
    return Finding(
        name="exploded_at_init",
        cause=_init_cause(seen, growth, grows=block is not None),
        step=0,
        block=block,
        summary="; ".join(filter(None, parts)) + ".",
        why=_why_growth(seen, growth),
        evidence=(*signs, *_theory_of_growth(seen, growth), *broken),
        next=(
            *_plots(seen, "signal", "gradnorms", *["nonfinite"] * bool(broken)),
            *_runs(seen, _normalised(seen), "normalised branch, nothing on the skip path"),
            *_lower_lr(seen),
        ),
    )


def explain_explosion(seen: RunData, broken: Sequence[Evidence]) -> Finding:
    """Broke down during training; `broken` has at least one piece of evidence."""
    block = next((item.block for item in broken if item.block is not None), None)
    row = _variant(seen)
    norm = seen.scalar("grad_norm", 0)
    why = "The numbers left the range in which updates reduce the loss"
    if seen.lr * norm >= CRITICAL:
        why = f"The step was too large: lr x ||g_0|| = {seen.lr * norm:.3g}, above {CRITICAL}"
    elif row and not row.norm:
        why = "Nothing normalises the branches, so weights that grow multiply E[H^2] in every block"
    if seen.first_nonfinite and seen.first_nonfinite.direction == "backward":
        why += "; all activations were finite, the backward pass broke first"
    return Finding(
        name="exploded",
        cause=_breakdown_cause(seen, broken),
        step=broken[0].step,
        block=block,
        summary=_sentence(_end_of(seen, broken)),
        why=why + ".",
        evidence=tuple(broken),
        next=(
            *_plots(seen, "nonfinite", "gradnorms", "updates"),
            *_lower_lr(seen),
        ),
    )


def explain_vanishing(seen: RunData, evidence: Sequence[Evidence]) -> Finding:
    """Signal or gradient is lost at initialisation."""
    forward = any(item.metric == "output_channel_std" for item in evidence)
    cause = "the signal shrinks from block to block" if forward else "the gradient shrinks"
    return Finding(
        name="vanishing",
        step=evidence[0].step,
        cause=cause + " at initialisation",
        summary=_sentence("; ".join(item.text for item in evidence)),
        why="The weights as initialised multiply by less than 1 in every block; "
        "He's variance, a normalisation or a shortcut keeps the scale.",
        evidence=tuple(evidence),
        next=_plots(seen, "signal", "gradnorms"),
        confidence=max(confidence(item.value, item.threshold) for item in evidence),
    )


def explain_overfit(seen: RunData, evidence: Evidence) -> Finding:
    """The test images get worse, the training images better: no degradation."""
    return Finding(
        name="overfit",
        step=evidence.step,
        cause="overfitting",
        summary=_sentence(evidence.text),
        why="The network still gets better on what it is trained on: this is no degradation, "
        "which is a training error that grows with depth (He et al. 2015, arXiv:1512.03385).",
        evidence=(evidence,),
        next=_plots(seen, "curves"),
        confidence=confidence(evidence.value, evidence.threshold / 1.2),
    )


def explain_collapse(seen: RunData, evidence: Sequence[Evidence]) -> Finding:
    """The skip path stopped carrying gradient."""
    row, theory = _variant(seen), seen.prediction
    what = "Gradient that reaches the last block hardly reaches the first"
    if row and row.after_add != "none":
        what = (
            f"The {row.after_add.upper()} after each addition multiplies the skip path by its slope"
            " and has driven units below 0, where that slope is small"
        )
    at_init = "" if theory is None else _beside(theory.skip_gain[-1], "skip gain {:.2g}")
    items = list(evidence)
    if at_init and theory is not None:
        items.append(
            Evidence(
                metric="skip_gain",
                step=0,
                block=seen.indices[-1],
                value=float(theory.skip_gain[-1]),
                text=f"theory at initialisation: skip gain {theory.skip_gain[-1]:.2g} at the last "
                f"block, measured at step 0: {_initial_gain(seen):.2g}",
                source=theory.basis,
            )
        )
    since = min(item.step for item in evidence if item.step is not None)
    return Finding(
        name="skip_collapsed",
        cause="the skip path carries no gradient any more",
        step=since,
        block=evidence[0].block,
        summary=_sentence("; ".join(item.text for item in evidence)),
        why=f"{what}{at_init}.",
        evidence=tuple(items),
        next=(
            *_plots(seen, "skip", "biasshift", "gradnorms"),
            *_runs(seen, f"elu --depth {seen.depth}", "nothing on the skip path"),
            *_lower_lr(seen),
        ),
    )


def explain_stall(seen: RunData, evidence: Evidence) -> Finding:
    """The loss stayed at that of guessing."""
    return Finding(
        name="stalled",
        cause="the network guesses",
        step=evidence.step,
        summary=_sentence(evidence.text),
        why="The network guesses: its output does not depend on the image. Look for dead or "
        "saturated units, for updates that are too small, and for labels that do not fit.",
        evidence=(evidence,),
        next=_plots(seen, "curves", "updates", "skip"),
    )


def explain_risk(seen: RunData, evidence: Evidence) -> Finding:
    """The first step is large for this gradient."""
    row, losses = _variant(seen), seen.series("loss")
    why = (
        f"Of 28 runs of a and b every one with lr x ||g_0|| up to {CRITICAL} survived its first "
        "steps and every one from 1.07 on died"
    )
    if row and row.norm:
        why += "; BatchNorm, as here, usually survives more, with a rough start"
    if len(losses) and math.isfinite(losses.iloc[-1]):
        why += f"; this run has survived {len(losses)} steps"
    return Finding(
        name="at_risk",
        cause="the first step is large",
        step=0,
        summary=f"The first step is large for the gradient: {evidence.text}.",
        why=why + ".",
        evidence=(evidence,),
        next=(*_plots(seen, "gradnorms", "curves"), *_lower_lr(seen)),
    )


def suggest_plots(seen: RunData) -> tuple[str, ...]:
    """What to look at when no rule fired."""
    return _plots(seen, "signal", "gradnorms", "biasshift")


def _why_growth(seen: RunData, growth: float) -> str:
    """The mechanism of growth at initialisation."""
    theory, row = seen.prediction, _variant(seen)
    if row is None or row.norm or not math.isfinite(growth):
        return "The signal is multiplied from block to block by the weights as initialised."
    predicted = "" if theory is None else f", x{theory.growth_per_block:.2f} by theory"
    not_elu = {"elu": "ELU' <= 1, so it is not 'the exponential'"}.get(
        row.activation, "with ReLU, so it is not ELU"
    )
    return (
        "Un-normalised residual sum under He's initialisation: each block adds a branch as large "
        f"as its shortcut, so E[H^2] grows x{growth:.2f} per block{predicted}; {not_elu}."
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
            "E[H^2] per block: x{:.3g}",
        ),
        ("grad_input", ratio, theory.gradient_ratio, "||g_0|| / ||g_L||: {:.3g}"),
    )
    return [
        Evidence(
            metric=metric,
            step=0,
            value=measured,
            text=f"{words.format(measured)} measured, {predicted:.3g} by theory"
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
    names = [str(name) for row in rows for name in row.get("branch") or ()]
    bare = bool(names) and not any("norm" in name for name in names)
    variant = _variant(seen)
    if growth >= 1.2 and (grows or bare or (variant and not variant.norm)):
        without = " without normalisation" if bare or (variant and not variant.norm) else ""
        return f"forward variance x{growth:.2f} per block{without}"
    return "logits too large at initialisation"


def _breakdown_cause(seen: RunData, broken: Sequence[Evidence]) -> str:
    """What broke, in a few words."""
    found = seen.first_nonfinite
    if found is not None and found.step == 0:
        return "non-finite numbers in the block from the beginning"
    if found is not None:
        return f"non-finite numbers, {found.direction} in {seen.name(found.block)} first"
    return "gradient jumped" if "times its median" in broken[0].text else "loss not finite"


def _end_of(seen: RunData, broken: Sequence[Evidence]) -> str:
    """Where and when the run broke, or ""."""
    if not broken:
        return ""
    first, found = broken[0], seen.first_nonfinite
    if found is None:
        return first.text
    where = f"{found.direction} in {seen.name(found.block)}, site {found.site}"
    text = f"non-finite at step {found.step}, {where}"
    return text if first.step == found.step else f"{first.text}; {text}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _beside(value: float, words: str) -> str:
    return "" if math.isnan(value) else f"; theory at initialisation: {words.format(value)}"


def _initial_gain(seen: RunData) -> float:
    return seen.value("skip_gain", 0, seen.indices[-1])


def _variant(seen: RunData) -> Variant | None:
    try:
        return find_variant(seen.variant)
    except UsageError:
        return None


def _normalised(seen: RunData) -> str:
    """The normalised variant with the same activation and nothing after the addition."""
    row = _variant(seen)
    return f"{'no_relu' if row and row.activation == 'relu' else 'elu'} --depth {seen.depth}"


def _plots(seen: RunData, *kinds: str) -> tuple[str, ...]:
    path = seen.run.path
    where = "" if path == Path() else f" {path}"
    return tuple(f"resdiag plot {kind}{where}" for kind in kinds)


def _lower_lr(seen: RunData) -> tuple[str, ...]:
    """The same network at a tenth of the learning rate, or below the critical one if that is less.

    Two digits, rounded down: rounding up could cross the threshold again.
    """
    norm = seen.scalar("grad_norm", 0)
    lr, reason = seen.lr / 10, "a tenth of the learning rate"
    if math.isfinite(norm) and critical_lr(norm) < lr:
        lr, reason = critical_lr(norm), "below 0.6 / ||g_0||"
    if not (lr > 0 and math.isfinite(lr)):
        return ()
    digit = 10.0 ** (math.floor(math.log10(lr)) - 1)
    options = f"{seen.variant} --depth {seen.depth} --lr {math.floor(lr / digit) * digit:.2g}"
    return _runs(seen, options, reason)


def _runs(seen: RunData, options: str, reason: str) -> tuple[str, ...]:
    """A run to compare with, if the network is one of ours."""
    return (f"resdiag run --variant {options}  # {reason}",) if _variant(seen) else ()
