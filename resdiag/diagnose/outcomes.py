"""Runs side by side: what differs in their settings, and what came of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from resdiag.diagnose.finding import plain
from resdiag.diagnose.rundata import RunData
from resdiag.diagnose.verdict import Verdict, judge
from resdiag.runs.folder import Run

PARTED = 0.01
"""Share by which two losses differ, of the larger one, from where on they are said to part."""


NUMBERS = (
    "loss", "test_error", "best_test_error", "train_error", "growth", "gradient_ratio",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run came to; NaN where it was not recorded.

    Attributes:
        run: The run.
        verdict: Its verdict.
        loss: Loss of the last step.
        test_error: Last test error.
        best_test_error: Smallest test error.
        train_error: Training error over the last epoch that was evaluated.
        growth: Factor of E[H^2] per block at the first recorded step, see
            `RunData.growth_per_block`.
        gradient_ratio: Of all recorded steps, the gradient norm of the first block over that of the
            last which is furthest from 1, as a factor.
        gradient_step: The step of that.
    """

    run: Run
    verdict: Verdict
    loss: float
    test_error: float
    best_test_error: float
    train_error: float
    growth: float
    gradient_ratio: float
    gradient_step: int | None

    def numbers(self) -> dict[str, float]:
        """The numbers by name."""
        return {name: getattr(self, name) for name in NUMBERS}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: NaN becomes null, infinities "inf" and "-inf"."""
        about = {
            "run": str(self.run.path), "status": self.run.status, "steps": self.run.steps,
            "verdict": {name: getattr(self.verdict, name) for name in ("name", "step", "block")},
            **self.numbers(), "gradient_step": self.gradient_step,
        }  # fmt: skip
        document = plain(about)
        assert isinstance(document, dict)
        return document


def find_outcome(run: Run) -> Outcome:
    """Judge a run and read its final numbers.

    Raises:
        UsageError: A segment is damaged; the message names it.
    """
    seen, curve = RunData(run), run.curve()
    tests = _known(curve, "test_error")
    losses = seen.series("loss")
    ratio, step = _worst_ratio(seen)
    first = int(seen.metrics["step"].iloc[0]) if len(seen.metrics) else 0
    return Outcome(
        run=run,
        verdict=judge(run),
        loss=float(losses.iloc[-1]) if len(losses) else math.nan,
        test_error=tests[-1],
        best_test_error=float(np.min(tests)),
        train_error=_known(curve, "train_error")[-1],
        growth=seen.growth_per_block(first),
        gradient_ratio=ratio,
        gradient_step=step,
    )


def find_differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs: by name, the value of each run.

    The device, versions and the data that were found count as settings. A run of another kind lacks
    some: None.
    """
    each = [{**_flat(run.config.to_dict()), **_surroundings(run)} for run in runs]
    names = dict.fromkeys(name for settings in each for name in settings)
    table = {name: [settings.get(name) for settings in each] for name in names}
    return {name: values for name, values in table.items() if any(v != values[0] for v in values)}


def find_parting(runs: Sequence[Run]) -> tuple[int, list[float]] | None:
    """The first step where a loss differs from the first run's by `PARTED`, and the losses there.

    A loss that is not finite differs from one that is. None if no common step has such losses.
    """
    series = [RunData(run).series("loss") for run in runs]
    table = pd.concat(series, axis=1, join="inner").sort_index()
    values = table.to_numpy(dtype=float)
    finite = np.isfinite(values)
    with np.errstate(all="ignore"):
        gap = np.abs(values - values[:, :1])
        far = gap > PARTED * np.maximum(np.abs(values), np.abs(values[:, :1]))
    parted = np.where(finite & finite[:, :1], far, finite != finite[:, :1]).any(axis=1)
    if not parted.any():
        return None
    at = int(parted.argmax())
    return int(table.index[at]), [float(value) for value in values[at]]


def _worst_ratio(seen: RunData) -> tuple[float, int | None]:
    """The recorded gradient ratio that is furthest from 1, and its step."""
    steps = [int(step) for step in seen.metrics["step"].unique()] if len(seen.metrics) else []
    ratios = {step: seen.gradient_ratio(step) for step in steps}
    known = {step: ratio for step, ratio in ratios.items() if ratio > 0 and math.isfinite(ratio)}
    if not known:
        return math.nan, None
    worst = max(known, key=lambda step: (abs(math.log(known[step])), -step))
    return known[worst], worst


def _known(curve: pd.DataFrame, column: str) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """The values that are not NaN; one NaN if there is none."""
    values = curve[column].dropna().to_numpy(dtype=float) if column in curve else np.empty(0)
    return values if len(values) else np.array([math.nan])


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings within settings by `outer.inner`."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": part for inner, part in _flat(value).items()}
        else:
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def _surroundings(run: Run) -> dict[str, Any]:
    """What is no setting and can make a difference: the data and the environment."""
    data = {"data.sha256": run.data["sha256"]} if "sha256" in run.data else {}
    return data | {f"environment.{key}": v for key, v in _flat(run.environment).items()}
