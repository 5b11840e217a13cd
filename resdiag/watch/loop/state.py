"""What has happened so far in the training step that is under way."""

from collections import Counter

from torch import Tensor


class Step:
    """One training step after another: its number, and what was seen of it so far.

    Attributes:
        number: Steps that ended before.
        recorded: Steps of them that were recorded.
        updated: Whether an optimizer of the model has ever stepped.
        forward: Whether a forward pass is recorded in this step.
        passes: Forward passes in training mode.
        compiled: Whether torch.compile runs the recorded pass.
        hidden: Whether a pass was due that torch.compile hid.
        stepped: Whether an optimizer of the model has stepped.
        updating: Whether one is about to and has not ended.
        updates: Steps of each optimizer, by `id`.
        foreign: Whether an optimizer of other parameters has stepped.
        repeated: Whether `Monitor.step()` came twice.
        pending: Whether parameters are remembered whose update has not been measured.
        factor: The loss scale of the recorded backward pass; None before there was one.
    """

    def __init__(self) -> None:
        self.number = self.recorded = 0
        self.updated = False
        self.begin()

    def begin(self) -> None:
        """Nothing has happened yet in this step."""
        self.forward = self.compiled = self.hidden = False
        self.stepped = self.updating = self.foreign = self.repeated = self.pending = False
        self.passes = 0
        self.updates: Counter[int] = Counter()
        self.factor: Tensor | float | None = None
