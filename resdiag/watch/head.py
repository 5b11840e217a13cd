"""The two ends of a pass: the batch that goes in, and the classifier that the logits come from."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from resdiag.watch.buffer import Buffer
from resdiag.watch.measure import moments
from resdiag.watch.measure.model_ends import DATA, HEAD_LOSS, Logits, describe_input
from resdiag.watch.measure.moments import Sums, reduce
from resdiag.watch.pool import HEAD as ROW
from resdiag.watch.pool import Pool

COLUMNS = (
    *("head_mean", "head_channel_mean_rms", "head_channel_std", "head_gap", "head_size"),
    *DATA,
    *HEAD_LOSS,
)

_NO_CLASSIFIER = "no linear layer with a gradient ends the forward pass"

Reasons: TypeAlias = Mapping[str, dict[str, set[int]]]
"""Per column, why it is NaN and for which blocks; none for what is not about a block."""


class Head:
    """Writes a pass's per-step numbers.

    Args:
        buffer: With one row; its columns begin with `COLUMNS`.
        pool: Where several ranks record together.
        reasons: Takes why a column is NaN; makes the entry of a column that it has not.

    Attributes:
        classes: Width of the last linear layer; 0 while it is not known.
    """

    def __init__(self, buffer: Buffer, pool: Pool | None, reasons: Reasons) -> None:
        self.classes = 0
        self._buffer, self._pool, self._reasons = buffer, pool, reasons
        self._moments: Tensor | None = None

    @property
    def slot(self) -> int:
        """The buffer's open slot."""
        return self._buffer.slot

    def miss(
        self,
        *columns: str,
        reason: str = "",
    ) -> None:
        """Note why columns are NaN."""
        for column in columns:
            self._reasons[column][reason or _NO_CLASSIFIER] = (
                set()
            )  # no rows: it is not about a block

    def batch(self, inputs: Sequence[Tensor]) -> None:
        """Measure what goes into the model."""
        if self._pool is not None:
            self.miss(*DATA, *HEAD_LOSS, reason="not added up over ranks")
            return
        self._moments = describe_input(inputs)
        if self._moments is None:
            self.miss(*DATA, reason="the model has no floating-point input")

    def classify(self, features: Tensor | None, logits: Tensor | None, reason: str = "") -> bool:
        """Measure what goes into the last linear layer; whether a gradient will come to `logits`.

        The moments of the batch are written here: now a tensor of the pass says where it runs.
        """
        moments, self._moments = self._moments, None
        if moments is not None:
            self._buffer.reserve(1, (moments if features is None else features).device)
            self._buffer.write(self.slot, 0, DATA[0], moments)
        if features is None or logits is None:
            self.miss("head_mean", "head_bias", "head_kick", *HEAD_LOSS, reason=reason)
            return False
        self.write_features(reduce(features), features.shape[-1], features.device)
        if not logits.requires_grad:
            self.miss("head_kick", *HEAD_LOSS)
        return logits.requires_grad

    def write_features(self, read: Sums, width: int, device: torch.device) -> None:
        """Write the moments of what goes into the classifier."""
        self._buffer.reserve(1, device)
        if self._pool is None:
            self._buffer.write(self.slot, 0, "head_mean", moments.combine([read])[0, :3])
        else:
            self._pool.sites([((ROW, "head_mean"), read)])
        size = torch.full((), width, dtype=torch.float64, device=device)
        self._buffer.write(self.slot, 0, "head_size", size)

    def keep(self, logits: Tensor) -> Logits | None:
        """What of the logits has to wait for their gradient."""
        return None if self._pool is not None else Logits(logits)

    def gap(self, slot: int, g: Tensor, logits: Logits | None) -> None:
        """max_k |p_k - y_k|: the batch sum of dL/dlogits of a mean cross-entropy; and the loss."""
        self.write_gap(slot, g.detach().reshape(-1, g.shape[-1]).sum(0))
        read = None if logits is None else logits.read(g)
        if logits is not None and read is not None:
            self.classes = logits.classes
            self._buffer.write(slot, 0, HEAD_LOSS[0], read)

    def write_gap(self, slot: int, sums: Tensor) -> None:
        """Write the head gap from the batch sum of dL/dlogits (K,)."""
        if self._pool is None:
            self._buffer.write(slot, 0, "head_gap", torch.linalg.vector_norm(sums, math.inf))
        else:
            self._pool.gap(sums.double())
