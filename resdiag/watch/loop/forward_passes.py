"""Which of a loop's forward passes are recorded."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from resdiag.watch.base.safety import compiled_parts, is_capturing
from resdiag.watch.find.blocks import describe_units
from resdiag.watch.find.passes import FollowedPass, Seen
from resdiag.watch.loop.gradients import Gradients
from resdiag.watch.loop.state import State, casts_to_half
from resdiag.watch.record.collect import GraphRecorder
from resdiag.watch.record.follow import Follower
from resdiag.watch.record.set_surveys import SetSurveys


class ForwardPasses:
    """Decides at the beginning of each forward pass of a model whether it is recorded.

    `schedule` says whether a step of some number is due; `take_last` that the last pass of a step
    is recorded, not the first. `taps` record compiled passes, if the model was prepared for them;
    `seen` is what was noticed of torch.compile. Where one is `demanded`, the next pass is recorded
    even if the schedule leaves it out.
    """

    def __init__(
        self,
        state: State,
        schedule: Callable[[int], bool],
        gradients: Gradients,
        follower: Follower,
        surveys: SetSurveys,
        *,
        take_last: bool,
    ) -> None:
        self.follower, self._surveys = follower, surveys
        self.taps: GraphRecorder | None = None
        self.seen = Seen()
        self.demanded = self.is_paused = self._captured = False
        self._model, self._schedule, self._take_last = state.model, schedule, take_last
        self._step, self._recorder, self._record = state.now, state.recorder, state.record
        self._gradients, self._scale, self._warnings = gradients, state.scale, state.warnings

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore forward passes inside the `with`."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def is_due(self) -> bool:
        """Whether the schedule names the step under way."""
        return self._schedule(self._step.number)

    def arm(self) -> None:
        """Get ready for passes of the step whose beginning Python does not see."""
        if self.taps is not None:
            self.taps.arm(on=self.is_due())

    def begin(self) -> FollowedPass | None:
        """What follows the forward pass that begins: the first of a step that is due."""
        return self.follower.begin(self._step.number) if self._is_wanted() else None

    def _is_wanted(self) -> bool:
        compiled = self.seen.compiled
        if compiled or is_capturing() or compiled_parts(self._model):
            self._begin_compiled(whole=compiled)
            return False
        if self.taps is not None:
            self.taps.begin(on=False)
        if not self._is_training():
            self._step.evaluations += not self.is_paused and torch.is_grad_enabled()
            return False
        self._step.passes += 1
        if not self._can_trace() or not self._is_due_now():
            return False
        if self._step.forward and self._recorder.is_whole and not self._replaces():
            return False
        self._check_scale()
        self._open()
        return True

    def _open(self) -> None:
        """Begin to record a pass, in place of one that was recorded in the same step."""
        self._record.begin(self._step.number, again=self._step.forward)
        self._surveys.begin(self._step.number)
        self._step.forward, self.demanded, self._step.foreign = True, False, False
        self._recorder.begin()

    def _is_training(self) -> bool:
        return not self.is_paused and self._model.training and torch.is_grad_enabled()

    def adopt_hidden(self) -> None:
        """Count a pass whose beginning no hook saw: inside somebody's graph, or a replayed one."""
        hidden, self.seen.in_graph = self.seen.in_graph, False
        due = self.is_due() and not self.is_paused and not self._recorder.guard.failure
        if self._step.forward or not due or not (hidden or self._captured):
            return
        if self.taps is None:
            self._step.hidden = True
        else:
            self._open_compiled()

    def close(self) -> None:
        """Remove the hooks."""
        self.follower.end()
        if self.taps is not None:
            self.taps.close()

    def _is_due_now(self) -> bool:
        wanted = self.demanded or self.follower.missed or self.is_due()
        return wanted and not self._recorder.guard.failure

    def _can_trace(self) -> bool:
        if torch._C._functorch.peek_interpreter_stack() is None:
            return True
        self._warnings.say(
            "the model ran inside a torch.func transform (grad, vmap), where values of tensors "
            "cannot be read: not recorded"
        )
        return False

    def _check_scale(self) -> None:
        if not self._scale.is_known and casts_to_half():
            self._warnings.say(
                "autocast to float16 without scaler=: if a GradScaler scales the loss, gradients "
                "at activations are recorded with its scale; attach(..., scaler=scaler)"
            )

    def _begin_compiled(self, *, whole: bool) -> None:
        """A pass begins of which at least a part runs compiled: its taps record it.

        Where the whole model is compiled, a pass that is not due runs a graph without taps; where
        parts are, theirs always write: a second graph for each could exceed the recompile limit.
        """
        training = self._is_training()
        due = training and self._is_due_now()
        self._step.passes += training
        if self.taps is None:
            self._step.hidden = self._step.hidden or due
            return
        if is_capturing():  # kernels are noted down, nothing is computed: replays are what counts
            self._captured = True
            self.taps.begin(on=training, captured=True)
            return
        first = due and not self._step.forward
        self.taps.begin(on=first if whole else training)
        if first:
            self._open_compiled()
        elif due:
            which = "first" if whole else "last"
            self._warnings.say(
                f"several compiled forward passes in one step: the {which} one is recorded"
            )

    def _open_compiled(self) -> None:
        self._step.compiled, self._step.factor = True, self._scale.now()
        self._open()
        self._surveys.hide()

    def _replaces(self) -> bool:
        """Whether a further forward pass of the step is recorded in place of the one before."""
        if self._step.stepped and not self._step.updating:
            return False  # after its own update the model may serve others, as a discriminator
        unused = self._recorder.is_lost or self._step.foreign or self._is_thrown_away()
        if unused and not self._step.stepped:
            return True
        take_last = self._take_last and not self._step.stepped
        which = "last" if take_last else "first"
        self._warnings.say(
            f"several forward passes in one step: the {which} one is recorded, activations and "
            "their gradients; parameter gradients are the accumulated ones of all passes"
        )
        return take_last

    def _is_thrown_away(self) -> bool:
        """Whether the gradients of the recorded pass were set to None without being used."""
        cleared = all(p.grad is None for p in self._model.parameters())
        return self._recorder.backward.seen and cleared and not self._gradients.has_taken


