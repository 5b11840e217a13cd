"""What has happened so far in the training step that is under way."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resdiag.watch.base.safety import Warnings
from resdiag.watch.record.forward import Recorder
from resdiag.watch.record.history import Record


class Step:
    """One training step after another: its number, and what was seen of it so far.

    `number` steps ended before, `recorded` of them were recorded; `updated`: an optimizer of the
    model has ever stepped; `follows`: one has in the step before. Of this step: `forward`: a pass
    is recorded; `passes` were in training mode, `evaluations` in evaluation mode with gradients;
    `compiled`: torch.compile runs the recorded one; `hidden`: it hid one that was due;
    `stepped`: an optimizer of the model has stepped; `updating`: one is stepping now; `updates`:
    how often each has, by `id`; `foreign`: one of other parameters has; `repeated`:
    `Monitor.step()` came twice; `pending`: parameters are remembered whose update has not been
    measured; `factor`: the loss scale of the recorded backward pass, None before there was one.
    """

    def __init__(self) -> None:
        self.number = self.recorded = 0
        self.updated = False
        self.updates: Counter[int] = Counter()
        self.begin()
        self.follows = True  # nothing was to be added to the first step's gradients

    def begin(self) -> None:
        """Nothing has happened yet in this step."""
        self.forward = self.compiled = self.hidden = False
        self.stepped = self.updating = self.foreign = self.repeated = self.pending = False
        self.passes = self.evaluations = 0
        self.follows, self.updates = bool(self.updates), Counter()
        self.factor: Tensor | float | None = None


class LossScale:
    """Reads the scale of the loop's `torch.amp.GradScaler` on the device; the host never waits.

    Without a scaler the scale is 1; anything else than a GradScaler is a TypeError.
    """

    def __init__(self, scaler: Any = None) -> None:  # noqa: ANN401
        needed = ("is_enabled", "unscale_", "get_scale")
        self.is_known = scaler is not None
        if self.is_known and not all(hasattr(scaler, name) for name in needed):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, not {type(scaler).__name__}")
        self._scaler = scaler

    @property
    def is_used(self) -> bool:
        """Whether the loss is scaled."""
        return self.is_known and bool(self._scaler.is_enabled())

    def now(self) -> Tensor | float:
        """The scale in force: a copy on the device, because `update()` changes it in place."""
        if not self.is_used:
            return 1.0
        scale = getattr(self._scaler, "_scale", None)
        if isinstance(scale, Tensor):
            return scale.detach().double().clone()
        return float(self._scaler.get_scale())  # before its first use it is a number

    def is_still_on(self, optimizers: Iterable[int]) -> bool:
        """Whether gradients carry the scale: no optimizer of these `id`s was unscaled so far."""
        states = getattr(self._scaler, "_per_optimizer_states", {})
        stages = [states[one]["stage"].name for one in optimizers if one in states]
        return self.is_used and all(stage == "READY" for stage in stages)

    @staticmethod
    def inside(optimizer: Optimizer) -> Tensor | float:
        """The scale still on the gradients when the step begins: a fused step divides by itself."""
        scale = getattr(optimizer, "grad_scale", None)
        return scale.detach().double() if isinstance(scale, Tensor) else 1.0

    @staticmethod
    def skips(optimizer: Optimizer) -> Tensor | None:
        """Of a fused step: 1 if it will change nothing because a gradient is not finite."""
        found = getattr(optimizer, "found_inf", None)
        return (found.detach() > 0).double().reshape(()) if isinstance(found, Tensor) else None


def casts_to_half() -> bool:
    """Whether autocast to float16 is on for some device: a scaled loss is to be expected."""
    return any(
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        for device in ("cuda", "cpu")
    )


@dataclass(eq=False)
class State:
    """What the parts of one monitor share; `now` is the step under way."""

    model: nn.Module
    now: Step
    recorder: Recorder
    record: Record
    scale: LossScale
    warnings: Warnings
