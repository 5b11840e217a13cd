"""`attach`: watch the residual blocks of a model while it trains."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from resdiag.errors import unknown
from resdiag.watch.blocks import Block, match_modules
from resdiag.watch.buffer import Buffer
from resdiag.watch.catalog import POINTS, RECORDED, RECORDED_PER_STEP, SETS, derive
from resdiag.watch.compiled import Taps
from resdiag.watch.distributed import Ranks, find_ranks, is_reduced, may_reduce, unwrap
from resdiag.watch.dynamo import compiled_parts, is_capturing
from resdiag.watch.lossscale import LossScale, casts_to_half
from resdiag.watch.optimizers import OptimizerSteps
from resdiag.watch.own import own_metrics
from resdiag.watch.ownvalues import OwnValues
from resdiag.watch.parameters import ParameterNorms
from resdiag.watch.pool import Pool
from resdiag.watch.ports import example, find_ports
from resdiag.watch.recorder import HEAD, Recorder
from resdiag.watch.rewriting import Rewriting
from resdiag.watch.shards import Shards, is_sharded
from resdiag.watch.tracer import Tracer

if TYPE_CHECKING:
    import pandas as pd

Listener: TypeAlias = Callable[[dict[str, NDArray[Any]], dict[str, NDArray[Any]]], object]
"""Is told per-block and per-step columns."""

_STEP_COLUMNS = (*HEAD, "grad_norm", "grad_scale", "skipped")
_SCALED = ("grad_input", "grad_sum", "grad_output")
_SLOTS = 16
_TAKES = ("first", "last")
_REMEDY = (
    "a step was due for recording, but torch.compile ran the forward pass and hides it: "
    "attach(model, example_inputs=(...)) before torch.compile"
)


class WatchWarning(UserWarning):
    """Something could not be watched; the run goes on."""


def attach(
    model: nn.Module,
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    blocks: Sequence[str] | None = None,
    every: int = 1,
    record_first: int = 0,
    samples: int | None = 4,
    point: str | None = None,
    reduce: bool = True,
    scaler: Any = None,  # noqa: ANN401
    take: str = "first",
    metrics: str = "full",
    example_inputs: object = None,
) -> "Monitor":
    """Start watching a model. Nothing in it is edited, and its training stays the same bit for bit.

    The blocks are found in the first forward pass in training mode, and recorded in that same pass.

    Args:
        model: The module whose `__call__` the training loop uses.
        optimizer: Its optimizer, or several: the update ratio is then measured, for which the
            weights are copied at recorded steps. Parameter gradients are read right before the
            step of whichever optimizer owns them, given here or not; without such a step, at
            `Monitor.step()`.
        blocks: Names or shell patterns of modules to take as the blocks instead of found additions.
        every: Record every `every`-th step.
        record_first: Record each of the first steps, whatever `every` says.
        samples: Samples at the head of the batch on which per-unit quantities (P1-P4, slopes,
            saturation) and the gradient's shares are measured; None for the whole batch. Moments
            and gradient norms always take the whole batch.
        point: Where in the loop parameter gradients are read, one of `catalog.POINTS`; stored with
            the data. By default "local", "unscaled" with a scaler, and "post_clip" once the loop
            is seen to rewrite gradients; see `Monitor.read_gradients`.
        metrics: "full" for all of `catalog.RECORDED`; "core" for `catalog.CORE`, which costs
            a little less.
        reduce: Where several processes train the model together (DDP, `fully_shard`), record the
            numbers of all ranks, the same on each; `attach`, `step` and `close` are then called on
            every rank, and "local" becomes "reduced". False: each rank records its own; under a DDP
            wrapper the parameters' gradients are those of all nevertheless.
        scaler: The loop's `torch.amp.GradScaler`: gradients are recorded without its scale, and
            whether it skipped the step.
        take: Which forward pass of a step to record where there are several (gradient
            accumulation, two views of a batch), "first" or "last".

        example_inputs: Inputs of one forward pass, a tuple or a mapping of keywords, on the model's
            device: the blocks are found at once, and passes that torch.compile runs are recorded
            too. Needed only for those; attach before compiling.

    Returns:
        A `Monitor`: a context manager whose `step()` ends each training step.

    Raises:
        ValueError: A schedule that never records, an unknown point, pass, block or set of
            metrics, a compiled model, or a kind of parallel training that cannot be watched.
        TypeError: The optimizer or the scaler is something else.

    Example:
        >>> from resdiag.models.resnet import build_model
        >>> model = build_model("elu", 8, seed=0)
        >>> with attach(model) as monitor:
        ...     model(torch.ones(4, 3, 32, 32)).square().mean().backward()
        ...     monitor.step()
        >>> monitor
        Monitor(blocks=3, steps=1, closed)
        >>> monitor.to_frame()[["step", "block", "skip_gain"]].values.tolist()
        [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 2.0, 1.0]]
    """
    if every < 1 or record_first < 0:
        raise ValueError(f"every={every} must be at least 1 and record_first={record_first} >= 0")
    if point is not None and point not in POINTS:
        raise ValueError(unknown("point", point, POINTS).message)
    if take not in _TAKES:
        raise ValueError(unknown("forward pass to take", take, _TAKES).message)
    if metrics not in SETS:
        raise ValueError(unknown("set of metrics", metrics, SETS).message)
    inner = unwrap(model)
    if hasattr(model, "_orig_mod") or compiled_parts(model):
        raise ValueError(
            "the model is already compiled and its hooks would silently not fire: "
            "attach to the module before torch.compile, with example_inputs=(...)"
        )
    units = match_modules(inner, blocks)
    if not reduce and is_sharded(inner):
        raise ValueError("reduce=False: the parameters are shards, no rank has a whole gradient")
    ranks = find_ranks(model) if reduce else None
    reduced = ranks is not None or is_reduced(model)
    if metrics == "core" and example_inputs is not None:
        raise ValueError("example_inputs: compiled passes record metrics='full' only")
    if ranks is not None and example_inputs is not None:
        raise ValueError(
            "example_inputs: compiled passes are not reduced over ranks; "
            "attach(..., reduce=False) records each rank by itself"
        )
    monitor = Monitor(
        inner,
        _optimizers(optimizer),
        units,
        lambda step: step < record_first or step % every == 0,
        samples,
        "reduced" if reduced and point in (None, "local") else point,
        ranks,
        LossScale(scaler),
        take_last=take == "last",
        core=metrics == "core",
    )
    if example_inputs is not None:
        monitor.prepare(*example(example_inputs))
    return monitor


def _optimizers(given: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    """One optimizer, several or none as a list."""
    several = given if isinstance(given, Iterable) else [given] if given is not None else []
    optimizers = list(several)
    for optimizer in optimizers:
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"not an optimizer: {type(optimizer).__name__}")
    return optimizers


class Monitor:
    """What `attach` returns: call `step()` at the end of each training step.

    Attributes:
        point: Where gradients are read.
        notes: What could not be watched, in words, without repetition.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        units: frozenset[str] | None,
        schedule: Callable[[int], bool],
        samples: int | None,
        point: str | None,
        ranks: Ranks | None,
        scale: LossScale,
        *,
        take_last: bool,
        core: bool,
    ) -> None:
        self.point = point or ("unscaled" if scale.is_used else "local")
        self.notes: list[str] = []
        self._model, self._optimizers, self._schedule = model, optimizers, schedule
        self._asked, self._loss_scale, self._take_last = point, scale, take_last
        self._own = OwnValues(own_metrics().values())
        self._cells = Buffer((*RECORDED, *self._own.ids), _SLOTS)
        self._head = Buffer(_STEP_COLUMNS, _SLOTS)
        self._ranks, self._pool = ranks, None
        if ranks is not None:
            sharded = ranks.sharded
            self._pool = Pool(self._cells, self._head, ranks.size, sharded=sharded)
        self._recorder = Recorder(
            self._cells,
            self._head,
            samples,
            self._pool,
            self._backward_begins,
            self._own,
            core=core,
        )
        # before the tracer's, or it would enter a sharded module with tensors it does not know
        self._shards = Shards(model, lambda a, b: self._tracer.same(a, b))
        self._tracer = Tracer(model, self._recorder, self._wanted, units)
        self._units, self._samples = units, samples
        self._taps: Taps | None = None
        self._compiled = self._captured = self._hidden = False
        self._steps = OptimizerSteps(model, optimizers, self._before_update, self._after_update)
        self._rewriting = Rewriting()
        self._core = core
        self._norms: dict[str, ParameterNorms] = {}
        self._extra: list[tuple[int, str, Tensor, Tensor]] = []
        self._total = torch.zeros((), dtype=torch.float64)
        self._rates: list[tuple[float, float]] = []
        self._metrics: list[dict[str, NDArray[Any]]] = []
        self._curve: list[dict[str, NDArray[Any]]] = []
        self._listeners: list[Listener] = []
        self._step, self._recorded, self._open = 0, 0, True
        self._paused = self._forward = self._demanded = self._rated = self._stepped_ever = False
        self._begin_step()

    def prepare(self, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        """Find the blocks by one pass over example inputs, and get ready for torch.compile."""
        with self.paused():
            found = find_ports(self._model, inputs, keywords, self._units)
        self._taps = Taps(
            self._model, found, self._recorder, self._cells, self._head, self._samples
        )
        self._taps.arm(on=self._schedule(self._step))

    # -- the loop ------------------------------------------------------------------------------

    def step(self) -> None:
        """End a training step: after backward, and after the optimizer's step if there is one.

        Raises:
            RuntimeError: The monitor is closed.
        """
        if not self._open:
            raise RuntimeError("the monitor is closed; attach again")
        self._check_order()
        self._adopt_hidden()
        if self._forward:
            if self._compiled:
                self._collect()
            self._finish_gradients()
            self._check_backward()
            self._recorder.end()
            self._recorded += 1
        elif self._hidden:
            self._note(_REMEDY)
        elif self._schedule(self._step) and not self._recorder.failure and not self._repeated:
            self._note(
                "a step was due for recording, but no forward pass in training mode went through "
                "the model's __call__: was forward() called directly, the model compiled, or in "
                "eval mode?"
            )
        if self._ranks is not None and self._ranks.is_open and self._schedule(self._step):
            self._meet()
        if self._forward and self._loss_scale.is_used:
            self._divide_scale()
        self._begin_step()
        self._step += 1
        if self._taps is not None:
            self._taps.arm(on=self._schedule(self._step))
        if self._cells.is_full:
            self._flush()

    def read_gradients(self, point: str | None = None) -> None:
        """Read the parameter gradients now instead of right before the optimizer's step.

        For both sides of a clipping, call it before: what the optimizer gets is then recorded as
        well, in columns that end in `_post_clip`. At steps that are not recorded it does nothing.

        Args:
            point: What the loop has done to the gradients so far, one of `catalog.POINTS`. The
                first one read is the monitor's `point` unless `attach` was given one; gradients
                read at other points become columns `grad_param_<point>` and `grad_norm_<point>`.

        Raises:
            ValueError: An unknown point.
        """
        if point is not None and point not in POINTS:
            raise ValueError(unknown("point", point, POINTS).message)
        if point is not None and self._asked is None:
            self.point = self._asked = point
        if self._forward and not self._recorder.failure:
            scaled = self._loss_scale.is_still_on(self._steps.owners())
            self._reading(point or self.point).take(scale=self._loss_scale.now() if scaled else 1.0)

    def listen(self, listener: Listener) -> None:
        """Hand what was recorded to `listener` too whenever it has come to the host.

        Args:
            listener: Called with the columns of `drain()`, those that are new each time; derived
                metrics are not among them. What it raises ends its listening and becomes a note.
        """
        self._listeners.append(listener)

    def demand(self) -> None:
        """Record the next forward pass whatever the schedule says; it belongs to this step.

        Raises:
            RuntimeError: Several ranks record together: one that did not demand it would be missed.
        """
        if self._ranks is not None:
            raise RuntimeError(
                "demand() on one rank would wait for the others: use every= or record_first=, or "
                "attach(..., reduce=False)"
            )
        self._demanded = True

    @property
    def is_recording(self) -> bool:
        """Whether this step's forward pass was recorded."""
        return self._forward

    def start_at(self, step: int) -> None:
        """Count on from `step`, for a resumed training."""
        self._step = step

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore forward passes inside the `with`, e.g. an evaluation in training mode."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def close(self) -> None:
        """Remove every hook; what was recorded stays readable. Safe to call twice."""
        self._tracer.close()
        if self._taps is not None:
            self._taps.close()
        self._shards.close()
        if self._ranks is not None:
            self._ranks.close()
        self._recorder.close()
        self._steps.close()
        self._rewriting.close()
        self._open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "watching" if self._open else "closed"
        return f"Monitor(blocks={len(self.blocks)}, steps={self._recorded}, {state})"

    # -- results -------------------------------------------------------------------------------

    @property
    def blocks(self) -> list[Block]:
        """The blocks found; empty before the first recorded forward pass."""
        return list(self._recorder.anatomy.blocks)

    @property
    def about(self) -> dict[str, Any]:
        """What is watched: names of model and optimizer, steps, device and dtype of the weights."""
        first = next(self._model.parameters(), None)
        return {
            "model": type(self._model).__name__,
            "optimizer": ", ".join(type(optimizer).__name__ for optimizer in self._optimizers),
            "steps": self._step,
            "device": "cpu" if first is None else str(first.device),
            "dtype": "float32" if first is None else str(first.dtype).removeprefix("torch."),
        }

    @property
    def unavailable(self) -> list[dict[str, Any]]:
        """Metrics that are NaN for a reason: `{"metric", "blocks", "reason"}`."""
        missing: list[dict[str, Any]] = [
            {"metric": metric, "blocks": sorted(rows) or "all", "reason": reason}
            for metric, reasons in self._recorder.reasons.items()
            for reason, rows in reasons.items()
        ]
        for metric, reason in self._own.stopped.items():
            missing.append({"metric": metric, "blocks": "all", "reason": f"stopped: {reason}"})
        if not self._optimizers:
            reason = "attach(optimizer=...) is needed to see updates"
            missing.append({"metric": "update_ratio", "blocks": "all", "reason": reason})
        if not self._rated:
            reason = "no optimizer was seen to step in a recorded step"
            for metric in ("head_kick", "lr"):
                missing.append({"metric": metric, "blocks": "all", "reason": reason})
        return missing

    @property
    def own(self) -> list[dict[str, str]]:
        """The own metrics that are recorded, as plain data: id, label, unit, site, ..."""
        return [one.to_dict() for one in self._own.metrics]

    def drain(self) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Take what was recorded since the last drain: per-block columns and per-step columns."""
        self._flush()
        taken = _concatenate(self._metrics), _concatenate(self._curve)
        self._metrics, self._curve = [], []
        return taken

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
        columns = _concatenate(self._metrics if per == "block" else self._curve)
        derived = derive(columns, per_step=per == "step")
        frame = pd.DataFrame({**columns, **derived})
        frame["point"] = pd.Categorical([self.point] * len(frame))
        return frame

    # -- inside --------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        """Nothing has happened yet in this step."""
        self._forward = self._stepped = self._foreign = self._repeated = self._pending = False
        self._updating = self._compiled = self._hidden = False
        self._passes = 0
        self._updates: Counter[int] = Counter()
        self._factor: Tensor | float | None = None
        for norms in self._norms.values():
            norms.forget()

    def _begin_compiled(self, *, whole: bool) -> None:
        """A pass begins of which at least a part runs compiled: its taps record it.

        Where the whole model is compiled, a pass that is not due runs a graph without taps; where
        parts are, theirs always write: a second graph for each could exceed the recompile limit.
        """
        training = not self._paused and self._model.training and torch.is_grad_enabled()
        due = training and (self._demanded or self._schedule(self._step))
        due = due and not self._recorder.failure
        if self._taps is None:
            self._hidden = self._hidden or due
            return
        self._captured = self._captured or is_capturing()
        first = due and not self._forward
        self._taps.begin(on=first if whole else training)
        if first:
            self._open_compiled()
        elif due:
            self._note(
                "several compiled forward passes in one step: the "
                f"{'first' if whole else 'last'} one is recorded"
            )

    def _open_compiled(self) -> None:
        self._forward = self._compiled = True
        self._demanded = self._foreign = False
        self._factor = self._loss_scale.now()
        self._rates.append((math.nan, math.nan))
        self._cells.begin(self._step)
        self._head.begin(self._step)

    def _adopt_hidden(self) -> None:
        """Count a pass whose beginning no hook saw: inside somebody's graph, or a replayed one."""
        hidden, self._tracer.seen.in_graph = self._tracer.seen.in_graph, False
        due = self._schedule(self._step) and not self._paused and not self._recorder.failure
        if self._forward or not due or not (hidden or self._captured):
            return
        if self._taps is None:
            self._hidden = True
        else:
            self._open_compiled()

    def _collect(self) -> None:
        assert self._taps is not None
        try:
            with torch.no_grad():
                self._taps.collect()
        except Exception as error:  # a mistake of ours must not end somebody's training
            self._recorder.failure = f"{type(error).__name__}: {error}"

    def _wanted(self) -> bool:
        """Whether to trace the forward pass that begins: the first of a step that is due."""
        compiled = self._tracer.seen.compiled
        if compiled or is_capturing() or compiled_parts(self._model):
            self._begin_compiled(whole=compiled)
            return False
        if self._taps is not None:
            self._taps.begin(on=False)
        if self._paused or not self._model.training or not torch.is_grad_enabled():
            return False
        self._passes += 1
        if torch._C._functorch.peek_interpreter_stack() is not None:
            self._note(
                "the model ran inside a torch.func transform (grad, vmap), whose tensors hold no "
                "numbers that could be read: not recorded"
            )
            return False
        if self._recorder.failure or not (self._demanded or self._schedule(self._step)):
            return False
        if self._forward and self._recorder.is_whole and not self._replaces():
            return False
        if not self._loss_scale.is_known and casts_to_half():
            self._note(
                "autocast to float16 without scaler=: if a GradScaler scales the loss, gradients "
                "at activations are recorded with its scale; attach(..., scaler=scaler)"
            )
        if not self._forward:
            self._rates.append((math.nan, math.nan))
        self._forward, self._demanded, self._foreign = True, False, False
        self._recorder.begin()
        self._cells.begin(self._step)
        self._head.begin(self._step)
        return True

    def _replaces(self) -> bool:
        """Whether a further forward pass of the step is recorded in place of the one before."""
        if self._stepped and not self._updating:
            return False  # after its own update the model may serve others, as a discriminator
        unused = self._recorder.is_lost or self._foreign or self._is_thrown_away()
        if unused and not self._stepped:
            return True
        take_last = self._take_last and not self._stepped
        which = "last" if take_last else "first"
        self._note(
            f"several forward passes in one step: the {which} one is recorded, its activations and "
            "the gradients of its own loss there; parameter gradients are those that accumulate"
        )
        return take_last

    def _is_thrown_away(self) -> bool:
        """Whether the gradients of the recorded pass were set to None without being used."""
        taken = any(norms.has_taken for norms in self._norms.values())
        cleared = all(p.grad is None for p in self._model.parameters())
        return self._recorder.seen_backward and cleared and not taken

    def _backward_begins(self) -> None:
        """The first gradient of the recorded pass has come: the loss scale is known now."""
        self._factor = self._recorder.factor = self._loss_scale.now()
        blocks = [p for members in self._recorder.anatomy.parameters for p in members]
        self._rewriting.follow([*blocks, *self._model.parameters()])

    # -- updates -------------------------------------------------------------------------------

    def _before_update(self, optimizer: Optimizer, owned: Collection[int] | None) -> None:
        """An optimizer is about to step: read the gradients that it will use."""
        if owned is None:
            self._foreign = True
            return
        self._updates[id(optimizer)] += 1
        if self._updates[id(optimizer)] == 2:
            self._note(
                "the optimizer stepped twice without monitor.step() in between: call it after each "
                "of its steps, or only the first is recorded and steps are counted wrong"
            )
        self._stepped = self._stepped_ever = self._updating = True
        self._adopt_hidden()
        if not self._forward or self._recorder.failure or self._updates[id(optimizer)] > 1:
            return
        inside = self._loss_scale.inside(optimizer)
        self._reading(self._point_before_update()).take(owned, inside)
        group = optimizer.param_groups[0]
        if math.isnan(self._rates[-1][0]):
            self._rates[-1] = float(group["lr"]), float(group.get("momentum", 0.0))
            self._rated = True
        skips = self._loss_scale.skips(optimizer)
        if self._loss_scale.is_used:
            self._write_head("skipped", torch.zeros(()) if skips is None else skips)
        if self._optimizers and not self._pending and not self._core:
            self._reading(self.point).remember()
            self._pending = True

    def _after_update(self, optimizer: Optimizer, owned: Collection[int] | None) -> None:
        """An optimizer has stepped: if it owns all parameters, nothing will move them any more."""
        self._updating = self._updating and owned is None
        if owned is not None and self._pending:
            trained = (p for p in self._model.parameters() if p.requires_grad)
            if all(id(p) in owned for p in trained):
                self._write_updates()

    def _write_updates(self) -> None:
        """Write how far the blocks' parameters moved since they were remembered."""
        self._pending = False
        moved, sizes = self._reading(self.point).updates()
        if moved.numel():
            self._cells.write_column(self._cells.slot, "update_ratio", moved / sizes)
            self._pool_rows("update_ratio", moved / sizes, sizes.square())

    def _point_before_update(self) -> str:
        """The point at which gradients are read now; where the loop rewrote them, `post_clip`."""
        rewritten = self._rewriting.count() > 0
        if not rewritten or self.point == "post_clip" or may_reduce():
            return self.point  # a reduction over ranks is a rewriting as well
        if self._reading(self.point).has_taken:
            return "post_clip"
        self._note(
            "the loop rewrote the gradients (clipped them?) before the optimizer's step: parameter "
            f"gradients are read after that, point 'post_clip' instead of '{self.point}'; call "
            "monitor.read_gradients('pre_clip') before it to have both"
        )
        norms = self._norms.pop(self.point)
        self.point = self._asked = "post_clip"
        self._norms[self.point] = norms
        return self.point

    # -- gradients of parameters ---------------------------------------------------------------

    def _reading(self, point: str) -> ParameterNorms:
        """The norms read at a point."""
        if point not in self._norms:
            anatomy = self._recorder.anatomy
            if not self._norms:
                anatomy.parameters = [self._shards.owned(group) for group in anatomy.parameters]
            parameters = list(self._model.parameters())
            self._norms[point] = ParameterNorms(parameters, anatomy.parameters, self._holders())
        return self._norms[point]

    def _finish_gradients(self) -> None:
        """Complete what is known of the step's gradients and updates, and divide out the scale."""
        skipped = self._loss_scale.is_used and not self._stepped
        known = bool(self._optimizers) and not self._core and not self._recorder.failure
        if self._pending or (skipped and known):
            if not self._pending:
                self._reading(self.point).remember()
            self._write_updates()
        if not self._recorder.failure:
            self._reading(self.point).take()  # a scaler that skipped the step had unscaled them
        self._cells.settle()
        self._write_gradients()
        if skipped:
            self._write_head("skipped", torch.ones(()))

    def _write_gradients(self) -> None:
        """G1 and the total norm, at the monitor's point and at others."""
        if self._recorder.failure:
            return
        for point, norms in self._norms.items():
            per_block, total = norms.gradients()
            if point != self.point:
                if norms.has_taken and self._pool is not None and self._pool.sharded:
                    per_block, total = per_block * math.nan, total * math.nan
                    self._note(
                        "parameters are shards, whose gradients are added up at one point only: "
                        f"grad_param_{point} is NaN; to record that one, attach(..., "
                        f"point='{point}')"
                    )
                if norms.has_taken:
                    self._extra.append((self._step, point, per_block, total))
                continue
            self._total = total
            self._pool_rows("grad_param", per_block, torch.ones_like(per_block))
            if per_block.numel():
                self._cells.write_column(self._cells.slot, "grad_param", per_block)
            self._write_head("grad_norm", total)
            for row in norms.missing():
                self._recorder.miss(row, ("grad_param",), "no parameter of it has a gradient")
            if self._recorder.seen_backward and not norms.has_taken:
                self._note(
                    "no gradient was left when monitor.step() looked for them: was zero_grad() "
                    "called before it?"
                )
        for row, members in enumerate(self._recorder.anatomy.parameters):
            if not members:
                self._recorder.miss(row, ("update_ratio",), "the block has no parameters")

    def _divide_scale(self) -> None:
        """Gradients at activations came with the loss scale; parameters' were read without it."""
        factor = 1.0 if self._factor is None else self._factor
        if self._recorder.anatomy.blocks and not self._recorder.failure:
            self._cells.divide(self._cells.slot, _SCALED, factor)
        self._head.reserve(1, self._device())
        self._head.divide(self._head.slot, ("head_gap",), factor)
        if self._factor is not None:
            self._write_head("grad_scale", torch.as_tensor(factor, dtype=torch.float64))

    def _write_head(self, name: str, value: Tensor) -> None:
        self._head.reserve(1, self._device())
        self._head.write(self._head.slot, 0, name, value)

    def _device(self) -> torch.device:
        return next((p.device for p in self._model.parameters()), torch.device("cpu"))

    def _holders(self) -> int | None:
        """How many ranks hold shards of the parameters; None where each has them whole."""
        if not is_sharded(self._model):
            return None
        return 1 if self._ranks is None else self._ranks.size

    def _pool_rows(self, column: str, values: Tensor, weights: Tensor) -> None:
        """Where a rank has a part of the parameters only, hand a column on to be added up."""
        if self._pool is not None and self._pool.sharded:
            pairs = zip(values.unbind(), weights.unbind(), strict=True)
            for row, (value, weight) in enumerate(pairs):
                self._pool.put(row, column, value, weight)

    def _meet(self) -> None:
        """Let the ranks make the metrics of all from what each has recorded in this step."""
        assert self._ranks is not None
        assert self._pool is not None
        whole = self._forward and not self._recorder.failure
        norm = torch.zeros((), dtype=torch.float64, device=next(self._model.parameters()).device)
        if whole:
            norm = self._total.to(norm.device)
        met = None
        try:
            met = self._ranks.meet(
                self._pool,
                len(self._recorder.anatomy.blocks) if whole else None,
                self._step,
                self._cells.slot,
                norm,
                self._weights,
            )
        except Exception as error:  # training goes on, whatever happened to the record
            self._recorder.failure = str(error) or type(error).__name__
            self._ranks.close()
            self._note(f"watching stopped at step {self._step}: {self._recorder.failure}")
        if not self._forward:
            return
        if met is not None:
            self._keep(*met)
        else:
            self._cells.wipe()
            self._head.wipe()
            if self._ranks.is_open:
                self._note(f"step {self._step} was not recorded by every rank: its numbers are NaN")

    def _keep(self, norm: Tensor, same: Tensor) -> None:
        """Write the gradient norm of all ranks; what was read before the reduction is nobody's."""
        slot = self._cells.slot
        self._head.write(slot, 0, "grad_norm", torch.where(same, norm, math.nan))
        if self._pool is not None and not self._pool.sharded:
            for column in ("grad_param", "update_ratio"):
                read = self._cells.read_column(slot, column)
                self._cells.write_column(slot, column, torch.where(same, read, math.nan))

    def _weights(self) -> Tensor:
        parameters = list(self._model.parameters())
        return ParameterNorms(parameters, [], self._holders()).weights()

    # -- what went wrong -----------------------------------------------------------------------

    def _check_order(self) -> None:
        """Say what is wrong with where `step()` is called."""
        if self._paused:
            return
        updated = any(self._updates.values())
        if not self._passes and not updated and (self._stepped_ever or self._recorded):
            self._repeated = True
            self._note(
                "monitor.step() came without a forward pass since the last one: called twice a "
                "step it counts steps double"
            )
        expected = self._stepped_ever or bool(self._optimizers)
        if self._passes and not updated and expected and not self._loss_scale.is_used:
            self._note(
                "monitor.step() came without a step of the optimizer since the last one: call it "
                "once per update, after optimizer.step(); where a GradScaler skipped the update, "
                "attach(..., scaler=scaler)"
            )

    def _check_backward(self) -> None:
        for metric, reason in self._own.stopped.items():
            self._note(f"own metric '{metric}' stopped: {reason}")
        if self._recorder.failure:
            self._note(
                f"watching stopped at step {self._step} after an error of resdiag, training goes "
                f"on: {self._recorder.failure}"
            )
            return
        if not self._recorder.anatomy.blocks:
            self._note("no residual addition was found: name modules with blocks=[...]")
        elif not self._recorder.seen_backward and not self._compiled:
            self._note("a recorded step had no backward pass through the blocks")
        if self._recorder.repeats:
            self._note("several backward passes reached the blocks: the last one is recorded")
        if self._recorder.strangers:
            self._note("the forward pass took additions that the first one had not: not recorded")
        if self._recorder.skipped:
            shown = ", ".join(self._recorder.skipped[:3])
            self._note(f"blocks of the first pass were left out of a later one, NaN there: {shown}")

    def _note(self, text: str) -> None:
        """Say once what could not be watched."""
        if text not in self.notes:
            self.notes.append(text)
            warnings.warn(f"resdiag: {text}", WatchWarning, stacklevel=3)

    def _flush(self) -> None:
        """Bring the used slots to the host and complete what the host computes."""
        if self._ranks is not None:
            for text in self._ranks.check():
                self._note(text)
        recording = self._forward and self._open
        steps, values = self._cells.flush(keep_open=recording)
        head_steps, head = self._head.flush(keep_open=recording)
        rates, self._rates = self._rates[: len(steps)], self._rates[len(steps) :]
        if not steps:
            return
        rows = len(self._recorder.anatomy.blocks)
        blocks = _block_columns(
            steps, values[:, :rows], self._recorder.anatomy.blocks, self._cells.columns
        )
        curve = _step_columns(head_steps, head, rates) if head_steps else None
        extra = [entry for entry in self._extra if entry[0] in steps]
        self._extra = [entry for entry in self._extra if entry[0] not in steps]
        for step, point, per_block, total in extra:
            where = blocks["step"] == step
            values_of = blocks.setdefault(f"grad_param_{point}", _gap(len(where)))
            values_of[where] = per_block.cpu().numpy()
            if curve is not None:
                curve.setdefault(f"grad_norm_{point}", _gap(len(curve["step"])))[
                    curve["step"] == step
                ] = float(total)
        self._metrics.append(blocks)
        if curve is not None:
            self._curve.append(curve)

        for listener in list(self._listeners):
            try:
                listener(self._metrics[-1], self._curve[-1] if head_steps else {})
            except Exception as error:
                self._listeners.remove(listener)
                self._note(f"{_name(listener)} is no longer told what is recorded: {error!r}")


def _gap(rows: int) -> NDArray[np.float64]:
    return np.full(rows, np.nan)


def _block_columns(
    steps: list[int],
    values: NDArray[np.float64],
    blocks: Sequence[Block],
    names: Sequence[str],
) -> dict[str, NDArray[Any]]:
    """Columns of a flush, with the ratios that need two cells computed on the host."""
    count = values.shape[1]
    columns: dict[str, NDArray[Any]] = {
        "step": np.repeat(np.asarray(steps, dtype=np.int32), count),
        "block": np.tile(np.arange(count, dtype=np.int16), len(steps)),
    }
    cells = {name: values[:, :, i].reshape(-1) for i, name in enumerate(names)}
    sizes = np.tile([math.prod(block.shape) for block in blocks], len(steps))
    with np.errstate(all="ignore"):
        branch, shortcut, output = (
            np.hypot(cells[f"{site}_channel_mean_rms"], cells[f"{site}_channel_std"])
            for site in ("branch", "shortcut", "output")
        )
        cells["branch_ratio"] = branch / shortcut
        cells["elasticity"] = cells["grad_output"] * output * np.sqrt(sizes)
        return columns | {name: cell.astype(np.float32) for name, cell in cells.items()}


def _step_columns(
    steps: list[int], head: NDArray[np.float64], rates: Sequence[tuple[float, float]]
) -> dict[str, NDArray[Any]]:
    """Per-step columns `catalog.RECORDED_PER_STEP`; B3 is put together here."""
    cells = dict(zip(_STEP_COLUMNS, head[:, 0].T, strict=True)) if head.shape[1] else {}
    nan = np.full(len(steps), np.nan)
    lr, momentum = np.asarray(rates, dtype=np.float64).reshape(-1, 2).T
    get: Mapping[str, NDArray[np.float64]] = {name: cells.get(name, nan) for name in _STEP_COLUMNS}
    with np.errstate(all="ignore"):
        squared = get["head_size"] * get["head_channel_mean_rms"] ** 2
        out = {
            "lr": lr,
            "grad_norm": get["grad_norm"],
            "head_mean": get["head_mean"],
            "head_bias": get["head_channel_mean_rms"] / get["head_channel_std"],
            "head_kick": lr * (1 + momentum) * (squared + 1) * get["head_gap"],
        }
    assert tuple(out) == RECORDED_PER_STEP
    if np.isfinite(get["skipped"]).any():
        out |= {name: get[name] for name in ("grad_scale", "skipped")}
    return {"step": np.asarray(steps, dtype=np.int32), **out}


def _name(listener: Listener) -> str:
    return str(getattr(listener, "__qualname__", type(listener).__name__))


def _concatenate(parts: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Join flushes; without any, empty columns."""
    if not parts:
        return {"step": np.empty(0, np.int32), "block": np.empty(0, np.int16)}
    names = dict.fromkeys(name for part in parts for name in part)
    sizes = [len(part["step"]) for part in parts]
    return {
        name: np.concatenate(
            [part.get(name, _gap(n)) for part, n in zip(parts, sizes, strict=True)]
        )
        for name in names
    }
