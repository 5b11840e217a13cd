"""A residual addition: where a shortcut and a branch come together."""

from dataclasses import dataclass

from torch import Tensor, nn

from resdiag.watch.calls import Call


@dataclass(eq=False)
class Addition:
    """One residual addition, as it happens.

    Attributes:
        owner: Name of the module whose forward is running ("" is the model itself).
        ordinal: Number of residual additions that `owner` has done before in this pass.
        origin: The block's input x: where both operands descend from; None if it is gone.
        branch: F(x), before the addition.
        shortcut: h(x).
        shortcut_count: Parameterised operations on the shortcut: 0 for an identity.
        path: The calls that lead from `origin` to `shortcut` if they can be repeated, else None.
        shortcut_scale: Factor on the shortcut inside the addition (torch.add's alpha), mostly 1.
        branch_scale: The same for the branch.
        parameters: Parameters of the branch, the shortcut and (at the end) the after-add.
        activations: Activations on the branch, the shortcut and (at the end) in the after-add.
        calls: The operations on the branch, in order.
        begins_activated: Whether x was normalised or activated by the module before both ways part.
        features: The channel dimension of the sum, None if no operation says it.
        branch_module: The module whose output the branch is, "" if it is none's.
        shortcut_module: The same for the shortcut.
        stream: Number of the shortcut in the lineage.
        is_gated: Whether a gate multiplies the shortcut, as in t * f(x) + (1 - t) * x; then
            `branch` and `shortcut` are the two products.
        extends: Whether it adds a parallel branch to the unit that the addition before it began;
            then `branch` is the sum of the branches.
        sum: y = h + F, set once it is computed.
        after: The after-add's calls, set at the end of the block.
        returned: Whether the block's output is what `owner` returns.
    """

    owner: str
    ordinal: int
    origin: Tensor | None
    branch: Tensor
    shortcut: Tensor
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
    sum: Tensor | None = None
    after: tuple[Call, ...] = ()
    returned: bool = False

    @property
    def kind(self) -> str:
        """What the shortcut is, in a word."""
        if self.is_gated:
            return "gated"
        return "projection" if self.shortcut_count else "identity"

    def again(self) -> "Addition":
        """A copy of its own to fill in; `copy.copy` takes ten times as long."""
        other = object.__new__(Addition)
        other.__dict__.update(self.__dict__)
        return other
