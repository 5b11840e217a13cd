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


class LossScale:
    """Reads the scale of a `torch.amp.GradScaler` on the device; the host never waits.

    Args:
        scaler: The loop's scaler, or None: then the scale is 1.

    Raises:
        TypeError: It is not a GradScaler.
    """

    def __init__(self, scaler: Any = None) -> None:  # noqa: ANN401
        if scaler is not None and not all(
            hasattr(scaler, name) for name in ("is_enabled", "unscale_", "get_scale")
        ):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, not {type(scaler).__name__}")
        self._scaler = scaler

    @property
    def is_known(self) -> bool:
        """Whether the loop's scaler was given."""
        return self._scaler is not None

    @property
    def is_used(self) -> bool:
        """Whether the loss is scaled."""
        return self._scaler is not None and bool(self._scaler.is_enabled())

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
        return self.is_used and not any(stage != "READY" for stage in stages)

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
    """The state of one monitor.

    Attributes:
        model: The model that is watched.
        now: The step under way.
        recorder: What measures the recorded pass.
        record: Where numbers are written.
        scale: The loss scale.
        warnings: What could not be watched.
    """

    model: nn.Module
    now: Step
    recorder: Recorder
    record: Record
    scale: LossScale
    warnings: Warnings
