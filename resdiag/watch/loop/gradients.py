"""Gradients and updates of a model's parameters: when they are read, and at which point."""

import math
import weakref
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from resdiag.watch.loop.moments import Moments
from resdiag.watch.loop.parameters import ParameterNorms, Shards, is_sharded, may_reduce
from resdiag.watch.loop.state import State
from resdiag.watch.record.pool import Pool
from resdiag.watch.record.sets import Sets

_SCALED = ("grad_input", "grad_sum", "grad_output")


class Gradients:
    """Reads the gradients of a model's parameters into the record, and how far they move.

    `point` says where in the loop, `rated` whether a learning rate was seen; `total` is the norm of
    all gradients in the last step that was finished, 0-d float64.
    """

    def __init__(
        self,
        state: State,
        shards: Shards,
        pool: Pool | None,
        point: str | None,
        *,
        ranks: int,
        updates: bool,
        sets: Sets,
    ) -> None:
        self._sets, self._moments = sets, Moments(sets)
        self.point = point or ("unscaled" if state.scale.is_used else "local")
        self.rated = False
        self.total = torch.zeros((), dtype=torch.float64)
        self._model, self._step, self._scale = state.model, state.now, state.scale
        self._recorder, self._record, self._warnings = state.recorder, state.record, state.warnings
        self._shards, self._ranks, self._pool = shards, ranks, pool
        self._asked, self._wants_updates = point, updates
        self._clipping = Clipping(self._arrives)
        self._has_arrived = False
        self._norms: dict[str, ParameterNorms] = {}

    @property
    def has_taken(self) -> bool:
        """Whether a gradient was read in this step."""
        return any(norms.has_taken for norms in self._norms.values())

    def forget(self) -> None:
        """Begin a step: nothing has been read."""
        self._has_arrived = False
        self._moments.begin()
        for known in self._norms.values():
            known.forget()

    def close(self) -> None:
        """Remove the hook on a parameter."""
        self._clipping.close()

    def read(self, point: str | None, owners: Collection[int]) -> None:
        """Read now what the step of these optimizers would read; see `Monitor.read_gradients`."""
        if point is not None and self._asked is None:
            self.point = self._asked = point
        if self._step.forward and not self._recorder.guard.failure:
            scale = self._scale.now() if self._scale.is_still_on(owners) else 1.0
            self._norms_at(point or self.point).take(scale=scale)

    def backward_begins(self) -> None:
        """The first gradient of the recorded pass has come: the loss scale is known now."""
        self._step.factor = self._recorder.backward.factor = self._scale.now()
        if self._clipping.parameter is None:
            blocks = [p for members in self._recorder.anatomy.parameters for p in members]
            self._clipping.follow([*blocks, *self._model.parameters()])

    def before_update(self, optimizer: Optimizer, owned: Collection[int]) -> None:
        """An optimizer is about to make its first step: read the gradients that it will use."""
        self._norms_at(self._point_before_update()).take(owned, self._scale.inside(optimizer))
        self.rated |= self._record.rate(optimizer.param_groups)
        if self._scale.is_used:
            skips = self._scale.skips(optimizer)
            self._write_head("skipped", torch.zeros(()) if skips is None else skips)
        if self._follows_updates() and not self._step.pending:
            self._norms_at(self.point).remember()
            self._step.pending = True

    def after_update(self, optimizer: Optimizer, owned: Collection[int], *, again: bool) -> None:
        """An optimizer has stepped, perhaps `again` in the same step.

        If it owns all parameters, nothing will move them any more.
        """
        if self._step.forward and not again:
            self._moments.read(optimizer, self._recorder.anatomy)
        trained = (p for p in self._model.parameters() if p.requires_grad)
        if self._step.pending and all(id(p) in owned for p in trained):
            self._write_updates()

    def _write_updates(self) -> None:
        """Write how far the blocks' parameters moved since they were remembered."""
        self._step.pending = False
        moved, sizes = self._norms_at(self.point).updates()
        if self._wants_updates:
            self._write_rows("update_ratio", moved / sizes, sizes.square())
        if self._sets.is_due("optimizer"):
            for row, members in enumerate(self._recorder.anatomy.parameters):
                if members:
                    count = sum(p.numel() for p in members)
                    self._sets.put(row, {"update_size": moved[row] / math.sqrt(count)})

    def _follows_updates(self) -> bool:
        """Whether how far parameters move is measured in this step."""
        return self._wants_updates or self._sets.is_due("optimizer")

    def _point_before_update(self) -> str:
        """The point at which gradients are read now; where the loop rewrote them, `post_clip`."""
        if not self._clipping.was_seen() or self.point == "post_clip" or may_reduce():
            return self.point  # a reduction over ranks rewrites gradients as well
        if self._norms_at(self.point).has_taken:
            return "post_clip"
        self._warnings.say(
            "the loop rewrote the gradients (by clipping?) before the optimizer's step: parameter "
            f"gradients are read after that, point 'post_clip' instead of '{self.point}'; call "
            "monitor.read_gradients('pre_clip') before it to have both"
        )
        self._norms["post_clip"] = self._norms.pop(self.point)
        self.point = self._asked = "post_clip"
        return self.point

    def finish(self) -> None:
        """Complete what is known of the step's gradients and updates."""
        skipped = self._scale.is_used and not self._step.stepped
        works = not self._recorder.guard.failure
        if skipped and works and self._follows_updates() and not self._step.pending:
            self._norms_at(self.point).remember()
            self._step.pending = True
        if self._step.pending:
            self._write_updates()
        if works:
            self._norms_at(self.point).take()  # a scaler that skipped the step had unscaled them
        self._record.cells.settle()
        if works:
            self._write()
            self._moments.write(len(self._recorder.anatomy.blocks))
        if self._step.passes > 1 and self._step.follows:  # zeroed between the passes, perhaps
            self._write_head("grad_kept", torch.full((), math.nan, device=self.device()))
        if skipped:
            self._write_head("skipped", torch.ones(()))

    def _arrives(self, parameter: nn.Parameter) -> None:
        """The first gradient of a parameter comes in this step: what was there before is left."""
        alone = self._step.forward and self._step.passes == 1 and self._pool is None
        if self._has_arrived or not alone or not self._step.follows:
            return
        self._has_arrived, left = True, parameter.grad
        if left is None or left.is_sparse:
            kept = torch.zeros((), dtype=torch.float64, device=self.device())
        else:
            kept = torch.linalg.vector_norm(left.detach(), dtype=torch.float32).double()
        self._write_head("grad_kept", kept)

    def divide_scale(self) -> None:
        """Gradients at activations came with the loss scale; parameters' were read without it."""
        factor = 1.0 if self._step.factor is None else self._step.factor
        cells, head = self._record.cells, self._record.head
        if self._recorder.anatomy.blocks and not self._recorder.guard.failure:
            cells.divide(cells.slot, _SCALED, factor)
        head.reserve(1, self.device())
        head.divide(head.slot, ("head_gap", "head_factor"), factor)
        if self._step.factor is not None:
            self._write_head("grad_scale", torch.as_tensor(factor, dtype=torch.float64))

    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self._model.parameters()), torch.device("cpu"))

    def weights(self) -> Tensor:
        """Norm of all parameters, 0-d float64."""
        return ParameterNorms(list(self._model.parameters()), [], self._holders()).weights()

    def _write(self) -> None:
        """G1 and the total norm, at the monitor's point and at others."""
        guard, norms = self._recorder.guard, self._norms_at(self.point)
        for point, others in self._norms.items():
            if point != self.point and others.has_taken:
                self._write_further(point, others)
        per_block, self.total = norms.gradients()
        self._write_rows("grad_param", per_block, torch.ones_like(per_block))
        self._write_head("grad_norm", self.total)
        for row, members in enumerate(self._recorder.anatomy.parameters):
            if not members:
                guard.miss(row, ("update_ratio",), "the block has no parameters")
        for row in norms.missing():
            guard.miss(row, ("grad_param",), "no parameter of it has a gradient")
        if self._recorder.backward.seen and not norms.has_taken:
            self._warnings.say(
                "no gradient was left when monitor.step() looked for them: was zero_grad() "
                "called before it?"
            )

    def _write_further(self, point: str, norms: ParameterNorms) -> None:
        per_block, total = norms.gradients()
        if self._pool is not None and self._pool.sharded:
            per_block, total = per_block * math.nan, total * math.nan
            self._warnings.say(
                "parameters are shards, whose gradients are added up at one point only: "
                f"grad_param_{point} is NaN; to record it, attach(..., grad_read_point='{point}')"
            )
        self._record.add(self._step.number, point, per_block, total)

    def _norms_at(self, point: str) -> ParameterNorms:
        """The norms that were read at a point."""
        if point not in self._norms:
            anatomy = self._recorder.anatomy
            if not self._norms:
                anatomy.parameters = [self._shards.owned(group) for group in anatomy.parameters]
            parameters = list(self._model.parameters())
            self._norms[point] = ParameterNorms(parameters, anatomy.parameters, self._holders())
        return self._norms[point]

    def _holders(self) -> int | None:
        """How many ranks hold shards of the parameters; None where each has them whole."""
        return self._ranks if is_sharded(self._model) else None

    def _write_rows(self, column: str, values: Tensor, weights: Tensor) -> None:
        """Write a column; where a rank has shards of the parameters only, let the ranks add it."""
        if values.numel():
            self._record.cells.write_column(self._record.cells.slot, column, values)
        if self._pool is not None and self._pool.sharded:
            pairs = zip(values.unbind(), weights.unbind(), strict=True)
            for row, (value, weight) in enumerate(pairs):
                self._pool.put(row, column, value, weight)

    def _write_head(self, name: str, value: Tensor) -> None:
        self._record.write_head(name, value, self.device())


