"""What a training keeps of its steps: its curve, the counters of an epoch, a block's change."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resdiag.catalog.table import RECORDED_PER_STEP
from resdiag.runs.segments import CURVE

_MONITORED = tuple(name for name in RECORDED_PER_STEP if name != "lr")
COLUMNS = tuple(CURVE.names)


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
        # float64: losses and norms of an explosion leave float32's range while they are numbers
        columns = {name: np.array([row[name] for row in rows], np.float64) for name in COLUMNS}
        return {**columns, "step": columns["step"].astype(np.int32)}


@dataclass
class EpochCounters:
    """What a training counts and must not forget when it is resumed.

    Attributes:
        exploded: First step with a non-finite loss, -1 before.
        loss_sum: Sum over samples of the loss in the running epoch.
        wrong: Wrong predictions in the running epoch.
        seen: Samples in the running epoch.
    """

    exploded: int = -1
    loss_sum: float = 0.0
    wrong: float = 0.0
    seen: int = 0


class MostChangedBlock:
    """The block whose output gradient changed most since the first recorded step.

    Attributes:
        words: It, or the first block that is not finite; "" before anything is recorded.
    """

    def __init__(self) -> None:
        self.words = ""
        self._first: tuple[int, NDArray[Any]] | None = None

    def update(self, metrics: Mapping[str, NDArray[Any]]) -> None:
        """Read the last recorded step of newly recorded rows."""
        step = metrics["step"]
        gradients = metrics["grad_output"].astype(np.float64)
        if self._first is None:
            self._first = int(step[0]), gradients[step == step[0]]
        last = step == step[-1]
        nonfinite = np.flatnonzero(metrics["output_nonfinite"][last] > 0)
        if nonfinite.size:
            self.words = f"block {nonfinite[0]} is not finite"
            return
        since, before = self._first
        with np.errstate(all="ignore"):
            factor = gradients[last] / before
            change = np.abs(np.log10(factor))
        change[~np.isfinite(change)] = np.nan
        if np.isnan(change).all():
            self.words = ""
            return
        most = int(np.nanargmax(change))
        self.words = f"block {most}: gradient x{factor[most]:.2g} since step {since}"
