"""The moments of the blocks' tensors: read while a pass runs, completed when it has ended."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from resdiag.catalog.custom import CustomValues
from resdiag.catalog.table import DATA, HEAD_LOSS, LOCAL, SITES
from resdiag.watch.base.safety import Guard
from resdiag.watch.base.tensors import TensorTable
from resdiag.watch.find.blocks import Anatomy
from resdiag.watch.measure import moments
from resdiag.watch.measure.changes import fractions
from resdiag.watch.measure.model_ends import Logits, activation_of, describe_input, is_tokens
from resdiag.watch.measure.moments import Normalised, Sums
from resdiag.watch.measure.reductions import Scalar, stack
from resdiag.watch.measure.skip_path import COLUMNS as SKIP_COLUMNS
from resdiag.watch.record.buffer import Buffer, Key
from resdiag.watch.record.pool import HEAD, Pool

SITE_COLUMNS = {site: tuple(f"{site}_{name}" for name in moments.STATISTICS) for site in SITES}


Part: TypeAlias = Sums | Normalised
"""What was read of a tensor, or what is enough to know."""


class Sites:
    """The tensors of every block: branch, shortcut, sum, ...

    `samples` of the batch are measured, None for all; `pool` is there where several ranks record
    together; `miss` notes a block whose columns are NaN, and why.
    """

    def __init__(
        self,
        cells: Buffer,
        pool: Pool | None,
        samples: int | None,
        miss: Callable[[int, tuple[str, ...], str], None],
    ) -> None:
        self.anatomy = Anatomy()
        self._cells, self._pool, self._count, self._miss = cells, pool, samples, miss
        self.clear()

    def clear(self) -> None:
        """Let go of a pass."""
        self._waiting: list[tuple[Key, Part]] = []
        self._parts: dict[Key, Part] = {}

    def forget(self, row: int, sites: Collection[str]) -> None:
        """Sites of a block will be measured again."""
        again = {(row, f"{site}_mean") for site in sites}
        self._waiting = [(key, part) for key, part in self._waiting if key not in again]

    def measure(self, row: int, site: str, x: Tensor, *, is_sum: bool = False) -> None:
        """Read as little of a site's tensor as its statistics need.

        `is_sum` says that it is the sum of the tensors at branch and shortcut.
        """
        self.keep(row, site, self._read(row, site, x, is_sum=is_sum))

    def keep(self, row: int, site: str, part: Part) -> None:
        """A site's tensor was read."""
        self._parts[row, site] = part
        self._waiting.append(((row, f"{site}_mean"), part))

    def repeat(self, row: int, site: str, known: tuple[int, str]) -> None:
        """A site's tensor is one that was read before, at that row and site."""
        source = known[0], f"{known[1]}_mean"
        self._cells.alias(row, f"{site}_mean", source, len(moments.STATISTICS))
        self._parts[row, site] = self._parts[known]

    def take_over(self, row: int, site: str, known: tuple[int, str]) -> None:
        """What was read of a tensor at a row and site is to be written at another one."""
        if (part := self._parts.get(known)) is not None:
            self.keep(row, site, part)

    def read(self, x: Tensor, features: int | None) -> Part:
        """What is needed of any tensor, its channels being this dimension."""
        return moments.normalised(x) or moments.reduce(self.head(x), None, features)

    def head(self, x: Tensor) -> Tensor:
        """The samples of which moments are taken."""
        return x if self._count is None or not x.dim() else x.detach()[: self._count]

    def features(self, row: int, x: Tensor) -> int | None:
        """The dimension of the channels in a tensor of a block, None if nothing said it."""
        block = self.anatomy.blocks[row]
        return block.features if x.dim() == len(block.shape) + 1 else None

    def write(self) -> None:
        """Complete the statistics of all sites, those of equally many channels at once."""
        waiting = self._waiting
        self.clear()
        closed = [part for _, part in waiting if isinstance(part, Normalised)]
        known = iter(moments.normalised_sums(closed))
        sites = [
            (key, self._sums_of(key, x, next(known)) if isinstance(x, Normalised) else x)
            for key, x in waiting
        ]
        if self._pool is not None:
            self._pool.sites(sites)
            return
        same: dict[int, dict[Key, Sums]] = defaultdict(dict)
        for key, part in sites:
            same[part.per_channel.numel()][key] = part
        for _, parts in sorted(same.items()):
            values = moments.combine([*parts.values()])
            self._cells.write_rows(self._cells.slot, [*parts], values)

    def _read(self, row: int, site: str, x: Tensor, *, is_sum: bool) -> Part:
        features = self.features(row, x)
        if is_sum:
            # a channel's sum over h + F is that over h plus that over F, if of the same samples
            branch, shortcut = self._parts[row, "branch"], self._parts[row, "shortcut"]
            if branch.per_channel.shape == shortcut.per_channel.shape and self._count is None:
                known = branch.per_channel + shortcut.per_channel
                return moments.reduce(x, known, features)
        if site == "output" and "norm" not in self.anatomy.blocks[row].after_add:
            return moments.reduce(self.head(x), None, features)
        return self.read(x, features)

    def _sums_of(self, key: Key, part: Normalised, known: Sums | None) -> Sums:
        """The sums of a BatchNorm's output: `known`, its closed form, where that can be trusted."""
        if known is not None:
            return known
        if (x := part.tensor()) is not None:
            return moments.reduce(self.head(x), None, 1)
        reason = "it was overwritten, and its batch variance overflowed"
        self._miss(key[0], SITE_COLUMNS[key[1].removesuffix("_mean")], reason)
        nan = torch.full_like(part.per_channel, math.nan)
        return Sums(nan, 1, math.nan, None, math.nan)


