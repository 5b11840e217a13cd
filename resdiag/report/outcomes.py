"""What one run came to: the measures that a study file can expect, as plain numbers and words."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from resdiag.study.spec import OUTCOMES, WORDS, Expected

if TYPE_CHECKING:
    import pandas as pd

    from resdiag.runs.folder import Run

Outcome: TypeAlias = float | str
"""A number, NaN where it could not be had, or a word."""


def key_of(expected: Expected) -> str:
    """The name of what is expected among a run's outcomes: `skip_gain@0@-1` for a metric."""
    place = [str(part) for part in (expected.step, expected.block) if part is not None]
    return "@".join([expected.measure, *place])


def measure(run: "Run", expected: Iterable[Expected]) -> dict[str, Outcome]:
    """Everything in `OUTCOMES`, the last loss, and the metrics that the study expects.

    Args:
        run: It may be unfinished; what only an end has is NaN then.
        expected: Values of the study file.
    """
    curve = run.curve()
    found: dict[str, Outcome] = {"status": run.status, "loss": _last(curve, "loss")}
    if run.written_verdict:  # a run that was killed after its last step has none yet
        found["verdict"] = str(run.written_verdict.get("name", ""))
    found |= {name: _over(run, curve, name) for name in OUTCOMES if name not in WORDS}
    wanted = {key_of(item): item for item in expected if item.measure not in OUTCOMES}
    by_block = {item.measure for item in wanted.values() if item.block is not None}
    frame = run.metrics(by_block) if by_block else None
    for key, item in wanted.items():
        found[key] = _at(curve, frame, item, len(run.blocks))
    return found


def _over(run: "Run", curve: "pd.DataFrame", name: str) -> float:
    """One of the numbers that a whole run has."""
    if name == "first_nonfinite_step":
        return _first_nonfinite(curve)
    if name == "best_test_error":
        values = _values(curve, "test_error")
        return float(values.min()) if len(values) else math.nan
    # an error of an earlier epoch is not that of the end
    return _last(curve, name) if run.status == "done" else math.nan


def _values(curve: "pd.DataFrame", column: str) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    if column not in curve:
        return np.empty(0)
    values: np.ndarray[tuple[int], np.dtype[np.float64]] = curve[column].to_numpy(dtype=np.float64)
    return values[np.isfinite(values)]


def _last(curve: "pd.DataFrame", column: str) -> float:
    values = _values(curve, column)
    return float(values[-1]) if len(values) else math.nan


def _first_nonfinite(curve: "pd.DataFrame") -> float:
    """First step whose loss is not finite or whose recorded gradient norm is infinite."""
    if not len(curve):
        return math.nan
    loss = curve["loss"].to_numpy(dtype=np.float64)
    norm = curve["grad_norm"].to_numpy(dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(loss) | np.isinf(norm))
    return float(curve["step"].to_numpy()[bad[0]]) if len(bad) else math.nan


def _at(curve: "pd.DataFrame", frame: "pd.DataFrame | None", item: Expected, blocks: int) -> float:
    """A metric at its step, and at its block if it has one."""
    table = curve if item.block is None else frame
    if table is None or item.measure not in table:
        return math.nan
    rows = table["step"] == item.step
    if item.block is not None:
        rows &= table["block"] == (item.block if item.block >= 0 else blocks + item.block)
    values = table[item.measure][rows].to_numpy(dtype=np.float64)
    return float(values[0]) if len(values) else math.nan
