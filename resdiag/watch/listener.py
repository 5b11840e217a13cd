"""Who is told what a forward pass does."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from resdiag.watch.addition import Addition
from resdiag.watch.base.functions import Call
from resdiag.watch.units import Unit


class Listener(Protocol):
    """What a tracer tells while the forward pass runs.

    Attributes:
        counts_gates: Whether `activation` does anything.
        looks_back: Whether it wants to be told of the next pass only when that has ended.
    """

    counts_gates: bool

    @property
    def looks_back(self) -> bool:
        """See the class."""
        ...

    def started(self, inputs: Sequence[Tensor]) -> None:
        """The pass begins with these inputs."""

    def operands(self, addition: Addition) -> None:
        """Both operands are there; an in-place addition has not overwritten one yet."""

    def added(self, addition: Addition) -> None:
        """The sum is there; an in-place after-add has not overwritten it yet."""

    def closed(self, addition: Addition, output: Tensor) -> None:
        """The block has ended: `addition.after` turned the sum into `output`."""

    def passing(self, number: int, x: Tensor, features: int | None) -> None:
        """A tensor that may be the input or the output of a unit, before it can be overwritten."""

    def dismiss(self) -> None:
        """No unit will be made of the tensors that passed."""

    def unit(self, unit: Unit) -> None:
        """A module without a residual addition stands for a block; its tensors have passed."""

    def same(self, old: Tensor, new: Tensor) -> None:
        """A tensor was replaced by an equal one behind the back of torch functions."""

    def activation(self, owners: tuple[str, ...], call: Call, x: Tensor) -> None:
        """A known activation is about to be applied to `x`; `owners` are the open frames' names."""

    def finished(
        self, features: Tensor | None, logits: Tensor | None, outputs: Sequence[Tensor]
    ) -> None:
        """The pass has ended; the last linear layer mapped `features` to `logits`."""

    def look_back(self, outputs: Sequence[Tensor]) -> None:
        """A pass of which nothing was told but its beginning has ended."""
