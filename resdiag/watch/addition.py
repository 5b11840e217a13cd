"""A residual addition: where a shortcut and a branch come together."""

from dataclasses import dataclass

import torch
from torch import nn

from resdiag.watch.base.functions import Call


@dataclass(eq=False)
class Addition:
    """What is known of one residual addition; its tensors are told beside it, see `events`.

    Attributes:
        owner: Name of the module whose forward is running ("" is the model itself).
        ordinal: Number of residual additions that `owner` has done before in this pass.
        entered: Shape of the block's input x, where both operands come from; None if it was freed.
        shape: Shape of the sum.
        dtype: Of the shortcut's elements.
        shortcut_count: Parameterised operations on the shortcut: 0 for an identity.
        path: The calls that lead from x to the shortcut if they can be repeated, else None.
        shortcut_scale: Factor on the shortcut inside the addition (torch.add's alpha), mostly 1.
        branch_scale: The same for the branch.
        parameters: Parameters of the branch, the shortcut and (at the end) the after-add.
        activations: Activations on the branch, the shortcut and (at the end) in the after-add.
        calls: The operations on the branch, in order.
        begins_activated: Whether x was normalised or activated by the module before both ways part.
        features: The channel dimension of the sum, None if no operation says it.
        branch_module: The module whose output the branch is, "" if it is none's.
        shortcut_module: The same for the shortcut.
        stream: Number of the shortcut in the pass.
        is_gated: Whether a gate multiplies the shortcut, as in t * f(x) + (1 - t) * x; branch and
            shortcut are then the two products.
        extends: Whether it adds a parallel branch to the unit that the addition before it began;
            the branch is then the sum of the branches.
        swapped: Whether the right operand is the shortcut.
        after: The after-add's calls, set at the end of the block.
        returned: Whether the block's output is what `owner` returns.
    """

    owner: str
    ordinal: int
    entered: torch.Size | None
    shape: torch.Size
    dtype: torch.dtype
    shortcut_count: int
    path: tuple[Call, ...] | None
    shortcut_scale: float
    branch_scale: float
    parameters: list[nn.Parameter]
    activations: list[Call]
    calls: tuple[Call, ...] = ()
    begins_activated: bool = False
    features: int | None = None
    branch_module: str = ""
    shortcut_module: str = ""
    stream: int = 0
    is_gated: bool = False
    extends: bool = False
    swapped: bool = False
    after: tuple[Call, ...] = ()
    returned: bool = False

    @property
    def kind(self) -> str:
        """What the shortcut is, in a word."""
        if self.is_gated:
            return "gated"
        return "projection" if self.shortcut_count else "identity"

    @property
    def key(self) -> tuple[str, int]:
        """What names the block in every pass."""
        return self.owner, self.ordinal