class Clipping:
    """Sees whether the loop rewrote the gradients, without any operation on the device.

    A clipped gradient is changed in place, which torch counts in its version. Of one parameter the
    version right after the last accumulation and that right before the step are compared.
    `arrives` is called with that parameter right before each accumulation.
    """

    def __init__(self, arrives: Callable[[nn.Parameter], None]) -> None:
        self.parameter: nn.Parameter | None = None  # the one that was chosen
        # a parameter's hooks live in C++, where Python's collector sees no cycle
        self._arrives = weakref.WeakMethod(arrives)
        self._handles: list[RemovableHandle] = []
        self._fresh: tuple[int, int] | None = None

    def follow(self, parameters: Iterable[nn.Parameter]) -> None:
        """Choose the first parameter that gets a gradient."""
        self.parameter = next((p for p in parameters if p.requires_grad and p.is_leaf), None)
        if self.parameter is not None:
            self._handles = [
                self.parameter.register_hook(self._arriving),
                self.parameter.register_post_accumulate_grad_hook(self._accumulated),
            ]

    def close(self) -> None:
        """Remove the hook; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def was_seen(self) -> bool:
        """Whether the gradient was changed, or replaced, since it was accumulated."""
        grad = None if self.parameter is None else self.parameter.grad
        return grad is not None and self._fresh not in (None, (id(grad), grad._version))

    def _arriving(self, g: Tensor) -> None:
        arrives = self._arrives()
        if arrives is not None and self.parameter is not None:
            arrives(self.parameter)

    def _accumulated(self, parameter: torch.Tensor) -> None:
        grad = parameter.grad
        self._fresh = None if grad is None else (id(grad), grad._version)
