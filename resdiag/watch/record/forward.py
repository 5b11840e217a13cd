"""An observer that measures the tensors of one pass and writes them into the buffer.

Who tells is an observer's affair: a `TracedPass` that follows every operation, or a `TappedPass`
whose hooks stand at the places of a plan. Gradients are `Backward`'s.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from resdiag.catalog.custom import CustomValues
from resdiag.catalog.set_metrics import EXTREME_SITES
from resdiag.catalog.table import CORE, RECORDED
from resdiag.watch.base.functions import Call
from resdiag.watch.base.safety import Guard, guarded
from resdiag.watch.base.tensors import TensorTable
from resdiag.watch.find.additions import Addition
from resdiag.watch.find.blocks import Anatomy
from resdiag.watch.find.passes import Observer, Operands
from resdiag.watch.find.units import Unit
from resdiag.watch.measure.changes import Saturation
from resdiag.watch.measure.extremes import describe_logits, extremes
from resdiag.watch.measure.skip_path import COLUMNS, SkipPath
from resdiag.watch.record.backward import Backward
from resdiag.watch.record.buffer import Buffer, Key
from resdiag.watch.record.pool import Pool
from resdiag.watch.record.sets import Sets
from resdiag.watch.record.sites import SITE_COLUMNS, Head, Parts, Sites
from resdiag.watch.record.unit_tensors import UnitTensors

NO_ADDITION = (
    *(column for site in ("branch", "shortcut", "sum") for column in SITE_COLUMNS[site]),
    "grad_sum",
    "shortcut_share",
    *COLUMNS,
)
"""The columns that a block without an addition does not have."""

OTHER_PASS = "the forward pass of a step was not the one that had been traced"
_NO_ADDITION = "the block has no residual addition"
_NOT_CORE = "not in the core set: attach(metrics='full') records it"


class Recorder(Observer):
    """The observer that records one forward and backward pass.

    The columns of `cells`, per block, are `catalog.table.RECORDED`; those of `head`, per step,
    begin with `catalog.columns.HEAD_CELLS`. `pool` takes what several ranks must add up.

    The pass `is_whole` when it has ended as it should. `unplanned` counts its additions that the
    first one had not, `skipped` has blocks of the first one that it did not run; the blocks are
    `fixed` when they are known.
    """

    def __init__(
        self,
        cells: Buffer,
        head: Buffer,
        guard: Guard,
        samples: int | None,
        pool: Pool | None = None,
        custom: CustomValues | None = None,
        *,
        core: bool = False,
        moments: int | None = None,
        sets: Sets | None = None,
    ) -> None:
        self._sets = sets
        self.guard, self.custom = guard, custom or CustomValues(())
        self.sites = Sites(cells, pool, moments, guard.miss)
        self.skip = SkipPath(samples, core=core)
        self.skip.weigh = None if pool is None else pool.skip
        self.head = Head(head, pool, guard.reasons)
        self._known = TensorTable[Key](versioned=True)
        self._custom_sites = self.custom.sites()
        self._cells, self._pool, self._saturation = cells, pool, Saturation()
        self.is_core, self.fixed = core, False
        self.is_whole, self.unplanned = False, 0
        self.skipped: list[str] = []
        self.parts = parts = Parts(
            cells, self.sites, self._known, self.custom, guard, pool, samples, moments, core
        )
        self.backward = Backward(parts, self.head)
        self._units = UnitTensors(parts, self.backward)
        if core:
            for column in set(RECORDED) - set(CORE):
                guard.reasons[column][_NOT_CORE] = set()
            for name in self.custom.at(("input", "sum", "grad_input", "grad_sum")):
                guard.reasons[name][_NOT_CORE] = set()
        self.end()

    @property
    def anatomy(self) -> Anatomy:
        """The blocks."""
        return self.sites.anatomy

    @property
    def is_lost(self) -> bool:
        """Whether the pass's graph is gone: no backward pass will ever come through it."""
        return self.is_whole and not self.backward.seen and self.backward.is_gone

    def adopt(self, anatomy: Anatomy) -> None:
        """Take blocks that were found beforehand."""
        self.sites.anatomy, self.fixed = anatomy, bool(anatomy.blocks)

    def begin(self) -> None:
        """Begin a forward pass into the buffer's open slot."""
        self.end()
        if self._pool is not None:
            self._pool.begin()
        self.backward.begin()
        self.is_whole, self.unplanned, self.skipped = False, 0, []

    def end(self) -> None:
        """Let go of the pass."""
        self.backward.end()
        self.skip.reset()
        self.sites.clear()
        self._known.clear()
        self._saturation.clear()
        self._ran: set[int] = set()
        self._units.clear()

    def close(self) -> None:
        """Let go of everything; nothing comes any more."""
        self.end()
        self.skip.forget()

    @guarded
    def started(self, inputs: Sequence[Tensor]) -> None:
        """Measure the batch that goes in."""
        self.head.batch(inputs)

    @guarded
    def operands(self, addition: Addition, tensors: Operands) -> None:
        """Measure F(x), h(x) and x before an in-place addition overwrites one of them."""
        row = self._row(addition, tensors.branch.device)
        if row is None:
            return
        branch = _scaled(_spread(tensors.branch, tensors.shortcut), addition.branch_scale)
        if addition.extends:  # a parallel branch joins: branch and sum are measured again
            self.sites.forget(row, ("branch", "sum"))
            self.backward.unhook_sum(row)
            self._measure(row, "branch", branch, keep=False)
            return
        shortcut = _scaled(tensors.shortcut, addition.shortcut_scale)
        self._measure(row, "branch", branch, keep=False)
        self._measure(row, "shortcut", shortcut, keep=shortcut is tensors.shortcut)
        if self.is_core:
            return
        x = tensors.origin
        source = self._source(row, x)
        if x is not None:
            self._measure(row, "input", x)
            self.backward.watch_input(row, x)
        else:
            missing = (*SITE_COLUMNS["input"], "grad_input", "shortcut_share")
            self.guard.miss(row, missing, "the block's input was freed before its addition")
        self.backward.watch_shortcut(row, addition, tensors)
        scale, stage = addition.shortcut_scale, self.anatomy.blocks[row].stage
        joined = row == 0 or bool(source)
        self.skip.open(
            row, x, shortcut, addition.path, scale, stage=stage,
            projected=addition.kind == "projection", joined=joined, source=source,
        )  # fmt: skip

    @guarded
    def added(self, addition: Addition, total: Tensor) -> None:
        """Measure the sum; keep its first samples for what the after-add will do to them."""
        row = self.anatomy.rows.get(addition.key)
        if row is None:
            return
        bare = self.fixed and self.anatomy.blocks[row].after_add == "none"
        if bare and self.is_core:
            self.skip.pass_by(row)
        else:
            self.skip.add(row, total)
        if not self.is_core:
            self._measure(row, "sum", total, is_sum=True)
            self.backward.hook(total, row, "grad_sum")

    @guarded
    def closed(self, addition: Addition, output: Tensor) -> None:
        """Measure the output and what the after-add did."""
        row = self.anatomy.rows.get(addition.key)
        if row is None:
            return
        if not self.fixed:
            self.anatomy.finish(row, addition.after, addition.parameters)
        self.skip.close(row, output, addition.after)
        self._measure(row, "output", output, is_sum=not addition.after)
        self._ran.add(row)
        if addition.after or self.is_core:
            self.backward.hook(output, row, "grad_output")
        else:
            self.backward.end_at_sum(row)
        if not self.is_core:
            self._saturation.assign(row, addition.activations)

    @guarded
    def activation(self, call: Call, x: Tensor) -> None:
        """Remember which units of an activation are saturated, for the block it is in."""
        if not self.is_core and x.is_floating_point() and x.numel():
            self._saturation.add(call, self.skip.head(x))

    @guarded
    def same(self, old: Tensor, new: Tensor) -> None:
        """What was measured of a tensor holds for its equal."""
        if (known := self._known.get(old)) is not None:
            self._known.set(new, known)

    @guarded
    def passing(self, number: int, x: Tensor, features: int | None) -> None:
        """Measure what may be a unit's input or output, and hook its gradient."""
        self._units.measure(number, x, features, settled=self.fixed)

    @guarded
    def dismiss(self) -> None:
        """No candidate tensor belongs to a unit."""
        self._units.dismiss()

    @guarded
    def unit(self, unit: Unit) -> None:
        """Measure a module that is a block without an addition: input and output only."""
        key = (unit.owner, unit.ordinal)
        if key not in self.anatomy.rows:
            if self.fixed:
                self.unplanned += 1
                return
            row = self.anatomy.add_unit(unit)
            self._cells.reserve(row + 1, self._units.device(unit.output))
        row = self.anatomy.rows[key]
        self._ran.add(row)
        self.guard.miss(row, NO_ADDITION, _NO_ADDITION)
        if self._sets is not None and self._sets.is_due("extremes"):
            self._sets.miss("extremes", row, _NO_ADDITION)
        if not self.is_core:
            if not self._units.settle(row, "input", unit.input):
                missing = (*SITE_COLUMNS["input"], "grad_input")
                self.guard.miss(row, missing, "the module has no floating-point input")
            self._saturation.assign(row, unit.activations)
        self._units.settle(row, "output", unit.output)

    @guarded
    def reject(self, keys: Iterable[tuple[str, int]], order: Iterable[tuple[str, int]]) -> None:
        """Blocks of this pass are not those that were traced: what was seen of them is nothing.

        `order` has all blocks of the traced pass.
        """
        rows = {self.anatomy.rows[key] for key in keys if key in self.anatomy.rows}
        self.backward.rejected |= rows
        columns = (*RECORDED, *self.custom.ids)
        for row in rows:
            self.guard.miss(row, (c for c in columns if c not in _OF_PARAMETERS), OTHER_PASS)
        # the output of such a block is still the input of the next one, which may be as expected
        for (row, column), (source, there) in self._cells.reject(rows):
            if column.endswith("_mean"):
                known = source, there.removesuffix("_mean")
                self.sites.take_over(row, column.removesuffix("_mean"), known)
        for row in rows:
            self.sites.forget(row, SITE_COLUMNS)
        if rows and self._sets is not None:
            self._sets.reject(rows, OTHER_PASS)
        if rows:
            stages = {row: self.anatomy.blocks[row].stage for row in rows}
            self.skip.reject(stages, [self.anatomy.rows[key] for key in order])
        self._saturation.forget(rows)

    @guarded
    def finished(
        self,
        features: Tensor | None,
        logits: Tensor | None,
        outputs: Sequence[Tensor],
        *,
        reason: str = "",
    ) -> None:
        """Measure the classifier's input, and hook its output for the head kick."""
        if self.fixed:
            self.skipped = [b.name for b in self.anatomy.blocks if b.index not in self._ran]
        self.fixed, self.is_whole = self.fixed or bool(self.anatomy.blocks), True
        self.complete()
        if logits is not None and self._sets is not None and self._sets.is_due("extremes"):
            self._sets.put(None, describe_logits(logits))
        if self.head.classify(features, logits, reason) and logits is not None:
            self.backward.watch_logits(logits)
        output = self.head.ending(outputs)
        if output is not None and output.requires_grad:
            self.backward.watch_output(output)
        self.backward.let_go()

    def complete(self) -> None:
        """Write what was measured in the forward pass and waits for its end."""
        self.sites.write()
        self.parts.write_skip(self.skip.finish())
        for row, counts, sizes in self._saturation.count(self.sites.features):
            self.parts.write_saturation(row, counts, sizes)
        self._saturation.clear()

    def _row(self, addition: Addition, device: torch.device) -> int | None:
        """The block's row, added during the first pass; None for an addition not seen then."""
        row = self.anatomy.rows.get(addition.key)
        if row is None and self.fixed:
            self.unplanned += 1
        elif row is None:
            row = self.anatomy.add_block(addition)
            self._cells.reserve(row + 1, device)
        return row

    def _measure(
        self, row: int, site: str, x: Tensor, *, keep: bool = True, is_sum: bool = False
    ) -> None:
        """Write a site's statistics, or an alias if this very tensor was measured before."""
        if site in self._custom_sites:
            for name, value in self.custom.compute(site, x):
                self._cells.put(self._cells.slot, row, name, value)
        if site in EXTREME_SITES and self._sets is not None and self._sets.is_due("extremes"):
            found = extremes(self.skip.head(x), self.sites.features(row, x))
            self._sets.put(row, {f"{site}_{name}": value for name, value in found.items()})
        if (known := self._known.get(x)) is not None:
            self.sites.repeat(row, site, known)
            return
        self.sites.measure(row, site, x, is_sum=is_sum)
        if keep:
            self._known.set(x, (row, site))

    def _source(self, row: int, x: Tensor | None) -> str:
        """Which tensor of the block before the block's input is, untouched: sum, output or ""."""
        known = None if x is None else self._known.get(x)
        return known[1] if known and known[0] == row - 1 and known[1] in ("sum", "output") else ""


_OF_PARAMETERS = ("grad_param", "update_ratio")


def _spread(branch: Tensor, shortcut: Tensor) -> Tensor:
    """The branch in the shape of the sum."""
    same = branch.shape == shortcut.shape
    return branch if same else branch.detach().expand_as(shortcut)


def _scaled(x: Tensor, factor: float) -> Tensor:
    """What goes into the sum where the addition scales an operand."""
    return x if factor == 1 else x.detach() * factor
