"""What is seen of a forward pass, and the protocol of those who are told.

A `TracedPass` follows a pass operation by operation and tells its observers what it finds. In a
later pass that is expected to be the same, hooks at the places of a plan tell the recorder the
same things. The order is always that of the pass:

    started -> (activation | operands -> added -> closed | passing)* -> unit* -> finished
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from resdiag.watch.addition import Addition
from resdiag.watch.base.functions import Call
from resdiag.watch.units import Unit


@dataclass(eq=False)
class Operands:
    """The tensors of a residual addition in one pass.

    Attributes:
        origin: The block's input x, where both operands come from; None if it was freed.
        branch: F(x), before the addition, which may broadcast it.
        shortcut: h(x).
    """

    origin: Tensor | None
    branch: Tensor
    shortcut: Tensor


class Observer(Protocol):
    """Is told what a forward pass does, while it runs and before a tensor can be overwritten."""

    def started(self, inputs: Sequence[Tensor]) -> None:
        """The pass begins with these inputs."""

    def operands(self, addition: Addition, tensors: Operands) -> None:
        """Both operands of a residual addition are there."""

    def added(self, addition: Addition, total: Tensor) -> None:
        """Their sum is there."""

    def closed(self, addition: Addition, output: Tensor) -> None:
        """The block has ended: `addition.after` turned the sum into `output`."""

    def passing(self, number: int, x: Tensor, features: int | None) -> None:
        """A tensor that may be the input or the output of a unit, with its channel dimension."""

    def dismiss(self) -> None:
        """A residual addition was found: none of the tensors that passed belongs to a unit."""

    def unit(self, unit: Unit) -> None:
        """A module without a residual addition stands for a block; its tensors have passed."""

    def same(self, old: Tensor, new: Tensor) -> None:
        """A tensor was replaced by an equal one, and no torch function showed it."""

    def activation(self, call: Call, x: Tensor) -> None:
        """A known activation is about to be applied to `x`."""

    def finished(
        self, features: Tensor | None, logits: Tensor | None, outputs: Sequence[Tensor]
    ) -> None:
        """The pass has ended; the last linear layer mapped `features` to `logits`."""


class Silent:
    """An observer of nothing, to inherit from."""

    def started(self, inputs: Sequence[Tensor]) -> None: ...  # noqa: D102

    def operands(self, addition: Addition, tensors: Operands) -> None: ...  # noqa: D102

    def added(self, addition: Addition, total: Tensor) -> None: ...  # noqa: D102

    def closed(self, addition: Addition, output: Tensor) -> None: ...  # noqa: D102

    def passing(self, number: int, x: Tensor, features: int | None) -> None: ...  # noqa: D102

    def dismiss(self) -> None: ...  # noqa: D102

    def unit(self, unit: Unit) -> None: ...  # noqa: D102

    def same(self, old: Tensor, new: Tensor) -> None: ...  # noqa: D102

    def activation(self, call: Call, x: Tensor) -> None: ...  # noqa: D102

    def finished(  # noqa: D102
        self, features: Tensor | None, logits: Tensor | None, outputs: Sequence[Tensor]
    ) -> None: ...


class Bus:
    """Hands every event of a pass on to several observers, unseen by the mode that follows it."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers

    def tell(self, event: str, *args: object) -> None:
        """Call the method of that name of each observer."""
        # what observers compute is no part of the model: their torch functions reach no mode
        with torch._C.DisableTorchFunction():
            for observer in self.observers:
                method: Callable[..., None] = getattr(observer, event)
                method(*args)
