"""The `Monitor`: what a training loop calls, and what was recorded."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Self

from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from resdiag.catalog.custom import CustomValues, custom_metrics
from resdiag.catalog.table import POINTS, derive
from resdiag.errors import unknown
from resdiag.summary import Summary, Unavailable, by_reason, summarise_blocks
from resdiag.watch.base.safety import Guard, Warnings, outlasting_shortage
from resdiag.watch.find.blocks import Blocks
from resdiag.watch.find.passes import FollowedPass, PassDriver
from resdiag.watch.find.tracer import Tracing
from resdiag.watch.loop.forward_passes import Checks, ForwardPasses
from resdiag.watch.loop.gradients import Gradients
from resdiag.watch.loop.inventory import Inventory
from resdiag.watch.loop.parameters import OptimizerSteps, Shards
from resdiag.watch.loop.ranks import RankReduction, Ranks
from resdiag.watch.loop.state import LossScale, State, Step
from resdiag.watch.plan.survey import plan_of_example
from resdiag.watch.record.collect import GraphRecorder
from resdiag.watch.record.follow import Follower
from resdiag.watch.record.forward import Recorder
from resdiag.watch.record.history import Listener, Record
from resdiag.watch.record.pool import Pool
from resdiag.watch.record.set_surveys import RANKS, SetSurveys
from resdiag.watch.record.sets import Schedule, Sets

if TYPE_CHECKING:
    import pandas as pd


class Monitor:
    """What `attach` returns: call `step()` at the end of each training step."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        units: frozenset[str] | None,
        schedule: Schedule,
        samples: int | None,
        point: str | None,
        ranks: Ranks | None,
        scale: LossScale,
        *,
        take_last: bool,
        core: bool,
        moments: int | None,
        always: bool,
    ) -> None:
        self._model, self._optimizers, self._units = model, optimizers, units
        self._open, given = True, len(optimizers) > 0
        self._custom = custom = CustomValues(custom_metrics().values())
        self._now, self._warnings = Step(), Warnings()
        self._record = record = Record(self._custom.ids, self._warnings)
        pool = None
        if ranks is not None:
            pool = Pool(record.cells, record.head, ranks.size, sharded=ranks.sharded)
        guard = Guard()
        sets = Sets(schedule, record.sparse, guard)
        self._recorder = Recorder(
            record.cells,
            record.head,
            guard,
            samples,
            pool,
            custom,
            core=core,
            moments=moments,
            sets=sets,
        )
        self._state = state = State(model, self._now, self._recorder, record, scale, self._warnings)
        # its hooks come before those of a pass, which would see tensors that they do not know
        self._shards = Shards(model)
        count, updates = 1 if ranks is None else ranks.size, given and not core
        self._gradients = gradients = Gradients(
            state, self._shards, pool, point, ranks=count, updates=updates, sets=sets
        )
        self._recorder.backward.begins = gradients.backward_begins
        tracing = Tracing(model, units)
        names = {name: module for module, name in tracing.names.items()}
        self._surveys = surveys = SetSurveys(names, sets, self._recorder.sites, samples)
        if ranks is not None:
            surveys.refuse(RANKS)
        follower = Follower(tracing, self._recorder, always=always, surveys=surveys.due)
        self._passes = ForwardPasses(
            state, schedule.is_due, gradients, follower, surveys, take_last=take_last
        )
        self._checks = Checks(state, self._passes, self._custom.stopped, given=given)
        self._reduction: RankReduction | None = None
        if ranks is not None and pool is not None:
            self._reduction = RankReduction(ranks, pool, state, gradients)
        self._driver = PassDriver(model, self._begin_pass, self._passes.seen)
        self._shards.same = self._driver.same
        self._steps = OptimizerSteps(model, optimizers, self._before_update, self._after_update)
        self._inventory = Inventory(model, optimizers)
        if self._inventory.trains_nothing:
            self._warnings.say("the optimizer holds no parameter of the model, and cannot train it")
        self._followers: list[tuple[Callable[[], object], Callable[[], object]]] = []

    def prepare(self, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        """Find the blocks by one pass over example inputs, and get ready for torch.compile."""
        with self.paused():
            plan = plan_of_example(self._model, inputs, keywords, self._units)
        self._passes.taps = GraphRecorder(self._model, plan, self._recorder)
        self._passes.arm()

    @property
    def warnings(self) -> list[str]:
        """What could not be recorded, each message once."""
        return self._warnings.texts

    @property
    def point(self) -> str:
        """Where gradients are read."""
        return self._gradients.point

    @property
    def has_nonfinite_loss(self) -> bool:
        """Whether the loop reported a loss that is not finite, as of the last flush."""
        return self._record.losses.lost

    def step(self, loss: float | Tensor | None = None) -> None:
        """End a training step: after backward, and after the optimizer's step if there is one.

        Args:
            loss: The step's loss, for the verdict: a number or a tensor of one element, which is
                read at the next flush. It is kept for every step, recorded or not.

        Raises:
            RuntimeError: The monitor is closed.
            ValueError: The loss is not one number.
            StopTraining: `attach(on_finding="stop")` found a fault.
        """
        if not self._open:
            raise RuntimeError("the monitor is closed; attach again")
        with outlasting_shortage(self._recorder.guard):
            self._end_step(loss)
        recorded = self._now.forward
        self._checks.failure()
        self._now.begin()
        self._gradients.forget()
        self._now.number += 1
        self._passes.arm()
        if self._record.cells.is_full:
            with outlasting_shortage(self._recorder.guard):
                self._flush()
        if recorded:
            for follower, _ in self._followers:
                follower()

    def read_gradients(self, point: str | None = None) -> None:
        """Read the parameter gradients now instead of right before the optimizer's step.

        Call it before clipping to record gradients before and after: those that the optimizer gets
        are in columns that end in `_post_clip`. At steps that are not recorded it does nothing.

        Args:
            point: What the loop has done to the gradients so far, one of `catalog.POINTS`. The
                first one read is the monitor's `point` unless `attach` was given one; gradients
                read at other points become columns `grad_param_<point>` and `grad_norm_<point>`.

        Raises:
            ValueError: An unknown point.
        """
        if point is not None and point not in POINTS:
            raise ValueError(unknown("point", point, POINTS).message)
        self._gradients.read(point, self._steps.owners())

    def add_listener(self, listener: Listener) -> None:
        """Also pass new columns to `listener` whenever they are copied to the host.

        Args:
            listener: Called with the new columns of `drain()`, without derived metrics. If it
                raises, it is not called again, and a warning is added.
        """
        self._record.listeners.append(listener)

    def add_follower(
        self, follower: Callable[[], object], at_close: Callable[[], object] = lambda: None
    ) -> None:
        """Also call `follower` at the end of each recorded step; steps in between cost nothing.

        Args:
            follower: What it raises, `step()` raises: that is how it ends a training.
            at_close: Called once, by the first `close()`.
        """
        self._followers.append((follower, at_close))

    def force_record(self) -> None:
        """Record the next forward pass even if it is not due; it belongs to this step.

        Raises:
            RuntimeError: Several ranks record together: one that did not force it would be missed.
        """
        if self._reduction is not None:
            raise RuntimeError(
                "force_record() on one rank would wait for the others: "
                "use every= or record_first=, or attach(..., reduce=False)"
            )
        self._passes.demanded = True

    @property
    def passes_read(self) -> int:
        """Recorded passes that were read by hooks; the others were traced."""
        return self._passes.follower.reads

    @property
    def trace_reason(self) -> str:
        """Why every recorded pass is traced although passes do not differ; "" if this is not so."""
        return self._passes.follower.reason

    @property
    def is_recording(self) -> bool:
        """Whether this step's forward pass was recorded."""
        return self._now.forward

    @property
    def is_due(self) -> bool:
        """Whether the schedule names the step under way."""
        return self._passes.is_due()

    def replayed(self) -> None:
        """Tell the monitor that a CUDA graph has just replayed a forward pass of this step.

        Otherwise, a replay is noticed when the optimizer steps, or at the latest in `step()`.
        """
        self._passes.adopt_hidden()

    def start_at(self, step: int) -> None:
        """Continue counting from `step`, for a resumed training."""
        self._now.number = step
        self._passes.arm()

    def paused(self) -> AbstractContextManager[None]:
        """Ignore forward passes inside the `with`, e.g. an evaluation in training mode."""
        return self._passes.paused()

    def close(self) -> None:
        """Remove every hook; what was recorded stays readable. Safe to call twice."""
        self._driver.close()
        self._passes.close()
        self._shards.close()
        if self._reduction is not None:
            self._reduction.close()
        self._recorder.close()
        self._steps.close()
        self._gradients.close()
        self._open = False
        followers, self._followers = self._followers, []
        for _, at_close in followers:
            at_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "watching" if self._open else "closed"
        return f"Monitor(blocks={len(self.blocks)}, steps={self._now.recorded}, {state})"

    def __str__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def summary(self) -> Summary:
        """One row per block with its numbers at the last recorded step; `print(monitor)`.

        Below the table stands what was not recorded, by reason, and what else the recording says.
        """
        about, recorded = self.metadata, self._now.recorded
        steps = f"{about['steps']} step{'s' * (about['steps'] != 1)}, {recorded} recorded"
        optimizer = about["optimizer"] or "no optimizer"
        state = "watching" if self._open else "closed"
        title = f"{about['model']}: {len(self.blocks)} blocks, {steps}, {optimizer}, {state}"
        notes = [*by_reason(self.unavailable), *self.warnings]
        if not self.blocks:
            notes = ["the blocks are found in the first forward pass in training mode"]
        self._flush()
        columns = self._record.columns()[0]
        blocks = (block.to_dict() for block in self.blocks)
        return summarise_blocks(title, blocks, {**columns, **derive(columns)}, notes)

    @property
    def blocks(self) -> Blocks:
        """The blocks found, a list; empty before the first recorded forward pass."""
        return Blocks(self._recorder.anatomy.blocks)

    @property
    def metadata(self) -> dict[str, Any]:
        """What is watched: names of model and optimizer, steps, device and dtype, classes."""
        first = next(self._model.parameters(), None)
        return {
            "model": type(self._model).__name__,
            "optimizer": ", ".join(type(optimizer).__name__ for optimizer in self._optimizers),
            "steps": self._now.number,
            "device": "cpu" if first is None else str(first.device),
            "dtype": "float32" if first is None else str(first.dtype).removeprefix("torch."),
            "classes": self._recorder.head.classes or None,
        }

    @property
    def unavailable(self) -> Unavailable:
        """Metrics that are NaN for a reason: a list of `{"metric", "blocks", "reason"}`.

        It is shown with one line per reason.
        """
        self._surveys.settle()
        missing = [
            (metric, sorted(rows) or "all", reason)
            for metric, reasons in self._recorder.guard.reasons.items()
            for reason, rows in reasons.items()
        ]
        for metric, reason in self._custom.stopped.items():
            missing.append((metric, "all", f"stopped: {reason}"))
        if not self._optimizers:
            reason = "attach(optimizer=...) is needed to see updates"
            missing.append(("update_ratio", "all", reason))
        if not self._gradients.rated:
            reason = "no optimizer was seen to step in a recorded step"
            rates = "head_kick", "lr", "momentum", "weight_decay"
            missing += [(metric, "all", reason) for metric in rates]
        names = "metric", "blocks", "reason"
        return Unavailable(dict(zip(names, one, strict=True)) for one in missing)

    @property
    def custom_metrics(self) -> list[dict[str, str]]:
        """The custom metrics that are recorded, as plain data: id, label, unit, site, ..."""
        return [one.to_dict() for one in self._custom.metrics]

    @property
    def inventory(self) -> dict[str, Any]:
        """What model, optimizers and loop consist of, for the verdict; see `Inventory.take`."""
        recorder, follower = self._recorder, self._passes.follower
        return self._inventory.take(
            recorder.anatomy, follower.inspection, follower.later, recorder.head.activation
        )

    def drain(self) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Take what was recorded since the last drain: per-block and per-step columns."""
        self._flush()
        return self._record.take()

    def to_frame(self, per: str = "block") -> "pd.DataFrame":
        """What was recorded and not drained, with derived columns.

        Args:
            per: "block" for one row per step and block, "step" for one row per step.

        Raises:
            ValueError: Any other `per`.
        """
        import pandas as pd

        if per not in ("block", "step"):
            raise ValueError(f"per must be 'block' or 'step', not '{per}'")
        self._flush()
        columns = self._record.columns()[per == "step"]
        frame = pd.DataFrame({**columns, **derive(columns, per_step=per == "step")})
        return frame.assign(point=pd.Categorical([self.point] * len(frame)))

    def _begin_pass(self) -> FollowedPass | None:
        with outlasting_shortage(self._recorder.guard):
            return self._passes.begin()
        return None

    def _end_step(self, loss: float | Tensor | None) -> None:
        if loss is not None:
            self._record.losses.tell(self._now.number, loss)
        self._checks.order()
        self._note_events()
        self._passes.adopt_hidden()
        if self._now.forward:
            self._finish()
        else:
            self._checks.forward()
        if self._reduction is not None and self._passes.is_due():
            self._reduction.meet()
        if self._now.forward and self._state.scale.is_used:
            self._gradients.divide_scale()

    def _note_events(self) -> None:
        now, events = self._now, self._inventory.events
        if now.updates:
            events.note("update", now.number)
            if now.evaluations and not now.passes:
                events.note("update_in_evaluation", now.number)
        elif now.passes:
            events.note("no_update", now.number)

    def _before_update(self, optimizer: Optimizer, owned: Collection[int] | None) -> None:
        with outlasting_shortage(self._recorder.guard):
            self._see_update(optimizer, owned)

    def _see_update(self, optimizer: Optimizer, owned: Collection[int] | None) -> None:
        now = self._now
        if owned is None:
            now.foreign = True
            return
        now.updates[id(optimizer)] += 1
        times, holdings = now.updates[id(optimizer)], self._inventory.holdings
        if now.forward or not holdings.knows(optimizer):
            holdings.see(optimizer)
        if times == 2:
            self._warnings.say(
                "the optimizer stepped twice without monitor.step() in between: call it after each "
                "of its steps, or only the first is recorded and steps are counted wrong"
            )
        now.stepped = now.updated = now.updating = True
        self._passes.adopt_hidden()
        if now.forward and not self._recorder.guard.failure and times == 1:
            self._gradients.before_update(optimizer, owned)

    def _after_update(self, optimizer: Optimizer, owned: Collection[int] | None) -> None:
        self._now.updating = self._now.updating and owned is None
        if owned is not None:
            again = self._now.updates[id(optimizer)] > 1
            with outlasting_shortage(self._recorder.guard):
                self._gradients.after_update(optimizer, owned, again=again)

    def _finish(self) -> None:
        if self._now.compiled and self._passes.taps is not None:
            self._passes.taps.collect()
        self._recorder.backward.conclude()
        self._passes.follower.end()
        self._gradients.finish()
        self._checks.backward()
        self._recorder.end()
        self._now.recorded += 1

    def _flush(self) -> None:
        if self._reduction is not None:
            self._reduction.check()
        self._record.flush(self.blocks, keep_open=self._now.forward and self._open)
