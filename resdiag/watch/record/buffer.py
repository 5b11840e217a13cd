"""Where numbers wait on the device until they cross to the host, many steps at a time."""

import math
from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resdiag.watch.measure.reductions import Scalar, stack

Key = tuple[int, str]
"""A cell of one step: row and column name."""

_KEPT = 128

_Alias = tuple[int, slice, int, slice]
"""Row and columns, and the row and columns whose cells they equal."""


class Buffer:
    """Preallocated float64 cells [slots, rows, columns] on the device of the model.

    A slot is one recorded step. Writing is a device-side copy; the host sees nothing until `flush`
    copies all used slots at once, which is due when no slot is free.
    """

    def __init__(self, columns: tuple[str, ...], slots: int) -> None:
        self.columns, self._slots = columns, slots
        self._at = {name: i for i, name in enumerate(columns)}
        self._cells: Tensor | None = None
        self._loose: list[tuple[int, Key, Scalar]] = []
        self._steps: list[int] = []
        self._taken = 0  # slots that were flushed while a later one was open
        self._aliases: list[list[_Alias]] = []
        # kept: sending numbers to an accelerator makes the host wait; of this buffer, so that they
        # go with it
        self._places: dict[tuple[tuple[int, ...], int, torch.device], Tensor] = {}

    @property
    def is_full(self) -> bool:
        """Whether the next step needs a flush first."""
        return len(self._steps) >= self._slots

    @property
    def device(self) -> torch.device:
        """Where the cells are."""
        return torch.device("cpu") if self._cells is None else self._cells.device

    @property
    def slot(self) -> int:
        """The slot of the step being recorded."""
        return len(self._steps) - 1

    def begin(self, step: int) -> None:
        """Open a slot for `step`; if the last slot is that step's already, wipe it."""
        if self._steps[self._taken :][-1:] != [step]:
            self._steps.append(step)
            self._aliases.append([])
        self._aliases[-1].clear()
        self.wipe()

    def wipe(self) -> None:
        """Forget what the open slot holds."""
        if self._cells is not None and self._steps:
            self._cells[self.slot].fill_(math.nan)

    def reject(self, rows: Collection[int]) -> list[tuple[Key, Key]]:
        """Rows of the open slot hold nothing: forget what was put, and that cells equal others.

        Returns the first cells of other rows that were to equal cells of these, and those.
        """
        slot = self.slot
        self._loose = [one for one in self._loose if one[0] != slot or one[1][0] not in rows]
        aliases = self._aliases[slot]
        lost = [
            ((row, self.columns[columns.start]), (source, self.columns[there.start]))
            for row, columns, source, there in aliases
            if source in rows and row not in rows
        ]
        self._aliases[slot] = [one for one in aliases if one[0] not in rows and one[2] not in rows]
        return lost

    def read_column(self, slot: int, name: str) -> Tensor:
        """One value per row, on the device; a view."""
        assert self._cells is not None
        return self._cells[slot, :, self._at[name]]

    def reserve(self, rows: int, device: torch.device) -> None:
        """Make room for `rows` rows; what is there stays."""
        have = 0 if self._cells is None else self._cells.shape[1]
        if rows <= have:
            return
        grown = max(rows, 2 * have, 16)
        shape = (self._slots, grown, len(self.columns))
        cells = torch.full(shape, math.nan, dtype=torch.float64, device=device)
        if self._cells is not None:
            cells[:, :have] = self._cells
        self._cells = cells

    def write(self, slot: int, row: int, first: str, values: Tensor) -> None:
        """Write a vector (or a scalar) into consecutive columns from `first`, on the device."""
        assert self._cells is not None
        start = self._at[first]
        self._cells[slot, row, start : start + max(1, values.numel())] = values

    def write_rows(self, slot: int, keys: Sequence[Key], values: Tensor) -> None:
        """Write vectors (n, k) into the k consecutive columns that begin at each key."""
        assert self._cells is not None
        starts = tuple(row * len(self.columns) + self._at[name] for row, name in keys)
        self._cells[slot].view(-1)[self._index(starts, values.shape[1], values.device)] = values

    def put(self, slot: int, row: int, name: str, value: Scalar) -> None:
        """Keep a value for a cell until `settle`: many small writes become one."""
        self._loose.append((slot, (row, name), value))

    def settle(self) -> None:
        """Write what was put."""
        loose, self._loose = self._loose, []
        for slot in {slot for slot, _, _ in loose}:
            # a cell put twice has its last value: a write to one place twice has no order
            mine = {key: value for at, key, value in loose if at == slot}
            self.write_rows(slot, [*mine], stack([*mine.values()], self.device).unsqueeze(1))

    def write_column(self, slot: int, name: str, values: Tensor) -> None:
        """Write one value per row."""
        assert self._cells is not None
        self._cells[slot, : values.numel(), self._at[name]] = values

    def divide(self, slot: int, names: Sequence[str], by: Tensor | float) -> None:
        """Divide columns of a slot by a number that may be on the device."""
        assert self._cells is not None
        for name in names:
            self._cells[slot, :, self._at[name]] /= by

    def alias(self, row: int, first: str, source: Key, width: int = 1) -> None:
        """Say that `width` cells of the open slot equal others: the same tensor was there before.

        `source` is the first of those others; it may be an alias itself.
        """
        here, there = self._at[first], self._at[source[1]]
        cells, others = slice(here, here + width), slice(there, there + width)
        self._aliases[-1].append((row, cells, source[0], others))

    def flush(self, *, keep_open: bool = False) -> tuple[list[int], NDArray[np.float64]]:
        """Move all used slots to the host: the steps, and values (steps, rows, columns).

        This is the only place where the recorder waits for the device. `keep_open` leaves the last
        slot, which is still being written, for the next flush.
        """
        self.settle()
        used = slice(self._taken, len(self._steps) - keep_open)
        steps, aliases = self._steps[used], self._aliases[used]
        if self._cells is None:
            values = np.empty((len(steps), 0, len(self.columns)))
        else:
            values = self._cells[used].cpu().numpy().copy()
            for cells, known in zip(values, aliases, strict=True):
                for row, columns, source, there in known:
                    cells[row, columns] = cells[source, there]  # filled before its aliases
        self._taken = used.stop if keep_open else 0
        if not keep_open:
            self._steps, self._aliases = [], []
        return steps, values

    def _index(self, starts: tuple[int, ...], width: int, device: torch.device) -> Tensor:
        """Flat places (n, width)."""
        key = starts, width, device
        if key not in self._places:
            if len(self._places) >= _KEPT:
                self._places.clear()
            first = torch.tensor(starts, device=device).unsqueeze(1)
            self._places[key] = first + torch.arange(width, device=device)
        return self._places[key]
