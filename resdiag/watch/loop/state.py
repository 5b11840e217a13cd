"""What has happened so far in the training step that is under way."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resdiag.watch.base.safety import Warnings
from resdiag.watch.find.blocks import describe_units
from resdiag.watch.loop.forward_passes import Passes
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


_REMEDY = (
    "a step was due for recording, but torch.compile ran the forward pass and hides it: "
    "attach(model, example_inputs=(...)) before torch.compile"
)


class Checks:
    """Looks at a step when it ends.

    Args:
        state: The monitor's state.
        passes: The forward passes.
        stopped: Custom metrics that stopped, and why.
        given: Whether `attach` was given an optimizer.
    """

    def __init__(
        self, state: State, passes: Passes, stopped: Mapping[str, str], *, given: bool
    ) -> None:
        self._now, self._passes, self._recorder = state.now, passes, state.recorder
        self._loss_scale, self._warnings = state.scale, state.warnings
        self._stopped, self._given = stopped, given

    def order(self) -> None:
        """Say what is wrong with where `step()` is called."""
        if self._passes.is_paused:
            return
        updated = any(self._now.updates.values())
        if not self._now.passes and not updated and (self._now.updated or self._now.recorded):
            self._now.repeated = True
            self._warnings.say(
                "monitor.step() came without a forward pass since the last one: called twice a "
                "step it counts steps double"
            )
        expected = self._now.updated or self._given
        if self._now.passes and not updated and expected and not self._loss_scale.is_used:
            self._warnings.say(
                "monitor.step() came without a step of the optimizer since the last one: call it "
                "once per update, after optimizer.step(); where a GradScaler skipped the update, "
                "attach(..., scaler=scaler)"
            )

    def forward(self) -> None:
        """Say why a step that was due has no recorded pass."""
        if self._now.hidden:
            self._warnings.say(_REMEDY)
        elif self._passes.is_due() and not self._recorder.guard.failure and not self._now.repeated:
            self._warnings.say(
                "a step was due for recording, but no forward pass in training mode went through "
                "the model's __call__: was forward() called directly, the model compiled, or in "
                "eval mode?"
            )

    def backward(self) -> None:
        """Say what is wrong with a recorded pass."""
        for metric, reason in self._stopped.items():
            self._warnings.say(f"custom metric '{metric}' stopped: {reason}")
        if self._recorder.guard.failure:
            self._warnings.say(
                f"watching stopped at step {self._now.number} after an error of resdiag, "
                f"training goes on: {self._recorder.guard.failure}"
            )
            return
        anatomy = self._recorder.anatomy
        if anatomy.is_chosen:
            self._warnings.say(f"{describe_units(anatomy.blocks)}; blocks=[...] names others")
        if not anatomy.blocks:
            self._warnings.say("no residual addition was found: name modules with blocks=[...]")
        elif self._passes.follower.missed:
            self._warnings.say(
                "the forward pass of a recorded step was not like the one that had been traced: "
                "its numbers are NaN where they differ, and the next recorded pass is traced"
            )
        elif not self._recorder.backward.seen and not self._now.compiled:
            self._warnings.say("a recorded step had no backward pass through the blocks")
        if self._recorder.backward.repeats:
            self._warnings.say(
                "several backward passes reached the blocks: the last one is recorded"
            )
        if self._recorder.strangers:
            self._warnings.say(
                "the forward pass took additions that the first one had not: not recorded"
            )
        if self._recorder.skipped:
            shown = ", ".join(self._recorder.skipped[:3])
            self._warnings.say(
                f"blocks of the first pass were left out of a later one, NaN there: {shown}"
            )
