"""The sets of metrics that have a cadence of their own: when each is due, and what it measured."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from resdiag.catalog.columns import Columns
from resdiag.catalog.columns import gap as unknown
from resdiag.catalog.set_metrics import BASES, columns_of
from resdiag.watch.base.safety import Guard

Scalars = Mapping[str, Tensor]
"""0-d tensors by column."""


class Sparse:
    """Numbers that few steps have: they stay on the device until a flush, in columns of their own.

    A column is in the record once a number of it is.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[int, int | None, str], Tensor] = {}

    def put(self, step: int, row: int | None, values: Scalars) -> None:
        """Keep numbers of a step's block, or of the whole step where `row` is None."""
        self._values |= {(step, row, name): value.detach() for name, value in values.items()}

    def forget(self, step: int, rows: Collection[int] | None = None) -> bool:
        """Drop what a step has, of some blocks or of all, and say whether there was any."""
        lost = {key for key in self._values if key[0] == step and (rows is None or key[1] in rows)}
        self._values = {key: value for key, value in self._values.items() if key not in lost}
        return bool(lost)

    def write(self, metrics: Columns, curve: Columns) -> None:
        """Move the numbers of the steps in two tables into them: a column each."""
        steps = set(curve["step"].tolist())
        due = {key: value for key, value in self._values.items() if key[0] in steps}
        self._values = {key: value for key, value in self._values.items() if key[0] not in steps}
        if not due:
            return
        numbers = torch.stack([value.double().reshape(()) for value in due.values()]).tolist()
        for (step, row, name), number in zip(due, numbers, strict=True):
            table = curve if row is None else metrics
            here = table["step"] == step
            if row is not None:
                here = here & (table["block"] == row)
            table.setdefault(name, unknown(len(here)).astype(np.float32))[here] = number


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which steps are recorded, and every how many steps each set.

    Attributes:
        every: Every `every`-th step is recorded,
        first: and so many first ones.
        cadences: Of the sets, see `set_metrics.cadences`.
        asked: Whether the user named the sets: then what is not there is said, too.
    """

    every: int
    first: int
    cadences: Mapping[str, int]
    asked: bool

    def is_due(self, step: int) -> bool:
        """Whether a step is recorded."""
        return step < self.first or step % self.every == 0

    def has_multiple(self, step: int, every: int) -> bool:
        """Whether a multiple came since the recorded step before."""
        before = step - (1 if step < self.first else self.every)
        return step // every > before // every


class Sets:
    """Which sets with a cadence of their own are recorded, and in which steps.

    Args:
        schedule: Their cadences.
        sparse: Where their numbers go.
        guard: Where is noted what could not be measured.
    """

    def __init__(self, schedule: Schedule, sparse: Sparse, guard: Guard) -> None:
        self.guard, self.asked, self.step = guard, schedule.asked, 0
        self._schedule, self._sparse = schedule, sparse
        self._every = {n: every for n, every in schedule.cadences.items() if n not in BASES}

    @property
    def names(self) -> tuple[str, ...]:
        """The sets that are recorded."""
        return tuple(self._every)

    def begin(self, step: int) -> None:
        """A pass is recorded in this step."""
        self.step = step
        self._sparse.forget(step)

    def is_due(self, name: str) -> bool:
        """Whether a set is recorded in this step: the first recorded one from a multiple on."""
        every = self._every.get(name)
        return every is not None and self._schedule.has_multiple(self.step, every)

    def stop(self, name: str, reason: str = "") -> None:
        """Never record a set any more; without a reason nothing is missing."""
        del self._every[name]
        if reason:
            self.lack(name, reason)

    def lack(self, name: str, reason: str) -> None:
        """A set is missing for all blocks."""
        for column in columns_of(name):
            self.guard.reasons[column][reason] = set()

    def miss(self, name: str, row: int, reason: str) -> None:
        """A set is missing for a block."""
        self.guard.miss(row, columns_of(name), reason)

    def reject(self, rows: Collection[int], reason: str) -> None:
        """Blocks of the pass are not those that were expected: nothing was measured of them."""
        if self._sparse.forget(self.step, rows):
            for row in rows:
                self.miss("extremes", row, reason)

    def put(self, row: int | None, values: Scalars) -> None:
        """Keep numbers of a block, or of the step."""
        self._sparse.put(self.step, row, values)
