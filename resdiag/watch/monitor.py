"""`attach`: watch the residual blocks of a model while it trains."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from resdiag.watch.blocks import Block, match_modules
from resdiag.watch.buffer import Buffer
from resdiag.watch.catalog import POINTS, RECORDED, RECORDED_PER_STEP, derive
from resdiag.watch.distributed import Ranks, find_ranks, unwrap
from resdiag.watch.parameters import ParameterNorms
from resdiag.watch.pool import Pool
from resdiag.watch.recorder import HEAD, Recorder
from resdiag.watch.shards import Shards, is_sharded
from resdiag.watch.tracer import Tracer

if TYPE_CHECKING:
    import pandas as pd

Listener: TypeAlias = Callable[[dict[str, NDArray[Any]], dict[str, NDArray[Any]]], object]
"""Is told per-block and per-step columns."""

_STEP_COLUMNS = (*HEAD, "grad_norm")
_SLOTS = 16


class WatchWarning(UserWarning):
    """Something could not be watched; the run goes on."""


def attach(
    model: nn.Module,
    *,
    optimizer: Optimizer | None = None,
    blocks: Sequence[str] | None = None,
    every: int = 1,
    record_first: int = 0,
    samples: int | None = 4,
    point: str = "local",
    reduce: bool = True,
) -> "Monitor":
    """Start watching a model. Nothing in it is edited, and its training stays the same bit for bit.

    The blocks are found in the first forward pass in training mode, and recorded in that same pass.

    Args:
        model: The module whose `__call__` the training loop uses.
        optimizer: Its optimizer: parameter gradients are then read right before each of its steps,
            the update ratio is measured, and the learning rate is known. Without it, gradients are
            read at `Monitor.step()`.
        blocks: Names or shell patterns of modules to take as the blocks instead of found additions.
        every: Record every `every`-th step.
        record_first: Record each of the first steps, whatever `every` says.
        samples: Samples at the head of the batch on which per-unit quantities (P1-P4, slopes,
            saturation) and the gradient's shares are measured; None for the whole batch. Moments
            and gradient norms always take the whole batch.
        point: Where in the loop gradients are read, one of `catalog.POINTS`; stored with the data.
        reduce: Where several processes train the model together (DDP, `fully_shard`), record the
            numbers of all ranks, the same on each; `attach`, `step` and `close` are then called on
            every rank, and "local" becomes "reduced". False: each rank records its own.

    Returns:
        A `Monitor`: a context manager whose `step()` ends each training step.

    Raises:
        ValueError: A schedule that never records, an unknown point or block, a compiled model, or
            a kind of parallel training that cannot be watched.

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
    if point not in POINTS:
        raise ValueError(f"unknown point '{point}'; known: {', '.join(POINTS)}")
    inner = unwrap(model)
    if any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in (model, inner)
    ):
        raise ValueError(
            "the model is already compiled and its hooks would silently not fire: "
            "attach to the module before torch.compile"
        )
    units = match_modules(inner, blocks)
    if not reduce and is_sharded(inner):
        raise ValueError("reduce=False: the parameters are shards, no rank has a whole gradient")
    ranks = find_ranks(model) if reduce else None
    return Monitor(
        inner,
        optimizer,
        units,
        lambda step: step < record_first or step % every == 0,
        samples,
        "reduced" if ranks is not None and point == "local" else point,
        ranks,
    )


