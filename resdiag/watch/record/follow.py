"""Which pass is traced, and which is read at the places of a plan."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from resdiag.watch.base.hooks import Hook
from resdiag.watch.base.safety import never_alone
from resdiag.watch.find.additions import Addition
from resdiag.watch.find.inspection import Inspection
from resdiag.watch.find.passes import FollowedPass, Observer, Operands, Surveyor
from resdiag.watch.find.tracer import TracedPass, Tracing
from resdiag.watch.plan.ports import is_in, place_reads
from resdiag.watch.plan.survey import Survey
from resdiag.watch.record.forward import Recorder
from resdiag.watch.record.hooks import Expected, TappedPass

_LATER = frozenset(8 * 4**k for k in range(12))
"""Recorded passes before one is traced again, to look at the parts beside the blocks."""

_MISSES = 2
"""How many more passes may differ from the expected one than be like it; then all are traced."""


class Follower:
    """Gives each recorded pass of a model what follows it.

    The first pass is traced. What its plan can place and its graph can tell again is read by hooks
    from then on; a pass that was not the expected one costs its numbers, and the next one is traced
    again. A model whose passes differ all the time is always traced, and so is a pass for which
    `surveys` has surveyors.

    `reason` says why every pass is traced although none differed, or is ""; `missed` that the last
    pass was not the expected one; `reads` counts passes that were read by hooks; `inspection` is
    what the first pass showed of parts beside the blocks, None before it; `later` what the
    last one did that was traced again: the 9th, the 33rd, the 129th, ..., or one that came after
    a pass that was not the expected one.
    """

    def __init__(
        self,
        tracing: Tracing,
        recorder: Recorder,
        *,
        always: bool = False,
        surveys: Callable[[], Sequence[Surveyor]] = tuple,
    ) -> None:
        self._tracing, self._recorder, self._always = tracing, recorder, always
        self._surveys = surveys
        self._names = {name: module for module, name in tracing.names.items()}
        self._expected: Expected | None = None
        self._again = Recompute(tracing, recorder)
        self.reason, self.missed = "", False
        self.inspection: Inspection | None = None
        self.later: Inspection | None = None
        self.reads = self._misses = self._passes = 0

    def begin(self, step: int) -> FollowedPass:
        """A pass that is to be recorded begins, in a step of this number."""
        self.end()
        again = self._passes in _LATER
        self._passes += 1
        asked = self._surveys()
        if self._expected is not None and not again and not asked:
            return TappedPass(self._expected, self._recorder, self._judge)
        self.missed = False
        model = self._tracing.model
        kept = frozenset(id(x) for x in (*model.parameters(), *model.buffers()))
        planless = self._always or self.reason or self._misses > _MISSES + self.reads
        # a pass that is traced only to be looked at has its plan already
        planned = planless or self._expected is not None
        surveyors: list[Surveyor] = [] if planned else [Survey(kept, self._plan)]
        if self.inspection is None or not self.inspection.is_whole:
            self.inspection = Inspection(self._names, step, weights=True)
            surveyors.insert(0, self.inspection)
        elif again or self._misses:
            self.later = Inspection(self._names, step)
            surveyors.insert(0, self.later)
        surveyors += asked
        return TracedPass(
            self._tracing, [self._recorder], surveyors, lambda one: self._again.arm(one.calls)
        )

    def end(self) -> None:
        """The step has ended: nothing of its pass runs again."""
        self._again.disarm()

    def _judge(self, as_expected: bool) -> None:
        self.missed = not as_expected
        if as_expected:
            self.reads += 1
        else:
            self._misses += 1
            self._expected = None

    def _plan(self, planner: Survey) -> None:
        model, plan, pattern = self._tracing.model, planner.plan, planner.pattern
        assert pattern is not None
        reads = place_reads(plan, planner.kept, core=self._recorder.is_core)
        unseen = pattern.unseen(plan)
        self.reason = reads.reason
        if self._recorder.backward.awaited():
            self.reason = self.reason or "a part runs without gradients, and again with them"
        if unseen and any(not p.is_cpu for p in model.parameters()):
            # comparing numbers would make the host wait for the device
            self.reason = self.reason or "no gradient leads through all blocks"
        if not plan.blocks:
            self.reason = self.reason or "no block was found"
        if not self.reason:
            self._expected = Expected(plan, reads, pattern, unseen, self._names, planner.kept)


class _Again(Observer):
    """Hooks the tensors of blocks that run again, and measures nothing twice."""

    def __init__(self, recorder: Recorder, calls: Mapping[str, int]) -> None:
        self._backward, self._rows = recorder.backward, recorder.anatomy.rows
        self._recorder, self._calls = recorder, calls

    def operands(self, addition: Addition, tensors: Operands) -> None:
        """Hook the block's input and what leads to the shortcut."""
        row = self._row(addition)
        if row is not None and not addition.extends:
            self._backward.hook_operands(row, addition, tensors)

    def added(self, addition: Addition, total: Tensor) -> None:
        """Hook the sum."""
        row = self._row(addition)
        if row is not None:
            self._backward.hook_again(row, "sum", total)

    def closed(self, addition: Addition, output: Tensor) -> None:
        """Hook the output."""
        row = self._row(addition)
        if row is not None:
            self._backward.hook_again(row, "output", output)

    def same(self, old: Tensor, new: Tensor) -> None:
        """A tensor was replaced by an equal one."""
        self._recorder.same(old, new)

    def _row(self, addition: Addition) -> int | None:
        # of several calls of a module it is not known which one runs again
        return self._rows.get(addition.key) if self._calls.get(addition.owner) == 1 else None


class Recompute:
    """Blocks that run once more in the backward pass, where their gradients can be had.

    Activation checkpointing with `use_reentrant=True` runs the forward of a part without gradients,
    and again, with gradients and on copies of its inputs, inside the backward pass. What the first
    run computed was measured then; only the second one has tensors whose gradients can be hooked.
    """

    def __init__(self, tracing: Tracing, recorder: Recorder) -> None:
        self._tracing, self._recorder = tracing, recorder
        self._calls: Mapping[str, int] = {}
        self._pass: TracedPass | None = None
        self._root: nn.Module | None = None
        self._armed = ExitStack()

    def arm(self, calls: Mapping[str, int]) -> None:
        """The forward pass has ended: are there blocks whose gradients are still to come?"""
        owners = set(self._recorder.backward.awaited())
        self._calls = calls
        for module, name in self._tracing.names.items() if owners else ():
            around = bool(name) and any(is_in(owner, name) for owner in owners)
            if around and self._tracing.is_framed(module):
                self._watch(module)

    def disarm(self) -> None:
        """Nothing runs again."""
        self._stop()
        self._armed.close()

    def _watch(self, owner: nn.Module) -> None:
        @never_alone
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            in_backward = torch._C._current_graph_task_id() != -1
            if module is owner and self._pass is None and in_backward and torch.is_grad_enabled():
                self._pass = TracedPass(self._tracing, [_Again(self._recorder, self._calls)])
                self._root = module
                self._pass.start(module, args, kwargs)

        @never_alone
        def leave(module: nn.Module, args: object, output: object) -> None:
            if module is self._root and self._pass is not None:
                self._pass.finish(module, output)
                self._stop()

        handle = owner.register_forward_pre_hook(Hook(enter), with_kwargs=True)
        self._armed.callback(handle.remove)
        self._armed.callback(owner.register_forward_hook(Hook(leave)).remove)

    def _stop(self) -> None:
        followed, self._pass = self._pass, None
        self._root = None
        if followed is not None:
            followed.stop()
