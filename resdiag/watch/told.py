"""Losses that the training loop tells: kept where they are until a flush."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Told:
    """The losses of one monitor.

    Attributes:
        lost: Whether one was not finite, as of the last flush.
    """

    def __init__(self) -> None:
        self.lost = False
        self._losses: list[tuple[int, float | Tensor]] = []

    def tell(self, step: int, loss: float | Tensor) -> None:
        """Keep the loss of a step, without its graph.

        Raises:
            ValueError: It is not one number.
        """
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                shape = tuple(loss.shape)
                raise ValueError(f"step(loss=...) takes one number, not a tensor of shape {shape}")
            loss = loss.detach().reshape(()).double()
        self._losses.append((step, loss if isinstance(loss, Tensor) else float(loss)))

    def flush(self) -> dict[str, NDArray[Any]] | None:
        """Columns of what was told since the last flush; None if nothing was."""
        told, self._losses = self._losses, []
        if not told:
            return None
        tensors = [loss for _, loss in told if isinstance(loss, Tensor)]
        read = iter(torch.stack(tensors).tolist() if tensors else [])
        values = [next(read) if isinstance(loss, Tensor) else loss for _, loss in told]
        self.lost = self.lost or not np.isfinite(values).all()
        steps = np.array([step for step, _ in told], dtype=np.int32)
        return {"step": steps, "loss": np.array(values, dtype=np.float64)}


def join(columns: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """One row per step: what was told of a step joins what was recorded of it."""
    steps, rows = np.unique(columns["step"], return_inverse=True)
    if len(steps) == len(columns["step"]):
        return columns
    joined: dict[str, NDArray[Any]] = {"step": steps}
    for name, values in columns.items():
        if name not in ("step", "block"):
            known = ~np.isnan(values)
            joined[name] = np.full(len(steps), np.nan)
            joined[name][rows[known]] = values[known]
    return joined
