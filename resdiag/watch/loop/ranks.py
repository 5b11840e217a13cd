"""Several processes that train one model: which of them there are, and how their records meet.

Ranks talk in `Monitor.step()` only, at the steps that the schedule names and no others: the step
count is the same on every rank, while what a rank did in that step (an exception, an evaluation)
need not be. A rank without a record takes part with zeros and says so, so that no rank waits
in vain. Two sums per recorded step, on a process group of our own: a failure there leaves
the order of the training's own collectives alone.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resdiag.watch.base.tensors import mesh_of
from resdiag.watch.loop.gradients import Gradients
from resdiag.watch.loop.parameters import is_sharded
from resdiag.watch.loop.state import State
from resdiag.watch.record.pool import Layout, Pool

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


TIMEOUT = timedelta(minutes=5)
"""How long a rank waits for the others before it stops watching."""

_SAME = 1e-6


class RanksError(RuntimeError):
    """The ranks cannot be watched together; the message says why and what to do."""


def is_reduced(model: nn.Module) -> bool:
    """Whether a model is a wrapper that averages gradients over several ranks."""
    return (
        isinstance(model, DistributedDataParallel) and dist.get_world_size(model.process_group) > 1
    )


def find_ranks(model: nn.Module) -> "Ranks | None":
    """The ranks that train a model together; None for a single process.

    A DDP wrapper knows its process group, a sharded model its mesh; for any other model it is all
    processes. A ValueError where the other ranks did not call `attach` too.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    sharded = is_sharded(model)
    theirs = _group_of(model)
    if dist.get_world_size(theirs) == 1:
        return None
    if theirs is not None and dist.get_world_size(theirs) < dist.get_world_size():
        return Ranks(theirs, own=False, sharded=sharded, wrapper=model)
    try:
        ours: Any = dist.new_group(timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"rank {dist.get_rank()} waited {TIMEOUT.total_seconds():g} s for the others: call "
            "attach on every rank, or attach(..., reduce=False) for the numbers of one rank"
        ) from error
    return Ranks(ours, own=True, sharded=sharded, wrapper=model)


def _group_of(model: nn.Module) -> "ProcessGroup | None":
    """The process group that a model is known to be trained by."""
    if isinstance(model, DistributedDataParallel):
        return model.process_group
    meshes = [mesh for p in model.parameters() if (mesh := mesh_of(p)) is not None]
    if not meshes or meshes[0].size() == dist.get_world_size():
        return None
    if meshes[0].ndim > 1:
        raise ValueError(
            "the parameters' mesh has two dimensions and leaves ranks out: not supported; "
            "fully_shard over all ranks, or over a mesh of one dimension"
        )
    group: ProcessGroup = meshes[0].get_group()
    return group


