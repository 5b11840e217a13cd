"""Blocks that run once more in the backward pass, where their gradients can be had.

Activation checkpointing with `use_reentrant=True` runs the forward of a part without gradients, and
again, with gradients and on copies of its inputs, inside the backward pass. What the first run
computed was measured then; only the second one has tensors whose gradients can be hooked.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from resdiag.watch.addition import Addition
from resdiag.watch.base.functions import Call
from resdiag.watch.recorder import Recorder
from resdiag.watch.units import Unit


class Replay:
    """The tracer's listener for a module that runs again: hooks, and measures nothing twice.

    Args:
        recorder: What recorded the first run.
        called: How often each module was called in it: of several calls it is not known which one
            runs again.
    """

    counts_gates: bool = False
    looks_back: bool = False

    def __init__(self, recorder: Recorder, called: Mapping[str, int]) -> None:
        self._recorder, self._called = recorder, called

    def started(self, inputs: Sequence[Tensor]) -> None:
        """Measured in the first run."""

    def operands(self, addition: Addition) -> None:
        """Hook the block's input and what leads to the shortcut."""
        row = self._row(addition)
        if row is not None and not addition.extends:
            self._recorder.hook_operands(row, addition)

    def added(self, addition: Addition) -> None:
        """Hook the sum."""
        row = self._row(addition)
        if row is not None and addition.sum is not None:
            self._recorder.hook_again(row, "sum", addition.sum)

    def closed(self, addition: Addition, output: Tensor) -> None:
        """Hook the output."""
        row = self._row(addition)
        if row is not None:
            self._recorder.hook_again(row, "output", output)

    def passing(self, number: int, x: Tensor, features: int | None) -> None:
        """Units have no gradients here."""

    def dismiss(self) -> None:
        """Nothing was hooked."""

    def unit(self, unit: Unit) -> None:
        """Units have no gradients here."""

    def same(self, old: Tensor, new: Tensor) -> None:
        """A tensor was replaced by an equal one."""
        self._recorder.same(old, new)

    def activation(self, owners: tuple[str, ...], call: Call, x: Tensor) -> None:
        """Counted in the first run."""

    def finished(
        self, features: Tensor | None, logits: Tensor | None, outputs: Sequence[Tensor]
    ) -> None:
        """The model itself does not run again."""

    def look_back(self, outputs: Sequence[Tensor]) -> None:
        """Every pass is listened to."""

    def _row(self, addition: Addition) -> int | None:
        if self._called.get(addition.owner) != 1:
            return None
        return self._recorder.anatomy.rows.get((addition.owner, addition.ordinal))
