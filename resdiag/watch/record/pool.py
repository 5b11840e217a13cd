"""One rank's share of a recorded step as sums that add up over the ranks, and back to the metrics.

A metric of the whole batch is in general no function of the metrics of its parts: the RMS of the
channel means needs the channel means. `pack` puts numbers that add into one vector, `loop.ranks`
adds the vectors of all ranks, and `write` makes the metrics from the sum.

With g_r the gradient of rank r's own loss on its B_r samples, data-parallel training steps along
the mean of the R ranks' gradients: its loss is L = (1/R) sum_r L_r. Hence dL/dx on the samples of r
is g_r / R and, over all B = sum_r B_r samples,

    G2 = sqrt(B) ||dL/dx||_F = sqrt(B sum_r ||g_r||^2) / R,

exact for unequal B_r too; for equal ones it is sqrt(mean_r G2_r^2).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resdiag.catalog.table import METRICS, RECORDED
from resdiag.watch.measure import moments
from resdiag.watch.measure.moments import Sums
from resdiag.watch.measure.reductions import Scalar, stack
from resdiag.watch.measure.skip_path import COLUMNS
from resdiag.watch.record.buffer import Buffer, Key

_SHARDS = " of shards"
_COMBINED = {name: METRICS[name].over_ranks for name in RECORDED if METRICS[name].over_ranks}
_HOW = {name: how.removesuffix(_SHARDS) for name, how in _COMBINED.items()}
HEAD = -1
"""The row that stands for the classifier's input among the sites."""


@dataclass(frozen=True)
class Layout:
    """What stands where in the vector; ranks can only add what they have laid out alike."""

    rows: int
    scalars: tuple[str, ...]  # columns that are a quotient of two sums
    sites: tuple[tuple[Key, int], ...]  # cell of every tensor, and its number of channels
    gates: tuple[tuple[int, tuple[int, ...]], ...]  # row, channels of each activation in the block
    classes: int  # entries of the logits' gradient, 0 without a head

    @property
    def sizes(self) -> tuple[int, ...]:
        """Lengths of the parts of the vector, in the order of `Pool.pack`."""
        channels = sum(count for _, count in self.sites)
        gates = [count for _, counts in self.gates for count in counts]
        cells, sites = 3 * self.rows * len(self.scalars), len(self.sites)
        return cells, channels, sites, sites, sum(gates), len(gates), self.classes

    @property
    def digest(self) -> int:
        """A fingerprint that a float64 holds exactly."""
        return int.from_bytes(hashlib.sha256(repr(self).encode()).digest()[:6], "big")