class Ranks:
    """The ranks of a data-parallel training, as one of them sees them.

    `own` says that the group was made for us, `sharded` that each rank holds a part of the
    parameters only; `wrapper` is the model as it was given to `attach`.
    """

    def __init__(
        self, group: "ProcessGroup", *, own: bool, sharded: bool, wrapper: nn.Module
    ) -> None:
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.sharded = sharded
        self._group: ProcessGroup | None = group
        self._own, self._wrapper = own, wrapper
        self._layout: Layout | None = None
        self._headers: list[tuple[int, Tensor]] = []

    @property
    def is_open(self) -> bool:
        """Whether numbers can be added up."""
        return self._group is not None

    def close(self) -> None:
        """Let go of the process group; safe to call twice, and after all groups are gone."""
        group, self._group = self._group, None
        if self._own and group is not None:
            with suppress(Exception):  # destroy_process_group() came before us
                dist.destroy_process_group(group)

    def meet(
        self,
        pool: Pool,
        rows: int | None,
        step: int,
        slot: int,
        norm: Tensor,
        weights: Callable[[], Tensor],
    ) -> tuple[Tensor, Tensor] | None:
        """Add up the ranks' sums of one step and write the metrics; every rank must call this.

        This rank recorded `rows` blocks, None if nothing; `norm` is its gradient norm, 0-d float64,
        on the device of the model, and `weights` gives the norm of its weights. Returns the
        gradient norm and a 0-d bool: whether all ranks have recorded the step and have the same
        gradients. None if not all ranks have recorded a first step yet; a RanksError if they do not
        train one model together, or one of them did not come.
        """
        if getattr(getattr(self._wrapper, "_join_config", None), "enable", False):
            raise RanksError(
                "under join() ranks run out of steps one by one: give each rank equally many "
                "(DistributedSampler does), or attach(..., reduce=False) for each rank's own"
            )
        layout = None if rows is None else pool.layout(rows)
        if self._layout is None:
            self._layout = self._agree(layout, weights())
        return None if self._layout is None else self._add(pool, layout, step, slot, norm)

    def check(self) -> Iterator[str]:
        """What the meetings since the last call say about the ranks; waits for the device."""
        headers, self._headers = self._headers, []
        for step, header in headers:
            recorded, steps, norms = header.view(self.size, 3).cpu().unbind(1)
            absent = [i for i, flag in enumerate(recorded.tolist()) if not flag]
            present = self.size - len(absent)
            if absent and present:
                yield (
                    f"step {step} was recorded alike by {present} of {self.size} "
                    f"ranks only (not by {_listed(absent)}): its numbers are NaN"
                )
            elif len(set(steps.tolist())) > 1:
                yield "the ranks count different steps: call monitor.step() equally often on each"
            elif not self.sharded and not absent and not _equal(norms):
                yield (
                    "the gradients differ from rank to rank when they are read (under no_sync(), "
                    "or before the reduction?): parameter gradients and updates are NaN"
                )

    def _agree(self, layout: Layout | None, weights: Tensor) -> Layout | None:
        """The layout of all ranks; None if some have recorded nothing yet. Waits for the device."""
        known = (0, 0, 0) if layout is None else (1, layout.digest, layout.rows)
        mine = torch.cat([weights.new_tensor(known), weights.reshape(1)])
        answers = self._sum(self._placed(mine)).view(self.size, 4).cpu()
        recorded, digests, rows, sizes = answers.unbind(1)
        if not recorded.all():
            return None
        if len(set(digests.tolist())) > 1:
            found = ", ".join(f"{int(count)} on rank {i}" for i, count in enumerate(rows.tolist()))
            raise RanksError(
                f"the ranks run different blocks ({found}), as in pipeline parallel training or "
                "where layers are dropped at random: attach(..., reduce=False) records each "
                "rank's own"
            )
        if not self.sharded and not _equal(sizes):
            raise RanksError(
                "the ranks hold different weights, so they do not train one model (is DDP "
                "missing?): attach(..., reduce=False) records each rank's own"
            )
        return layout

    def _add(
        self, pool: Pool, layout: Layout | None, step: int, slot: int, norm: Tensor
    ) -> tuple[Tensor, Tensor]:
        agreed = self._layout
        assert agreed is not None
        same = layout == agreed
        header = self._placed(torch.cat([norm.new_tensor([same, step]), norm.reshape(1)]))
        length = sum(agreed.sizes)
        mine = pool.pack(agreed, norm.device) if same else norm.new_zeros(length)
        header, total = self._sum(torch.cat([header, mine])).split([header.numel(), length])
        spread = pool.spread(agreed, total) if same else norm.new_zeros(len(agreed.sites))
        spreads = self._sum(spread)
        recorded, steps, norms = header.view(self.size, 3).unbind(1)
        valid = (recorded > 0).all() & (steps == step).all()
        if layout is not None:
            pool.write(agreed, total, spreads, valid, slot)
        self._headers.append((step, header))
        if self.sharded:
            return norms.square().sum().sqrt(), valid
        return norm, valid & _equal(norms)

    def _placed(self, mine: Tensor) -> Tensor:
        """One rank's numbers at its own place: the sum over ranks is the list of all."""
        out = mine.new_zeros(self.size, mine.numel())
        out[self.rank] = mine
        return out.view(-1)

    def _sum(self, vector: Tensor) -> Tensor:
        try:
            dist.all_reduce(vector, group=self._group)
        except RuntimeError as error:
            others = [i for i in range(self.size) if i != self.rank]
            raise RanksError(
                f"rank {self.rank} did not meet {_listed(others)} "
                f"({str(error).splitlines()[0]}): call monitor.step() equally often on every "
                "rank, which uneven inputs under join() do not allow, or "
                "attach(..., reduce=False) for each rank's own numbers"
            ) from error
        return vector


def _equal(values: Tensor) -> Tensor:
    """Whether all ranks name one number; NaN or infinity everywhere are one number too."""
    same = values.amax() - values.amin() <= _SAME * values.abs().amax()
    return same | values.isnan().all() | values.isposinf().all()


def _listed(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


class RankReduction:
    """Replaces, at the end of a step, what one rank has recorded by the numbers of all ranks."""

    def __init__(self, ranks: Ranks, pool: Pool, state: State, gradients: Gradients) -> None:
        self._ranks, self._pool, self._now = ranks, pool, state.now
        self._recorder, self._guard = state.recorder, state.recorder.guard
        self._cells, self._head = state.record.cells, state.record.head
        self._gradients, self._warnings = gradients, state.warnings

    def check(self) -> None:
        """Warn of what past meetings tell of the ranks; waits for the device."""
        for text in self._ranks.check():
            self._warnings.say(text)

    def close(self) -> None:
        """Let go of the ranks."""
        self._ranks.close()

    def meet(self) -> None:
        """Let the ranks make the metrics of all from what each has recorded in this step."""
        if not self._ranks.is_open:
            return
        whole = self._now.forward and not self._guard.failure
        rows = len(self._recorder.anatomy.blocks) if whole else None
        norm = self._gradients.total if whole else torch.zeros((), dtype=torch.float64)
        norm = norm.to(self._gradients.device())
        step, slot, met = self._now.number, self._cells.slot, None
        try:
            met = self._ranks.meet(self._pool, rows, step, slot, norm, self._gradients.weights)
        except Exception as error:  # training goes on without the record
            self._guard.failure = str(error) or type(error).__name__
            self._ranks.close()
            self._warnings.say(f"watching stopped at step {step}: {self._guard.failure}")
        if met is not None and self._now.forward:
            self._keep(slot, *met)
        elif self._now.forward:
            self._cells.wipe()
            self._head.wipe()
            if self._ranks.is_open:
                self._warnings.say(
                    f"step {step} was not recorded by every rank: its numbers are NaN"
                )

    def _keep(self, slot: int, norm: Tensor, same: Tensor) -> None:
        """Write the gradient norm of all ranks; NaN if they had not the `same` gradients."""
        self._head.write(slot, 0, "grad_norm", torch.where(same, norm, math.nan))
        if not self._pool.sharded:
            for column in ("grad_param", "update_ratio"):
                read = self._cells.read_column(slot, column)
                self._cells.write_column(slot, column, torch.where(same, read, math.nan))
