"""How a run broke down: non-finite numbers and jumps of the gradient, as evidence in time order."""

import math

import numpy as np
import pandas as pd

from resdiag.diagnose.finding import Evidence
from resdiag.diagnose.rundata import RunData

JUMP = 1e3
"""Gradient norm over the median of the recorded steps before."""

EARLIER_STEPS = 5
"""Norms before the median of them is a scale."""

_SOURCE = "definition of resdiag.diagnose.breakdown"


def find_breakdown(seen: RunData) -> list[Evidence]:
    """Everything that shows that the run broke, the earliest step first; empty if it did not.

    A loss or gradient norm that is not finite, the first block that is not (see
    `resdiag.diagnose.nonfinite`), and a gradient norm above 1e3 times its median so far. A missing
    gradient norm of a step that was not recorded is no offence.
    """
    norms = _recorded_norms(seen)
    found = [*_nonfinite("loss", seen.series("loss")), *_nonfinite("grad_norm", norms)]
    if seen.first_nonfinite:
        found.append(_first_nonfinite(seen))
    found += _jump(norms)
    return sorted(found, key=lambda item: item.step or 0)


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
            source=_SOURCE,
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
        source=_SOURCE,
    )


def _jump(norms: "pd.Series[float]") -> list[Evidence]:
    """The first norm above 1e3 times the median of at least 5 finite ones before it."""
    values = norms.to_numpy(dtype=float)
    before = pd.Series(np.where(np.isfinite(values), values, np.nan))
    medians = before.expanding(EARLIER_STEPS).median().shift().to_numpy(dtype=float)
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
            source=_SOURCE,
        )
    ]
