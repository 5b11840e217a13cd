"""A module whose forward is running, as a pass is followed."""

from dataclasses import dataclass

from torch import Tensor, nn

from resdiag.watch.addition import Addition
from resdiag.watch.base.functions import Call
from resdiag.watch.lineage import Scope


@dataclass(eq=False)
class Frame:
    """One module whose forward is running.

    Attributes:
        name: The module's name.
        module: The module.
        entry: Its first floating-point input.
        scope: The tensors that it was handed, and where its part of the lineage begins.
        number: Number of `entry` in the lineage.
        gate: How many activations ran before it.
        open: The residual addition whose block has not ended.
        tail: The sum of that block, or what the after-add made of it so far.
        chain: The calls after the sum that made the tail.
        chain_parameters: Their parameters.
        additions: Residual additions in its own forward.
    """

    name: str
    module: nn.Module
    entry: Tensor | None
    scope: Scope
    number: int | None
    gate: int
    open: Addition | None = None
    tail: Tensor | None = None
    chain: tuple[Call, ...] = ()
    chain_parameters: tuple[nn.Parameter, ...] = ()
    additions: int = 0
