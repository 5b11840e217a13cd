"""What is wrong with how a loop calls the model and the monitor, in words."""

from collections.abc import Mapping

from resdiag.watch.blocks import describe_units
from resdiag.watch.passes import Passes
from resdiag.watch.state import State

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