class Monitor:
    """What `attach` returns: call `step()` at the end of each training step.

    Attributes:
        point: Where gradients are read.
        notes: What could not be watched, in words, without repetition.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        units: frozenset[str] | None,
        schedule: Callable[[int], bool],
        samples: int | None,
        point: str,
        ranks: Ranks | None = None,
    ) -> None:
        self.point = point
        self.notes: list[str] = []
        self._model, self._optimizer, self._schedule = model, optimizer, schedule
        self._cells, self._head = Buffer(RECORDED, _SLOTS), Buffer(_STEP_COLUMNS, _SLOTS)
        self._ranks, self._pool = ranks, None
        if ranks is not None:
            sharded = ranks.sharded
            self._pool = Pool(self._cells, self._head, ranks.size, sharded=sharded)
        self._recorder = Recorder(self._cells, self._head, samples, self._pool)
        # before the tracer's, or it would enter a sharded module with tensors it does not know
        self._shards = Shards(model, lambda a, b: self._tracer.same(a, b))
        self._tracer = Tracer(model, self._recorder, self._wanted, units)
        self._norms: ParameterNorms | None = None
        self._rates: list[tuple[float, float]] = []
        self._metrics: list[dict[str, NDArray[Any]]] = []
        self._curve: list[dict[str, NDArray[Any]]] = []
        self._listeners: list[Listener] = []
        self._step, self._recorded, self._open = 0, 0, True
        self._paused = self._forward = self._read = self._demanded = False
        self._handles = [] if optimizer is None else self._follow(optimizer)

    # -- the loop ------------------------------------------------------------------------------

    def step(self) -> None:
        """End a training step: after backward, and after the optimizer's step if there is one.

        Raises:
            RuntimeError: The monitor is closed.
        """
        if not self._open:
            raise RuntimeError("the monitor is closed; attach again")
        if self._forward:
            if not self._read:
                self._read_gradients()
            self._check_backward()
            self._cells.settle()
            self._recorder.end()
            self._recorded += 1
        elif self._schedule(self._step) and not self._recorder.failure:
            self._note(
                "a step was due for recording, but no forward pass in training mode went through "
                "the model's __call__: was forward() called directly, the model compiled, or in "
                "eval mode?"
            )
        if self._ranks is not None and self._ranks.is_open and self._schedule(self._step):
            self._meet()
        self._forward = self._read = False
        self._step += 1
        if self._cells.is_full:
            self._flush()

    def read_gradients(self) -> None:
        """Read the parameters' gradients now, and not again at the optimizer's step.

        For loops that do something to them in between: call it after the backward pass (and after
        unscaling), before clipping. A second call in one step, or one in a step that is not
        recorded, does nothing.
        """
        if not self._forward or self._read or not self._open:
            return
        self._read_gradients()
        if self._optimizer is not None and self._norms is not None:
            self._norms.remember()

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
        self._shards.close()
        if self._ranks is not None:
            self._ranks.close()
        self._recorder.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
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
    def unavailable(self) -> list[dict[str, Any]]:
        """Metrics that are NaN for a reason: `{"metric", "blocks", "reason"}`."""
        missing: list[dict[str, Any]] = [
            {"metric": metric, "blocks": sorted(rows) or "all", "reason": reason}
            for metric, reasons in self._recorder.reasons.items()
            for reason, rows in reasons.items()
        ]
        if self._optimizer is None:
            reason = "attach(optimizer=...) is needed to see updates and the learning rate"
            for metric in ("update_ratio", "head_kick", "lr"):
                missing.append({"metric": metric, "blocks": "all", "reason": reason})
        return missing

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

    def _wanted(self) -> bool:
        """Whether to trace the forward pass that begins: the first of a step that is due."""
        due = not self._paused and self._model.training and torch.is_grad_enabled()
        due = due and not self._recorder.failure
        if not due or not (self._demanded or self._schedule(self._step)):
            return False
        if self._forward and self._recorder.is_whole:
            self._note("several forward passes in one step: the first one is recorded")
            return False
        if not self._forward:
            self._rates.append((math.nan, math.nan))
        self._forward, self._demanded = True, False
        self._recorder.begin()
        self._cells.begin(self._step)
        self._head.begin(self._step)
        return True

    def _follow(self, optimizer: Optimizer) -> list[Any]:
        """Read gradients right before the optimizer's step and updates right after."""

        def before(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # with a closure the backward pass is still to come: what is there is of another pass
            if not any(callable(value) for value in (*args[1:], *kwargs.values())):
                self.read_gradients()

        def after(*_: object) -> None:
            if self._forward and not self._read:
                reason = "the optimizer's step ran the backward pass: read_gradients() comes first"
                for row in range(len(self._recorder.anatomy.blocks)):
                    self._recorder.miss(row, ("update_ratio",), reason)
                self._read_gradients()
            elif self._forward and self._norms is not None:
                moved, sizes = self._norms.updates()
                if moved.numel():
                    self._cells.write_column(self._cells.slot, "update_ratio", moved / sizes)
                    self._pool_rows("update_ratio", moved / sizes, sizes.square())

        return [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
        ]

    def _read_gradients(self) -> None:
        """G1 and the total norm of the gradients that are there now."""
        anatomy = self._recorder.anatomy
        if self._norms is None:
            anatomy.parameters = [self._shards.owned(group) for group in anatomy.parameters]
            parameters = list(self._model.parameters())
            held_by = self._holders()
            self._norms = ParameterNorms(parameters, anatomy.parameters, held_by)
        per_block, total = self._norms.gradients()
        self._total = total
        self._pool_rows("grad_param", per_block, torch.ones_like(per_block))
        if anatomy.blocks:
            self._cells.write_column(self._cells.slot, "grad_param", per_block)
        for row, members in enumerate(anatomy.parameters):
            if all(p.grad is None for p in members):
                self._recorder.miss(row, ("grad_param",), "no parameter of it has a gradient")
            if not members:
                self._recorder.miss(row, ("update_ratio",), "the block has no parameters")
        self._head.reserve(1, total.device)
        self._head.write(self._head.slot, 0, "grad_norm", total)
        if self._optimizer is not None:
            group = self._optimizer.param_groups[0]
            self._rates[-1] = float(group["lr"]), float(group.get("momentum", 0.0))
        self._read = True

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

    def _check_backward(self) -> None:
        if self._recorder.failure:
            self._note(
                f"watching stopped at step {self._step} after an error of resdiag, training goes "
                f"on: {self._recorder.failure}"
            )
            return
        if not self._recorder.anatomy.blocks:
            self._note("no residual addition was found: name modules with blocks=[...]")
        elif not self._recorder.seen_backward:
            self._note("a recorded step had no backward pass through the blocks")
        if self._recorder.repeats:
            self._note("several backward passes reached the blocks: the last one is recorded")
        if self._recorder.strangers:
            self._note("the forward pass took additions that the first one had not: not recorded")

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
        self._metrics.append(_block_columns(steps, values[:, :rows], self._recorder.anatomy.blocks))
        if head_steps:
            self._curve.append(_step_columns(head_steps, head, rates))
        for listener in list(self._listeners):
            try:
                listener(self._metrics[-1], self._curve[-1] if head_steps else {})
            except Exception as error:
                self._listeners.remove(listener)
                self._note(f"{_name(listener)} is no longer told what is recorded: {error!r}")


def _block_columns(
    steps: list[int], values: NDArray[np.float64], blocks: Sequence[Block]
) -> dict[str, NDArray[Any]]:
    """Columns of a flush, with the ratios that need two cells computed on the host."""
    count = values.shape[1]
    columns: dict[str, NDArray[Any]] = {
        "step": np.repeat(np.asarray(steps, dtype=np.int32), count),
        "block": np.tile(np.arange(count, dtype=np.int16), len(steps)),
    }
    cells = {name: values[:, :, i].reshape(-1) for i, name in enumerate(RECORDED)}
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
    return {"step": np.asarray(steps, dtype=np.int32), **out}


def _name(listener: Listener) -> str:
    return str(getattr(listener, "__qualname__", type(listener).__name__))


def _concatenate(parts: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Join flushes; without any, empty columns."""
    if not parts:
        return {"step": np.empty(0, np.int32), "block": np.empty(0, np.int16)}
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