class Pool:
    """Collects one rank's sums while a pass runs.

    `sharded` says that a rank holds a part of the parameters only: their norms then add up too.
    """

    def __init__(self, cells: Buffer, head: Buffer, ranks: int, *, sharded: bool) -> None:
        self._cells, self._head, self._ranks = cells, head, ranks
        self._columns = tuple(
            name for name, how in _COMBINED.items() if sharded or not how.endswith(_SHARDS)
        )
        self._at = {name: i for i, name in enumerate(self._columns)}
        self.sharded = sharded
        self.begin()

    def begin(self) -> None:
        """Begin a pass."""
        self._scalars: dict[Key, tuple[Scalar, Scalar]] = {}
        self._sites: list[tuple[Key, Sums]] = []
        self._gates: dict[int, tuple[Sequence[Tensor], Sequence[int]]] = {}
        self._gap: Tensor | None = None

    def put(self, row: int, column: str, value: Scalar, weight: Scalar) -> None:
        """A cell that is a mean, or a root mean square, of parts of these weights."""
        self._scalars[row, column] = value, weight

    def skip(self, row: int, values: Sequence[Scalar], weights: Sequence[Scalar]) -> None:
        """The skip path's columns, see `skip_path.COLUMNS`, with their denominators as weights."""
        for column, value, weight in zip(COLUMNS, values, weights, strict=True):
            if column in self._at:
                self.put(row, column, value, weight)

    def gradient(self, row: int, column: str, size: Scalar, batch: Scalar) -> None:
        """G2 of a rank's own loss on its own `batch` samples."""
        root = batch.sqrt() if isinstance(batch, Tensor) else math.sqrt(max(1, batch))
        self.put(row, column, size / root, batch)

    def sites(self, sites: Sequence[tuple[Key, Sums]]) -> None:
        """Tensors read for their moments, under the first of their columns."""
        self._sites.extend(sites)

    def saturation(self, row: int, counts: Sequence[Tensor], sizes: Sequence[int]) -> None:
        """Saturated units per channel of each activation in a block, of `sizes` units each."""
        self._gates[row] = counts, sizes

    def gap(self, gradient: Tensor) -> None:
        """The batch sum of the logits' gradient, float64 (K,)."""
        self._gap = gradient

    def layout(self, rows: int) -> Layout:
        """How this pass's vector is laid out."""
        sites = tuple((key, part.per_channel.numel()) for key, part in self._sites)
        gates = tuple((row, tuple(map(len, self._gates[row][0]))) for row in sorted(self._gates))
        classes = 0 if self._gap is None else self._gap.numel()
        return Layout(rows, self._columns, sites, gates, classes)

    def pack(self, layout: Layout, device: torch.device) -> Tensor:
        """The first vector, float64: everything but the spread within and between ranks."""
        parts = [part for _, part in self._sites]
        gates = [self._gates[row] for row, _ in layout.gates]
        nothing = torch.zeros(0, dtype=torch.float64, device=device)
        sizes = [part.size for part in parts]
        broken = [part.broken * (part.per_channel.numel() * part.size) for part in parts]
        return torch.cat(
            [
                self._pack_scalars(layout, device),
                *(part.per_channel.double() for part in parts),
                stack(sizes, device) if parts else nothing,
                stack(broken, device) if parts else nothing,
                *(count.double() for counts, _ in gates for count in counts),
                nothing.new_tensor([float(size) for _, sizes in gates for size in sizes]),
                nothing if self._gap is None else self._gap,
            ]
        )

    def spread(self, layout: Layout, total: Tensor) -> Tensor:
        """The second vector: squared deviations from the channel means of all ranks, per site.

        A sum of squares minus the squared mean would cancel where the mean dwarfs the spread; by
        the law of total variance, spreads within ranks and those of the ranks' means just add.
        """
        out: list[Tensor] = []
        for (_, part), mean in zip(self._sites, _means(layout, total), strict=True):
            local, within = part.per_channel.double() / part.size, part.spread
            if within is None:
                within = (part.second - local.square().mean()).clamp_min(0)
            out.append(part.size * (within + (local - mean).square().mean()))
        return torch.stack(out) if out else total.new_zeros(0)

    def write(
        self, layout: Layout, total: Tensor, spreads: Tensor, valid: Tensor, slot: int
    ) -> None:
        """Make the metrics of all ranks from the sums and write them into the open slots.

        `total` and `spreads` sum the first and second vectors; NaN where `valid`, 0-d, is false.
        """
        total = torch.where(valid, total, math.nan)
        cells, _, sizes, broken, gated, gates, gap = total.split(layout.sizes)
        self._write_scalars(layout, cells, slot)
        self._write_sites(layout, _means(layout, total), spreads / sizes, broken / sizes, slot)
        self._write_gates(layout, gated, gates, slot)
        if layout.classes:
            self._head.write(slot, 0, "head_gap", gap.abs().amax() / self._ranks)

    def _pack_scalars(self, layout: Layout, device: torch.device) -> Tensor:
        """Numerator, denominator and presence of each quotient: (rows, columns, 3), flat."""
        out = torch.zeros(layout.rows * len(layout.scalars), 3, dtype=torch.float64, device=device)
        if self._scalars:
            names = [name for _, name in self._scalars]
            places = [row * len(layout.scalars) + self._at[name] for row, name in self._scalars]
            values = stack([value for value, _ in self._scalars.values()], device)
            weights = stack([weight for _, weight in self._scalars.values()], device)
            root = torch.tensor([_HOW[name] != "mean" for name in names], device=device)
            whole = [_HOW[name] in ("gradient", "norm") for name in names]
            numerators = torch.where(root, values.square(), values)
            scaled = torch.where((weights == 0) & ~root, 0.0, numerators * weights)
            numerators = torch.where(torch.tensor(whole, device=device), numerators, scaled)
            rows = torch.stack([numerators, weights, torch.ones_like(weights)], dim=1)
            out[torch.tensor(places, device=device)] = rows
        return out.view(-1)

    def _write_scalars(self, layout: Layout, cells: Tensor, slot: int) -> None:
        sums = cells.view(layout.rows, len(layout.scalars), 3)
        for name, at in self._at.items():
            a, b, present = sums[:, at].unbind(1)
            if _HOW[name] == "gradient":
                values = (a * b).sqrt() / self._ranks
            elif _HOW[name] == "norm":
                values = a.sqrt()
            elif _HOW[name] == "rms":
                values = torch.where(a == 0, a, a / b).sqrt()
            else:
                values = a / b
            self._cells.write_column(slot, name, torch.where(present > 0, values, math.nan))

    def _write_sites(
        self, layout: Layout, means: list[Tensor], spreads: Tensor, broken: Tensor, slot: int
    ) -> None:
        for count in sorted({count for _, count in layout.sites}):
            which = [i for i, (_, channels) in enumerate(layout.sites) if channels == count]
            keys = [layout.sites[i][0] for i in which]
            mu = torch.stack([means[i] for i in which])
            at = torch.tensor(which, device=mu.device)
            values = moments.describe(mu, mu.square().mean(1), spreads[at], broken[at] / count)
            inner = [i for i, (row, _) in enumerate(keys) if row != HEAD]
            if inner:
                picked = values if len(inner) == len(keys) else values[inner]
                self._cells.write_rows(slot, [keys[i] for i in inner], picked)
            for i, (row, name) in enumerate(keys):
                if row == HEAD:
                    self._head.write(slot, 0, name, values[i, :3])

    def _write_gates(self, layout: Layout, gated: Tensor, gates: Tensor, slot: int) -> None:
        channels = [counts for _, counts in layout.gates]
        per_row = gated.split([sum(counts) for counts in channels])
        sizes = gates.split([len(counts) for counts in channels])
        for (row, counts), closed, size in zip(layout.gates, per_row, sizes, strict=True):
            repeats = torch.tensor(counts, device=gated.device)
            full = size.repeat_interleave(repeats, output_size=sum(counts))
            dead = (closed == full).double() + 0 * full  # NaN where the step is not valid
            self._cells.write(slot, row, "saturated_fraction", closed.sum() / full.sum())
            self._cells.write(slot, row, "dead_fraction", dead.mean())


def _means(layout: Layout, total: Tensor) -> list[Tensor]:
    """Channel means of all ranks per site."""
    _, sums, sizes, *_ = total.split(layout.sizes)
    per_site = sums.split([count for _, count in layout.sites])
    return [part / size for part, size in zip(per_site, sizes.unbind(), strict=True)]
