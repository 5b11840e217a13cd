"""Where numbers wait on the device until they cross to the host, many steps at a time."""

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Key = tuple[int, str]
"""A cell of one step: row and column name."""


class Buffer:
    """Preallocated float64 cells [slots, rows, columns] on the device of the model.

    A slot is one recorded step. Writing is a device-side copy; the host sees nothing until `flush`
    copies all used slots at once.

    Args:
        columns: Names of the columns.
        slots: Recorded steps to keep before a flush is due.
    """

    def __init__(self, columns: tuple[str, ...], slots: int) -> None:
        self.columns = columns
        self._at = {name: i for i, name in enumerate(columns)}
        self._slots = slots
        self._cells: Tensor | None = None
        self._loose: list[tuple[int, Key, Tensor]] = []
        self._steps: list[int] = []
        self._taken = 0  # slots that were flushed while a later one was open
        self._aliases: list[dict[Key, Key]] = []

    @property
    def is_full(self) -> bool:
        """Whether the next step needs a flush first."""
        return len(self._steps) >= self._slots

    @property
    def slot(self) -> int:
        """The slot of the step being recorded."""
        return len(self._steps) - 1

    def begin(self, step: int) -> None:
        """Open a slot for `step`; if the last slot is that step's already, wipe it."""
        if self._steps[self._taken :][-1:] != [step]:
            self._steps.append(step)
            self._aliases.append({})
        self._aliases[-1].clear()
        if self._cells is not None:
            self._cells[self.slot].fill_(math.nan)

    def wipe(self) -> None:
        """Forget what the open slot holds."""
        if self._cells is not None and self._steps:
            self._cells[self.slot].fill_(math.nan)

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
        self._cells[slot].view(-1)[_index(starts, values.shape[1], values.device)] = values

    def put(self, slot: int, row: int, name: str, value: Tensor) -> None:
        """Keep a 0-d float64 value for a cell until `settle`: many small writes become one."""
        self._loose.append((slot, (row, name), value))

    def settle(self) -> None:
        """Write what was put."""
        loose, self._loose = self._loose, []
        for slot in {slot for slot, _, _ in loose}:
            # a cell put twice has its last value: a write to one place twice has no order
            mine = {key: value for at, key, value in loose if at == slot}
            self.write_rows(slot, list(mine), torch.stack(list(mine.values())).unsqueeze(1))

    def write_column(self, slot: int, name: str, values: Tensor) -> None:
        """Write one value per row."""
        assert self._cells is not None
        self._cells[slot, : values.numel(), self._at[name]] = values

    def alias(self, row: int, name: str, source: Key) -> None:
        """Say that a cell of the open slot equals another: the same tensor was there before."""
        self._aliases[-1][row, name] = source

    def flush(self, *, keep_open: bool = False) -> tuple[list[int], NDArray[np.float64]]:
        """Move all used slots to the host: the steps, and values (steps, rows, columns).

        This is the only place where the recorder waits for the device.

        Args:
            keep_open: The last slot is still being written: leave it for the next flush.
        """
        self.settle()
        used = slice(self._taken, len(self._steps) - keep_open)
        steps, aliases = self._steps[used], self._aliases[used]
        if self._cells is None:
            values = np.empty((len(steps), 0, len(self.columns)))
        else:
            values = self._cells[used].cpu().numpy().copy()
        for slot, known in enumerate(aliases):
            self._resolve(values[slot], known)
        self._taken = used.stop if keep_open else 0
        if not keep_open:
            self._steps, self._aliases = [], []
        return steps, values

    def _resolve(self, values: NDArray[np.float64], aliases: Mapping[Key, Key]) -> None:
        """Copy aliased cells; a source may be an alias itself."""
        if not values.size:
            return
        for (row, name), source in aliases.items():
            while source in aliases:
                source = aliases[source]
            values[row, self._at[name]] = values[source[0], self._at[source[1]]]


@functools.lru_cache(maxsize=128)
def _index(starts: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Flat places (n, width); kept: sending numbers to an accelerator makes the host wait."""
    return torch.tensor(starts, device=device).unsqueeze(1) + torch.arange(width, device=device)
