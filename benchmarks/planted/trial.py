"""One training that is about to begin, and what can be planted in it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from planted.networks import Batch, SmallNetwork
from torch import Tensor, nn

from resdiag.watch.find.blocks import Block


@dataclass(eq=False)
class Trial:
    """One training that is about to begin.

    Attributes:
        network: The network's description.
        model: The network.
        blocks: Its blocks.
        at: Index of the block that is to be ill.
        strength: Factor on the fault's own magnitude.
        lr: Learning rate.
        momentum: Of SGD.
        decay: Weight decay.
        steps: Steps of the training.
        change: Applied to every batch.
        weigh: Applied to every loss.
        before: Called with the step before each optimizer step.
        updates: Whether the optimizer steps at all.
        evaluate: Steps between two evaluations on other batches; 0 for none.
        variant: Id of the variant, where the run says it, as those of `resdiag run` do.
    """

    network: SmallNetwork
    model: nn.Module
    blocks: list[Block]
    at: int
    strength: float
    lr: float
    momentum: float = 0.9
    decay: float = 1e-4
    steps: int = 30
    change: Callable[[Batch, int], Batch] = lambda batch, step: batch
    weigh: Callable[[Tensor], Tensor] = lambda loss: loss
    before: Callable[[int], None] = lambda step: None
    updates: bool = True
    evaluate: int = 0
    variant: str = ""
    step: int = field(default=0)

    @property
    def owner(self) -> nn.Module:
        """The module of the ill block."""
        return self.model.get_submodule(self.blocks[self.at].owner)

    @property
    def branch(self) -> nn.Module:
        """The module whose output is the ill block's branch."""
        return self.model.get_submodule(self.blocks[self.at].branch_module)

    def on_output(self, module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        """Replace a module's output; of several the first."""

        def hook(_: nn.Module, __: object, out: Any) -> Any:  # noqa: ANN401
            return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

        module.register_forward_hook(hook)


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: What it is called in tables.
        plant: Changes a trial.
        finding: The verdict that names it.
        where: Whether it sits in a block: "block", "first" for the first of several, or "".
        makes: Networks it can be planted in, by the beginnings of their names; () for all.
        scales: Whether its magnitude is varied in the held-out set.
    """

    name: str
    plant: Callable[[Trial], None]
    finding: str
    where: str = ""
    makes: tuple[str, ...] = ()
    scales: bool = False