@dataclass(eq=False)
class Parts:
    """What the parts of one recorder share, and where they write all but a site's moments."""

    cells: Buffer
    sites: Sites
    known: TensorTable[Key]  # row and site where a tensor, not written to since, was measured
    custom: CustomValues
    guard: Guard
    pool: Pool | None  # where several ranks record together
    samples: int | None  # on which shares are measured, None for all
    moments: int | None  # on which moments and gradients are measured, None for all
    core: bool

    def put(self, row: int, column: str, value: Scalar, weight: Scalar) -> None:
        """Write a cell; `weight` is what the value is a mean over, for several ranks to add up."""
        if self.pool is None:
            self.cells.put(self.cells.slot, row, column, value)
        else:
            self.pool.put(row, column, value, weight)

    def write_skip(self, rows: Iterable[tuple[int, list[Scalar], dict[str, str]]]) -> None:
        """Write what was measured of the skip path, and what could not be; see `finish`."""
        keys, values = list[Key](), list[Scalar]()
        for row, measured, reasons in rows:
            keys.append((row, SKIP_COLUMNS[0]))
            values.extend(measured)
            for column, reason in reasons.items():
                self.guard.miss(row, (column,), reason)
        if keys and self.pool is None:
            table = stack(values, self.cells.device).view(len(keys), -1)
            self.cells.write_rows(self.cells.slot, keys, table)

    def write_saturation(self, row: int, counts: Sequence[Tensor], sizes: Sequence[int]) -> None:
        """Write a block's fractions; see `Saturation.count`."""
        columns = ("saturated_fraction", "dead_fraction")
        if not counts:
            self.guard.miss(row, columns, "no known activation inside the block")
        elif self.pool is not None:
            per_channel = [n // len(c) for n, c in zip(sizes, counts, strict=True)]
            self.pool.saturation(row, counts, per_channel)
        else:
            for column, value in zip(columns, fractions(counts, sizes), strict=True):
                self.cells.put(self.cells.slot, row, column, value)


_NO_CLASSIFIER = "no linear layer with a gradient ends the forward pass"

Reasons: TypeAlias = Mapping[str, dict[str, set[int]]]
"""Per column, why it is NaN and for which blocks; none for what is not about a block."""


class Head:
    """Writes a pass's per-step numbers into a buffer of one row, and why there are none."""

    def __init__(self, buffer: Buffer, pool: Pool | None, reasons: Reasons) -> None:
        self.classes = 0  # the width of the last linear layer, once it is known
        self.activation = ""  # that the model ends with, behind its logits
        self._buffer, self._pool, self._reasons = buffer, pool, reasons
        self._moments: Tensor | None = None
        self._tokens: Tensor | None = None

    @property
    def slot(self) -> int:
        """The buffer's open slot."""
        return self._buffer.slot

    def miss(self, *columns: str, reason: str = "") -> None:
        """Note why columns are NaN."""
        for column in columns:  # without rows: it is not about a block
            self._reasons[column][reason or _NO_CLASSIFIER] = set()

    def batch(self, inputs: Sequence[Tensor]) -> None:
        """Measure what goes into the model."""
        if self._pool is not None:
            self.miss(*LOCAL, reason="not added up over ranks")
            return
        self._moments = describe_input(inputs)
        self._tokens = next(filter(is_tokens, inputs), None)
        if not any(x.is_floating_point() for x in inputs):
            self.miss(*DATA[:3], reason="the model has no floating-point input")
        if self._moments is None:
            self.miss(*DATA, reason="the model has no input with several samples")

    def classify(self, features: Tensor | None, logits: Tensor | None, reason: str = "") -> bool:
        """Measure what goes into the last linear layer; whether a gradient will come to `logits`.

        The moments of the batch are written here: now a tensor of the pass says where it runs.
        """
        batch, self._moments = self._moments, None
        if batch is not None:
            self._buffer.reserve(1, (batch if features is None else features).device)
            self._buffer.write(self.slot, 0, DATA[0], batch)
        if features is None or logits is None:
            self.miss("head_mean", "head_bias", "head_kick", *HEAD_LOSS, reason=reason)
            return False
        self.write_features(moments.reduce(features), features.shape[-1], features.device)
        if not logits.requires_grad:
            self.miss("head_kick", *HEAD_LOSS)
        return logits.requires_grad

    def write_features(self, read: Sums, width: int, device: torch.device) -> None:
        """Write the moments of what goes into the classifier."""
        self._buffer.reserve(1, device)
        if self._pool is None:
            self._buffer.write(self.slot, 0, "head_mean", moments.combine([read])[0, :3])
        else:
            self._pool.sites([((HEAD, "head_mean"), read)])
        size = torch.full((), width, dtype=torch.float64, device=device)
        self._buffer.write(self.slot, 0, "head_size", size)

    def keep(self, logits: Tensor) -> Logits | None:
        """What of the logits has to wait for their gradient."""
        tokens, self._tokens = self._tokens, None
        return None if self._pool is not None else Logits(logits, tokens)

    def ending(self, outputs: Sequence[Tensor]) -> Tensor | None:
        """The model's output if an activation made it, which a loss may take for logits."""
        found = next((x for x in outputs if x.is_floating_point() and x.dim() > 1), None)
        self.activation = "" if found is None else activation_of(found)
        return found if self.activation and self._pool is None else None

    def write_output(self, slot: int, g: Tensor, output: Logits) -> None:
        """Write the cross-entropy that the gradient at the model's output shows."""
        if (read := output.read(g)) is not None:
            self.classes = self.classes or output.classes
            self._buffer.write(slot, 0, "output_loss", read[0])

    def gap(self, slot: int, g: Tensor, logits: Logits | None) -> None:
        """max_k |p_k - y_k|: the batch sum of dL/dlogits of a mean cross-entropy; and the loss."""
        self.write_gap(slot, g.detach().reshape(-1, g.shape[-1]).sum(0))
        if logits is not None and (read := logits.read(g)) is not None:
            self.classes = logits.classes
            self._buffer.write(slot, 0, HEAD_LOSS[0], read)

    def write_gap(self, slot: int, sums: Tensor) -> None:
        """Write the head gap from the batch sum of dL/dlogits (K,)."""
        if self._pool is None:
            self._buffer.write(slot, 0, "head_gap", torch.linalg.vector_norm(sums, math.inf))
        else:
            self._pool.gap(sums.double())
