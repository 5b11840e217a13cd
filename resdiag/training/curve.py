"""The step-level table of a run while it grows: one row per optimizer step."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resdiag.catalog.table import RECORDED_PER_STEP

_MONITORED = tuple(name for name in RECORDED_PER_STEP if name != "lr")
_EVALUATED = ("train_loss", "train_error", "test_loss", "test_error")
COLUMNS = ("step", "epoch", "loss", "error", "lr", "images_per_s", *_EVALUATED, *_MONITORED)


class Curve:
    """Rows since the last commit; what a monitor and an evaluation add comes later by step."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[str, float]] = {}

    def add(self, step: int, **values: float) -> None:
        """Set columns of a step's row; a row begins with NaN everywhere."""
        row = self._rows.setdefault(step, dict.fromkeys(COLUMNS, math.nan))
        row["step"] = step
        row.update(values)

    def merge(self, monitored: Mapping[str, NDArray[Any]]) -> None:
        """Add a monitor's per-step columns to the rows of their steps."""
        for i, step in enumerate(monitored["step"].tolist()):
            values = {name: float(monitored[name][i]) for name in _MONITORED if name in monitored}
            self.add(step, **values)

    def take(self) -> dict[str, NDArray[Any]]:
        """The rows as columns; the curve is empty afterwards."""
        rows = [self._rows[step] for step in sorted(self._rows)]
        self._rows = {}
        return {name: np.array([row[name] for row in rows], dtype=_dtype(name)) for name in COLUMNS}


def _dtype(name: str) -> type[np.generic]:
    """Losses and norms of an explosion leave float32's range while they are still numbers."""
    return np.int32 if name == "step" else np.float64
