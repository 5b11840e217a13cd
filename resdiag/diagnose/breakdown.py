"""`exploded`: how a run broke down, as evidence in time order, and the finding of it."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from resdiag.diagnose.advice import lower_lr, plots, variant_of
from resdiag.diagnose.finding import DEFINITION, Evidence, Finding, Outcome, Rule, Threshold
from resdiag.diagnose.rundata import RunData, once_per_run
from resdiag.theory.prediction import CRITICAL

JUMP = Threshold(1e3, "Gradient norm over the median of the recorded steps before.")
EARLIER_STEPS = Threshold(5, "Norms before the median of them is a scale.")


def exploded(seen: RunData) -> Outcome:
    """A non-finite loss or gradient, or a gradient norm 1e3 times the median before."""
    if seen.series("loss").empty and seen.series("grad_norm").empty and not seen.steps:
        yield EXPLODED.not_judged("neither a loss nor a gradient was recorded")
        return
    evidence = find_breakdown(seen)
    if evidence:
        yield _explain(seen, evidence)
    elif count_norms(seen) <= EARLIER_STEPS:
        reason = f"jump of the gradient: {count_norms(seen)} norms, {EARLIER_STEPS + 1:g} needed"
        yield EXPLODED.not_judged(reason, f"{EARLIER_STEPS + 1:g} gradient norms")


def _explain(seen: RunData, broken: Sequence[Evidence]) -> Finding:
    block = next((item.block for item in broken if item.block is not None), None)
    row = variant_of(seen)
    norm = seen.scalar("grad_norm", 0)
    why = EXPLODED.why
    if seen.lr * norm >= CRITICAL:
        why = f"The step was too large: lr x ||g_0|| = {seen.lr * norm:.3g}, above {CRITICAL}"
    elif row and not row.norm:
        why = "Nothing normalises the branches: growing weights multiply the signal in every block"
    if seen.first_nonfinite and seen.first_nonfinite.direction == "backward":
        outputs = seen.profile("output_nonfinite", seen.first_nonfinite.step)
        whole = outputs.notna().all() and len(outputs) == len(seen.indices)
        why += "; all activations were finite" if whole else "; of the activations that are known"
        why += ", the backward pass broke first" if whole else " at that step none was non-finite"
    finding = EXPLODED.found(
        *broken,
        cause=_breakdown_cause(seen, broken),
        summary=describe_end(seen, broken),
        why=why,
        next=(*plots(*EXPLODED.plots), *(lower_lr(seen) or [EXPLODED.untried])),
    )
    return replace(finding, block=block)


def _breakdown_cause(seen: RunData, broken: Sequence[Evidence]) -> str:
    found = seen.first_nonfinite
    if found is not None and found.step == 0:
        return "non-finite numbers in the block from the beginning"
    if found is not None:
        return f"non-finite numbers, {found.direction} in {seen.name(found.block)} first"
    return "gradient jumped" if "times its median" in broken[0].text else "loss not finite"


def describe_end(seen: RunData, broken: Sequence[Evidence]) -> str:
    """Where and when the run broke, or ""."""
    if not broken:
        return ""
    first, found = broken[0], seen.first_nonfinite
    if found is None:
        return first.text
    where = f"{found.direction} in {seen.name(found.block)}, site {found.site}"
    text = f"non-finite at step {found.step}, {where}"
    return text if first.step == found.step else f"{first.text}; {text}"


@once_per_run
def find_breakdown(seen: RunData) -> tuple[Evidence, ...]:
    """Everything that shows that the run broke, the earliest step first; empty if it did not.

    A loss or gradient norm that is not finite, the first block that is not (see
    `resdiag.diagnose.nonfinite`), and a gradient norm above 1e3 times its median so far. A missing
    gradient norm of a step that was not recorded does not count.
    """
    norms = _recorded_norms(seen)
    found = [*_nonfinite("loss", seen.series("loss")), *_nonfinite("grad_norm", norms)]
    if seen.first_nonfinite:
        found.append(_first_nonfinite(seen))
    found += _jump(norms)
    return tuple(sorted(found, key=lambda item: item.step or 0))


def count_norms(seen: RunData) -> int:
    """Finite gradient norms that the run has."""
    return int(np.isfinite(_recorded_norms(seen).to_numpy(dtype=float)).sum())


def _recorded_norms(seen: RunData) -> "pd.Series[float]":
    norms = seen.series("grad_norm")
    if norms.notna().any():
        recorded = pd.Series(norms.index.isin(seen.steps), index=norms.index)
        return norms[recorded | norms.notna()]
    return norms.dropna()


def _nonfinite(metric: str, series: "pd.Series[float]") -> list[Evidence]:
    bad = ~np.isfinite(series.to_numpy(dtype=float))
    if not bad.any():
        return []
    at = int(bad.argmax())
    step, value = int(series.index[at]), float(series.to_numpy()[at])
    return [
        Evidence(
            metric=metric,
            step=step,
            value=value,
            threshold=math.inf,
            text=f"{metric} is {value} at step {step}, for the first time",
            source=DEFINITION,
        )
    ]


def _first_nonfinite(seen: RunData) -> Evidence:
    found = seen.first_nonfinite
    assert found is not None
    forward = found.direction == "forward"
    metric = f"{found.site}_nonfinite" if forward else "grad_nonfinite"
    where = "first block" if forward else "first block in backward order"
    return Evidence(
        metric=metric,
        step=found.step,
        block=found.block,
        value=seen.value(metric, found.step, found.block),
        threshold=0.0,
        text=f"{found.direction}: {seen.name(found.block)} is the {where} with a non-finite "
        f"{'activation' if forward else 'gradient'} (site: {found.site}) at step {found.step}",
        source=DEFINITION,
    )


def _jump(norms: "pd.Series[float]") -> list[Evidence]:
    """The first norm above 1e3 times the median of at least 5 finite ones before it."""
    values = norms.to_numpy(dtype=float)
    before = pd.Series(np.where(np.isfinite(values), values, np.nan))
    medians = before.expanding(int(EARLIER_STEPS)).median().shift().to_numpy(dtype=float)
    with np.errstate(all="ignore"):
        jumps = np.isfinite(values) & (medians > 0) & (values / JUMP > medians)
    if not jumps.any():
        return []
    at = int(jumps.argmax())
    return [
        Evidence(
            metric="grad_norm",
            step=int(norms.index[at]),
            value=float(values[at]),
            threshold=float(JUMP * medians[at]),
            text=f"gradient norm {values[at]:.3g} at step {norms.index[at]} is "
            f"{values[at] / medians[at]:.2g} times its median so far",
            source=DEFINITION,
        )
    ]


EXPLODED = Rule(
    name="exploded",
    judge=exploded,
    needs=("loss", "grad_norm"),
    cause="loss not finite",
    why="The numbers left the range in which updates reduce the loss",
    remedy="lower the learning rate; look at the first block with a non-finite number",
    plots=("nonfinite", "gradnorms", "updates"),
    thresholds=(JUMP, EARLIER_STEPS),
)