class Checks:
    """Warns, when a step ends, of what was wrong with it.

    `stopped` has the custom metrics that stopped, and why; `given` says whether `attach` was given
    an optimizer.
    """

    def __init__(
        self, state: State, passes: ForwardPasses, stopped: Mapping[str, str], *, given: bool
    ) -> None:
        self._now, self._passes, self._recorder = state.now, passes, state.recorder
        self._loss_scale, self._warnings = state.scale, state.warnings
        self._stopped, self._given = stopped, given

    def order(self) -> None:
        """Warn if `step()` is called at the wrong place of the loop."""
        if self._passes.is_paused:
            return
        updated = any(self._now.updates.values())
        if not self._now.passes and not updated and (self._now.updated or self._now.recorded):
            self._now.repeated = True
            self._warnings.say(
                "monitor.step() was called without a forward pass since its last call: call it "
                "once per update, or steps are counted twice"
            )
        expected = self._now.updated or self._given
        if self._now.passes and not updated and expected and not self._loss_scale.is_used:
            self._warnings.say(
                "monitor.step() came without a step of the optimizer since its last call: call it "
                "once per update, after optimizer.step(); if a GradScaler skipped the update, pass "
                "it: attach(..., scaler=scaler)"
            )

    def forward(self) -> None:
        """Warn why a step that was due has no recorded pass."""
        if self._now.hidden:
            self._warnings.say(
                "a step was due for recording, but torch.compile ran the forward pass without its "
                "hooks: call attach(model, example_inputs=(...)) before torch.compile"
            )
        elif self._passes.is_due() and not self._recorder.guard.failure and not self._now.repeated:
            self._warnings.say(
                "a step was due for recording, but no forward pass in training mode went through "
                "the model's __call__: was forward() called directly, the model compiled, or in "
                "eval mode?"
            )

    def failure(self) -> None:
        """Warn once that nothing is recorded from here on, and why; the ranks may have said it."""
        failure = self._recorder.guard.failure
        said = (text.startswith("watching stopped") for text in self._warnings.texts)
        if failure and not any(said):
            self._warnings.say(
                f"watching stopped at step {self._now.number} after an error inside resdiag, the "
                f"training continues: {failure}"
            )

    def backward(self) -> None:
        """Warn of what is wrong with a recorded pass."""
        for metric, reason in self._stopped.items():
            self._warnings.say(f"custom metric '{metric}' stopped: {reason}")
        if self._recorder.guard.failure:
            return
        anatomy, backward = self._recorder.anatomy, self._recorder.backward
        if anatomy.is_chosen:
            self._warnings.say(f"{describe_units(anatomy.blocks)}; blocks=[...] names others")
        if not anatomy.blocks:
            self._warnings.say("no residual addition was found: name modules with blocks=[...]")
        elif self._passes.follower.missed:
            self._warnings.say(
                "the forward pass of a recorded step was not like the one that had been traced: "
                "blocks that differ are NaN, and the next recorded pass is traced again"
            )
        elif not backward.seen and not self._now.compiled:
            self._warnings.say("a recorded step had no backward pass through the blocks")
        if backward.repeats:
            self._warnings.say(
                "several backward passes reached the blocks: the last one is recorded"
            )
        if self._recorder.unplanned:
            self._warnings.say(
                "the forward pass had additions that the first pass did not have: not recorded"
            )
        if self._recorder.skipped:
            shown = ", ".join(self._recorder.skipped[:3])
            self._warnings.say(
                f"blocks of the first pass did not run in a later one and are NaN there: {shown}"
            )
