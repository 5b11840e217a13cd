"""What was recorded: on the device until a flush, then columns on the host."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from resdiag.catalog.columns import (
    STEP_CELLS,
    Columns,
    block_columns,
    concatenate,
    gap,
    join,
    step_columns,
)
from resdiag.catalog.table import RECORDED
from resdiag.watch.base.safety import Warnings
from resdiag.watch.find.blocks import Block
from resdiag.watch.record.buffer import Buffer
from resdiag.watch.record.sets import Sparse

Listener: TypeAlias = Callable[[Columns, Columns], object]
"""Called with the per-block and per-step columns of each flush."""

_SLOTS = 16


class Record:
    """The record of one monitor: `cells` per block, `head` per step, the `losses` the loop tells.

    `sparse` has what few steps have. Each of `listeners` is called with what came to the host.
    """

    def __init__(self, custom: Sequence[str], warnings: Warnings) -> None:
        self.cells = Buffer((*RECORDED, *custom), _SLOTS)
        self.head = Buffer(STEP_CELLS, _SLOTS)
        self.losses, self.sparse = Losses(), Sparse()
        self.listeners: list[Listener] = []
        self._warnings = warnings
        self._rates: list[tuple[float, float, float]] = []
        self._extra: list[tuple[int, str, Tensor, Tensor]] = []
        self._metrics: list[Columns] = []
        self._curve: list[Columns] = []

    def begin(self, step: int, *, again: bool) -> None:
        """Open a slot for a pass; `again` if it takes the place of one of the same step."""
        if not again:
            self._rates.append((math.nan, math.nan, math.nan))
        self.cells.begin(step)
        self.head.begin(step)

    def rate(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Note the first group's learning rate and momentum, and the largest weight decay.

        Returns whether the open step had none.
        """
        if not math.isnan(self._rates[-1][0]):
            return False
        decay = max(float(group.get("weight_decay", 0.0)) for group in groups)
        self._rates[-1] = float(groups[0]["lr"]), float(groups[0].get("momentum", 0.0)), decay
        return True

    def write_head(self, name: str, value: Tensor, device: torch.device) -> None:
        """Write a per-step number of the open step."""
        self.head.reserve(1, device)
        self.head.write(self.head.slot, 0, name, value)

    def add(self, step: int, point: str, per_block: Tensor, total: Tensor) -> None:
        """Keep gradient norms that were read at a further point."""
        self._extra.append((step, point, per_block, total))

    def flush(self, blocks: Sequence[Block], *, keep_open: bool) -> None:
        """Bring the used slots to the host and complete what the host computes."""
        steps, values = self.cells.flush(keep_open=keep_open)
        _, head = self.head.flush(keep_open=keep_open)
        rates, self._rates = self._rates[: len(steps)], self._rates[len(steps) :]
        if steps:
            sizes = [math.prod(block.shape) for block in blocks]
            metrics = block_columns(steps, values[:, : len(blocks)], sizes, self.cells.columns)
            curve = step_columns(steps, head, rates)
            self._add_points(metrics, curve)
            self.sparse.write(metrics, curve)
            self._metrics.append(metrics)
            self._curve.append(curve)
            self._tell(metrics, curve)
        losses = self.losses.flush()
        if losses is not None:
            self._curve.append(losses)

    def columns(self) -> tuple[Columns, Columns]:
        """Per-block and per-step columns of what was flushed and not taken."""
        return concatenate(self._metrics), join(concatenate(self._curve))

    def take(self) -> tuple[Columns, Columns]:
        """The same, and forget them."""
        taken = self.columns()
        self._metrics, self._curve = [], []
        return taken

    def _add_points(self, metrics: Columns, curve: Columns) -> None:
        """Add the columns of gradients that were read at further points."""
        extra, self._extra = self._extra, []
        for step, point, per_block, total in extra:
            if step not in curve["step"]:
                self._extra.append((step, point, per_block, total))
                continue
            for columns, name, value in (
                (metrics, f"grad_param_{point}", per_block.cpu().numpy()),
                (curve, f"grad_norm_{point}", float(total)),
            ):
                here = columns["step"] == step
                columns.setdefault(name, gap(len(here)))[here] = value

    def _tell(self, metrics: Columns, curve: Columns) -> None:
        for listener in list(self.listeners):
            try:
                listener(metrics, curve)
            except Exception as error:
                self.listeners.remove(listener)
                name = getattr(listener, "__qualname__", type(listener).__name__)
                self._warnings.say(f"{name} failed, and gets no further records: {error!r}")


class Losses:
    """The losses that the loop tells; `lost` says whether a flushed one was not finite."""

    def __init__(self) -> None:
        self.lost = False
        self._losses: list[tuple[int, float | Tensor]] = []

    def tell(self, step: int, loss: float | Tensor) -> None:
        """Keep the loss of a step, without its graph; a ValueError if it is not one number."""
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                shape = tuple(loss.shape)
                raise ValueError(f"step(loss=...) takes one number, not a tensor of shape {shape}")
            loss = loss.detach().reshape(()).double()
        self._losses.append((step, loss if isinstance(loss, Tensor) else float(loss)))

    def flush(self) -> Columns | None:
        """Columns of the losses since the last flush, or None."""
        told, self._losses = self._losses, []
        if not told:
            return None
        tensors = [loss for _, loss in told if isinstance(loss, Tensor)]
        read = iter(torch.stack(tensors).tolist() if tensors else [])
        values = [next(read) if isinstance(loss, Tensor) else loss for _, loss in told]
        self.lost = self.lost or not np.isfinite(values).all()
        steps = np.array([step for step, _ in told], dtype=np.int32)
        return {"step": steps, "loss": np.array(values, dtype=np.float64)}
