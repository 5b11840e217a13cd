"""Measures a pass in hindsight: what the recorder does when it was told nothing."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resdiag.watch.buffer import Buffer
from resdiag.watch.hindsight import SITES, Hindsight, View
from resdiag.watch.measure import reductions
from resdiag.watch.measure.batchnorm import Gone, Normalised
from resdiag.watch.measure.reductions import Scalar
from resdiag.watch.measure.skip_path import COLUMNS
from resdiag.watch.sites import Sites

Slow = Callable[[int, Tensor], None]
"""Takes a block's row and the gradient of its output."""

_Skip = tuple[int, list[Scalar], dict[str, str]]


class Lookback:
    """Reads passes of the core set from their graphs, once it has learned where.

    Args:
        cells: Per-block buffer.
        sites: Takes the moments.
        write_skip: Takes the values of the skip path of all blocks.
        samples: Samples at the head of the batch on which P1 is measured; None for all.
        moments: Samples on which gradients are measured; None for all.

    Attributes:
        hindsight: What is known of the model's passes.
    """

    def __init__(
        self,
        cells: Buffer,
        sites: Sites,
        write_skip: Callable[[Iterator[_Skip]], None],
        samples: int | None,
        moments: int | None,
    ) -> None:
        self.hindsight = Hindsight()
        self._cells, self._sites, self._write_skip = cells, sites, write_skip
        self._samples, self._moments = samples, moments
        self.forget()

    def forget(self) -> None:
        """Let go of a pass: gradients of it that still come belong to no step."""
        self.hindsight.forget()
        self._norms: dict[int, tuple[float, int]] = {}

    def learn(
        self, outputs: Sequence[Tensor], features: Tensor | None, logits: Tensor | None
    ) -> None:
        """See whether the graph shows what was just measured; from then on it is read instead."""
        slot = self._cells.slot
        try:
            view = self.hindsight.learn(outputs, features, logits)
            if view is None:
                return
            heard = self._cells.take(slot)
            self._measure(view)
            self.hindsight.is_ready = _agree(heard[0], self._cells.take(slot)[0])
            self._cells.give(slot, heard)
        except Gone:
            pass
        if not self.hindsight.is_ready:
            self.hindsight.give_up()

    def read(self, outputs: Sequence[Tensor]) -> View | None:
        """Measure the pass that made a model's outputs; None, for good, if it is another one."""
        try:
            view = self.hindsight.look(outputs)
            if view is not None:
                self._measure(view)
                return view
        except Gone:
            pass
        self.hindsight.give_up()
        self._cells.wipe()
        return None

    def hook(self, view: View, is_begun: Callable[[], bool], slow: Slow) -> None:
        """Listen for the gradients of the blocks' outputs.

        Args:
            view: The pass.
            is_begun: Whether a gradient of the backward pass has come; kept as long as the graph.
            slow: Takes a gradient that cannot be read quickly.
        """
        for row, (node, place) in enumerate(view.outputs()):
            node.register_prehook(self._reader(row, place, is_begun, slow))

    def has_read(self, row: int) -> bool:
        """Whether the gradient of a block's output has come."""
        return row in self._norms

    def gradients(self) -> Iterator[tuple[int, float]]:
        """Row and G2 of the gradients that were read, as `reductions.gradient` has it."""
        for row, (size, batch) in self._norms.items():
            count = min(batch, self._moments or batch)
            yield row, size * math.sqrt(count) * (batch / count)

    def _reader(
        self, row: int, place: int, is_begun: Callable[[], bool], slow: Slow
    ) -> Callable[[tuple[Tensor | None, ...]], None]:
        """Reads a gradient before the node runs that made the output."""
        norms = self._norms

        def read(gradients: tuple[Tensor | None, ...]) -> None:
            g = gradients[place]
            if g is not None and norms is self._norms:
                self._take(row, g, is_begun, slow)

        return read

    def _take(self, row: int, g: Tensor, is_begun: Callable[[], bool], slow: Slow) -> None:
        """Do the least: during a backward pass none of this code is in the caches."""
        norms, moments, size = self._norms, self._moments, None
        if row not in norms and is_begun():
            size = reductions.trusted_norm(g if moments is None else g[:moments])
        if size is None:
            slow(row, g)
        else:
            norms[row] = size, len(g)

    @torch.no_grad()
    def _measure(self, view: View) -> None:
        """Measure what a pass's graph shows of its blocks."""
        changes = list[_Skip]()
        nothing = [math.nan] * (len(COLUMNS) - 1)
        for row in range(len(view.blocks)):
            for at, site in enumerate(SITES):
                known = view.same(row, at)
                x = None if known else view.read(row, at)
                if known:
                    self._sites.repeat(row, site, known)
                elif isinstance(x, Normalised):
                    self._sites.keep(row, site, x)
                elif x is not None:
                    is_sum = site == "output" and view.is_bare(row)
                    self._sites.measure(row, site, x, is_sum=is_sum)
            changes.append((row, [view.perturbation(row, self._samples), *nothing], {}))
        self._sites.write()
        self._write_skip(iter(changes))


def _agree(heard: NDArray[np.float64], seen: NDArray[np.float64]) -> bool:
    """Whether two readings of one pass are of the same tensors; their sums may round apart."""
    size = np.abs(np.where(np.isfinite(heard), heard, 0)).max(axis=1, keepdims=True)
    return bool(np.allclose(heard, seen, rtol=1e-3, atol=1e-5 * size, equal_nan=True))
