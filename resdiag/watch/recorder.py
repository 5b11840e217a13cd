"""Measures what a tracer sees and writes it into the buffer: forward at once, backward by hooks.

Gradients are read by tensor hooks set during the forward pass: module backward hooks refuse
in-place activations (pytorch#61519), and references kept for later are overwritten by them.
"""

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from resdiag.watch import metrics
from resdiag.watch.addition import Addition
from resdiag.watch.batch import Logits
from resdiag.watch.blocks import Anatomy
from resdiag.watch.buffer import Buffer, Key
from resdiag.watch.calls import Call
from resdiag.watch.catalog import CORE, RECORDED
from resdiag.watch.gates import Gates, fractions
from resdiag.watch.head import Head
from resdiag.watch.hindsight import Hindsight
from resdiag.watch.lookback import Lookback
from resdiag.watch.ownvalues import OwnValues
from resdiag.watch.pool import Pool
from resdiag.watch.shares import TANGLED, Shares, entries
from resdiag.watch.sites import COLUMNS as SITE_COLUMNS
from resdiag.watch.sites import Part, Sites
from resdiag.watch.skip import COLUMNS, SkipPath
from resdiag.watch.units import Unit

_OUTPUT_GRADIENT = ("grad_output", "grad_nonfinite", "elasticity")
_NO_ADDITION = (
    *(column for site in ("branch", "shortcut", "sum") for column in SITE_COLUMNS[site]),
    "grad_sum",
    "shortcut_share",
    *COLUMNS,
)
_WITHOUT = {
    "grad_sum": ("grad_sum", *_OUTPUT_GRADIENT, "shortcut_share"),
    "grad_output": _OUTPUT_GRADIENT,
    "grad_input": ("grad_input", "shortcut_share"),
}
"""What is missing where there is no gradient to hook."""

_NOT_ASKED = "no gradient is asked for at this tensor"
_NO_GRADIENTS = (
    "its forward ran without gradients, and no module that was called once ran again in the "
    "backward pass: where that is activation checkpointing, use_reentrant=False shows them"
)
_NOT_CORE = "not in the core set: attach(metrics='full') records it"

P = ParamSpec("P")


def _guarded(method: Callable[Concatenate["Recorder", P], None]) -> Callable[..., None]:
    """A mistake of ours must not end somebody's training: note it, and watch no more."""

    @functools.wraps(method)
    def call(self: "Recorder", *args: P.args, **kwargs: P.kwargs) -> None:
        if self.failure:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"

    return call


class _Pass:
    """One forward pass: alive as long as its graph is, which keeps the hooks that hold it."""


@dataclass(eq=False)
class _Passed:
    """A tensor that was measured before it is known whose it is.

    Attributes:
        device: Where it is.
        tensor: The tensor, and its version then.
        sums: What was read of it; None where it had been measured before.
        place: Row and site where it was written first.
        gradient: The cell in which its gradient is written.
        handle: The hook that reads the gradient; None if none is asked for.
        own: Own metrics by site.
    """

    device: torch.device
    tensor: tuple[weakref.ref[Tensor], int]
    sums: Part | None = None
    place: tuple[int, str] | None = None
    gradient: Key | None = None
    handle: RemovableHandle | None = None
    own: dict[str, list[tuple[str, Tensor]]] = field(default_factory=dict)


class Recorder:
    """The tracer's listener that records one forward and backward pass.

    Args:
        cells: Per-block buffer; its columns are `catalog.RECORDED`.
        head: Per-step buffer with one row; its columns begin with `head.COLUMNS`.
        samples: Samples of the batch on which per-unit quantities are measured; None for all.
        core: Only the columns of `catalog.CORE`.
        moments: Samples of the batch on which moments and gradients are measured; None for all.
        pool: Where several ranks record together: takes what they must add up, in place of the
            buffers.

    Attributes:
        failure: The error of ours after which nothing is watched any more, or "".
        skipped: Blocks of the first pass that the last one did not run.
        head: What it writes of batch and classifier.
        counts_gates: Whether it wants to be told of activations.
        missed: Whether the pass was read in hindsight and was not the one expected.
    """

    def __init__(
        self,
        cells: Buffer,
        head: Buffer,
        samples: int | None,
        pool: Pool | None = None,
        backward_begins: Callable[[], None] = lambda: None,
        own: OwnValues | None = None,
        *,
        core: bool = False,
        moments: int | None = None,
    ) -> None:
        self._sites = Sites(cells, pool, moments, self.miss)
        self.reasons: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        self.seen_backward = self.is_whole = False
        self.strangers = self.repeats = 0
        self.failure = ""
        self.skipped: list[str] = []
        self._backward_begins = backward_begins
        self.factor: Tensor | float = 1.0
        self._own = own or OwnValues(())
        self._own_sites = self._own.sites()
        self._cells = cells
        self.head = Head(head, pool, self.reasons)
        self._skip, self._pool = SkipPath(samples, core=core), pool
        self._gates, self._shares = Gates(), Shares(self._skip.head)
        self._core, self.counts_gates, self._count = core, not core, moments
        if core:
            for column in set(RECORDED) - set(CORE):
                self.reasons[column][_NOT_CORE] = set()
            for name in self._own.at(("input", "sum", "grad_input", "grad_sum")):
                self.reasons[name][_NOT_CORE] = set()
        self._skip.weigh = None if pool is None else pool.skip
        self._fixed = self.missed = False
        self.lookback: Lookback | None = None
        if core and pool is None and not self._own_sites:  # the graph shows no more than that
            self.lookback = Lookback(cells, self._sites, self._write_skip, samples, moments)
        self._begun: _Pass | None = None
        self._pass = weakref.ref(_Pass())
        self.end()

    def adopt(self, anatomy: Anatomy) -> None:
        """Take blocks that were found beforehand."""
        self._sites.anatomy, self._fixed = anatomy, bool(anatomy.blocks)

    def begin(self) -> None:
        """Begin a forward pass into the buffer's open slot."""
        self.end()
        if self._pool is not None:
            self._pool.begin()
        self._live = True
        begun = self._begun = _Pass()
        self._pass = weakref.ref(begun)
        self.seen_backward = self.is_whole = self.missed = False
        self.strangers = self.repeats = 0
        self.skipped = []

    @property
    def looks_back(self) -> bool:
        """Whether it wants to be told of the next pass only when that has ended."""
        return self.lookback is not None and self.lookback.hindsight.is_ready

    @property
    def anatomy(self) -> Anatomy:
        """The blocks."""
        return self._sites.anatomy

    @property
    def is_lost(self) -> bool:
        """Whether the pass's graph is gone: no backward pass will ever come through it."""
        return self.is_whole and not self.seen_backward and self._pass() is None

    def end(self) -> None:
        """Let go of the pass: a gradient that comes later belongs to no step."""
        self._live = False
        self._begun = None
        self._skip.reset()
        if self.lookback is not None:
            self.lookback.forget()
        self._known: dict[int, tuple[weakref.ref[Tensor], int, int, str]] = {}
        self._children: dict[Key, list[int]] = defaultdict(list)
        self._shares.clear()
        self._sites.clear()
        self._gates.clear()
        self._hooked: set[Key] = set()
        self._ran: set[int] = set()
        self._passed: dict[int, _Passed] = {}
        self._sum_hooks: dict[int, RemovableHandle] = {}
        self._written: set[Key] = set()
        self._postponed: set[Key] = set()

    def close(self) -> None:
        """Let go of everything; nothing comes any more."""
        self.end()
        self._skip.forget()

    # -- forward -------------------------------------------------------------------------------

    @_guarded
    def started(self, inputs: Sequence[Tensor]) -> None:
        """Measure the batch that goes in."""
        self.head.batch(inputs)

    @_guarded
    def operands(self, addition: Addition) -> None:
        """Measure F(x), h(x) and x before an in-place addition overwrites one of them."""
        row = self._row(addition)
        if row is None:
            return
        branch = _scaled(addition.branch, addition.branch_scale)
        if self._learning is not None:
            self._learning.operands(row, addition)
        if addition.extends:
            self._extend(row, branch)
            return
        shortcut = _scaled(addition.shortcut, addition.shortcut_scale)
        self._measure(row, "branch", branch, keep=False)
        self._measure(row, "shortcut", shortcut, keep=shortcut is addition.shortcut)
        if self._core:
            return
        source = self._source(row, addition.origin)
        if addition.origin is not None:
            self._measure(row, "input", addition.origin)
            self._watch_input(row, addition.origin)
        else:
            missing = (*SITE_COLUMNS["input"], "grad_input", "shortcut_share")
            self.miss(row, missing, "the block's input was freed before its addition")
        self._watch_shortcut(row, addition)
        new = row == 0 or self.anatomy.blocks[row].stage != self.anatomy.blocks[row - 1].stage
        self._skip.open(
            row,
            addition.origin,
            shortcut,
            addition.path,
            addition.shortcut_scale,
            new=new,
            joined=row == 0 or bool(source),
            source=source,
        )

    @_guarded
    def added(self, addition: Addition) -> None:
        """Measure the sum; keep its first samples for what the after-add will do to them."""
        row = self.anatomy.rows.get((addition.owner, addition.ordinal))
        if row is None or addition.sum is None:
            return
        if self._learning is not None:
            self._learning.added(row, addition.sum)
        bare = self._fixed and self.anatomy.blocks[row].after_add == "none"
        if bare and self._core and self._pool is None:
            self._skip.pass_by(row)
        else:
            self._skip.add(row, addition.sum)
        if not self._core:
            self._measure(row, "sum", addition.sum, is_sum=True)
            self._hook(addition.sum, row, "grad_sum")

    @_guarded
    def closed(self, addition: Addition, output: Tensor) -> None:
        """Measure the output and what the after-add did."""
        row = self.anatomy.rows.get((addition.owner, addition.ordinal))
        if row is None:
            return
        if not self._fixed:
            self.anatomy.finish(row, addition.after, addition.parameters)
        if self._learning is not None:
            self._learning.closed(row, output, addition.after)
        self._skip.close(row, output, addition.after)
        self._measure(row, "output", output, is_sum=not addition.after)
        self._ran.add(row)
        if addition.after or self._core:
            self._hook(output, row, "grad_output")
        else:
            self._cells.alias(row, "grad_output", (row, "grad_sum"))
        if not self._core:
            self._gates.assign(row, addition.activations)

    @_guarded
    def passing(self, number: int, x: Tensor, features: int | None) -> None:
        """Measure what may be a unit's input or output, and listen for its gradient."""
        if number in self._passed:
            return
        passed = self._passed[number] = _Passed(x.device, (weakref.ref(x), x._version))
        if self._fixed:  # else most of what passes is no unit's: no business of somebody's function
            for site in self._own_sites & {"input", "output"}:
                self._compute_own_of(passed, site, x)
        passed.place = self._find(x)
        if passed.place is not None:  # measured as a tensor of a residual block before
            passed.gradient = passed.place[0], self._grad_column(*passed.place)
            return
        passed.sums = self._sites.read(x, features)
        if x.requires_grad:
            begun, slot = self._begun, self._cells.slot
            passed.handle = x.register_hook(lambda g: self._pass_back(begun, slot, passed, g))

    @_guarded
    def dismiss(self) -> None:
        """What passed is no unit's."""
        for passed in self._passed.values():
            if passed.handle is not None:
                passed.handle.remove()
        self._passed.clear()

    @_guarded
    def unit(self, unit: Unit) -> None:
        """Measure a module that is a block without an addition: input and output only."""
        key = (unit.owner, unit.ordinal)
        if key not in self.anatomy.rows:
            if self._fixed:
                self.strangers += 1
                return
            row = self.anatomy.add_unit(unit)
            self._cells.reserve(row + 1, self._passed[unit.output].device)
        row = self.anatomy.rows[key]
        self._ran.add(row)
        self.miss(row, _NO_ADDITION, "the block has no residual addition")
        entry = None if unit.input is None else self._passed.get(unit.input)
        if not self._core:
            if entry is None:
                missing = (*SITE_COLUMNS["input"], "grad_input")
                self.miss(row, missing, "the module has no floating-point input")
            else:
                self._settle(row, "input", entry)
            self._gates.assign(row, unit.activations)
        self._settle(row, "output", self._passed[unit.output])

    @_guarded
    def same(self, old: Tensor, new: Tensor) -> None:
        """What was measured of a tensor holds for its equal."""
        known = self._find(old)
        if known is not None:
            self._known[id(new)] = (weakref.ref(new), new._version, *known)

    @_guarded
    def activation(self, owners: tuple[str, ...], call: Call, x: Tensor) -> None:
        """Remember which units of an activation are saturated, for the block it is in."""
        if x.is_floating_point() and x.numel():
            self._gates.add(call, self._skip.head(x))

    @_guarded
    def finished(
        self, features: Tensor | None, logits: Tensor | None, outputs: Sequence[Tensor]
    ) -> None:
        """Measure the classifier's input, and hook its output for the head kick."""
        if self._fixed:
            self.skipped = [b.name for b in self.anatomy.blocks if b.index not in self._ran]
        self._fixed, self.is_whole = self._fixed or bool(self.anatomy.blocks), True
        self._sites.write()
        self._write_skip(self._skip.finish())
        self._write_gates()
        if self.lookback is not None and self._learning is not None:
            self.lookback.learn(outputs, features, logits)
        begun, self._begun = self._begun, None  # from here on only the graph keeps it
        self._classify(begun, features, logits)

    @_guarded
    def look_back(self, outputs: Sequence[Tensor]) -> None:
        """Measure a pass of which nothing was told, from the graph that it left."""
        assert self.lookback is not None
        view = self.lookback.read(outputs)
        if view is None:
            self.missed = True
            return
        rows, slot = range(len(self.anatomy.blocks)), self._cells.slot
        self._ran.update(rows)
        self._hooked.update((row, "grad_output") for row in rows)
        self.is_whole = True
        begun, self._begun = self._begun, None

        def slow(row: int, g: Tensor) -> None:
            self._gradient(begun, slot, row, "grad_output", g)

        self.lookback.hook(view, lambda: self.seen_backward, slow)
        self._classify(begun, *(view.head or (None, None)))

    @property
    def _learning(self) -> Hindsight | None:
        """What wants to be told of a pass, to know the next one by its graph."""
        known = None if self.lookback is None else self.lookback.hindsight
        return known if known is not None and known.listens else None

    def _classify(
        self, begun: "_Pass | None", features: Tensor | None, logits: Tensor | None
    ) -> None:
        """Measure the classifier."""
        if self.head.classify(features, logits) and logits is not None:
            slot, kept = self.head.slot, self.head.keep(logits)
            logits.register_hook(lambda g: self._gap(begun, slot, g, kept))

    # -- measuring -----------------------------------------------------------------------------

    def _row(self, addition: Addition) -> int | None:
        """The block's row, added during the first pass; None for an addition not seen then."""
        row = self.anatomy.rows.get((addition.owner, addition.ordinal))
        if row is None and self._fixed:
            self.strangers += 1
        elif row is None:
            row = self.anatomy.add_block(addition)
            self._cells.reserve(row + 1, addition.branch.device)
        return row

    def _settle(self, row: int, site: str, passed: _Passed) -> None:
        """A tensor that passed is a unit's: write what was measured, or say where it is."""
        self._settle_own(row, site, passed)
        if passed.place is not None:
            self._sites.repeat(row, site, passed.place)
        elif passed.sums is not None:
            self._sites.keep(row, site, passed.sums)
            passed.place = row, site
            x = passed.tensor[0]()
            if x is not None:
                self._known[id(x)] = (*passed.tensor, row, site)
        column = f"grad_{site}"
        if passed.gradient in self._hooked:
            self._cells.alias(row, column, passed.gradient)
            self._children[passed.gradient].append(row)
        elif passed.handle is not None:
            passed.gradient = row, column
            self._hooked.add(passed.gradient)
        else:
            self.miss(row, _WITHOUT[column], _NOT_ASKED)

    def _settle_own(self, row: int, site: str, passed: _Passed) -> None:
        x, version = passed.tensor[0](), passed.tensor[1]
        if site in self._own_sites and site not in passed.own:
            if x is None or x._version != version:
                reason = "overwritten before it was known to be a unit's; later steps have it"
                return self.miss(row, tuple(self._own.at((site,))), reason)
            self._compute_own_of(passed, site, x)
        for name, value in passed.own.get(site, ()):
            self._cells.put(self._cells.slot, row, name, value)
        return None

    def _compute_own_of(self, passed: _Passed, site: str, x: Tensor) -> None:
        values = passed.own[site] = list[tuple[str, Tensor]]()
        self._own.compute(site, x, lambda name, value: values.append((name, value)))

    def _pass_back(self, begun: "_Pass | None", slot: int, passed: _Passed, g: Tensor) -> None:
        if begun is not None and passed.gradient is not None:
            self._gradient(begun, slot, *passed.gradient, g)

    def _extend(self, row: int, branch: Tensor) -> None:
        """A parallel branch joins the unit: its branch and its sum are measured again."""
        self._sites.forget(row, ("branch", "sum"))
        handle = self._sum_hooks.pop(row, None)
        if handle is not None:
            handle.remove()
        self._measure(row, "branch", branch, keep=False)

    def _measure(
        self, row: int, site: str, x: Tensor, *, keep: bool = True, is_sum: bool = False
    ) -> None:
        """Write a site's statistics, or an alias if this very tensor was measured before."""
        if site in self._own_sites:
            self._compute_own(row, site, x)
        known = self._find(x)
        if known is not None:
            self._sites.repeat(row, site, known)
            return
        self._sites.measure(row, site, x, is_sum=is_sum)
        if keep:
            self._known[id(x)] = (weakref.ref(x), x._version, row, site)

    def _compute_own(self, row: int, site: str, x: Tensor) -> None:
        """Own metrics of a tensor or, without the loss scale, of a gradient."""
        slot = self._cells.slot
        self._own.compute(site, x, lambda name, value: self._cells.put(slot, row, name, value))

    def _compute_own_gradients(self, row: int, column: str, g: Tensor) -> None:
        """A gradient is also that at the output, or at later blocks' inputs, of the same tensor."""
        places = [(row, column)] if column != "grad_input" else []
        if column == "grad_sum" and self._grad_column(row, "output") == "grad_sum":
            places.append((row, "grad_output"))
        places += [(child, "grad_input") for child in self._children.get((row, column), ())]
        g = g if isinstance(self.factor, float) and self.factor == 1 else g / self.factor
        for place, site in places:
            if site in self._own_sites:
                self._compute_own(place, site, g)

    def _find(self, x: Tensor) -> tuple[int, str] | None:
        """Row and site at which `x`, unchanged since, was measured."""
        entry = self._known.get(id(x))
        if entry is None or entry[0]() is not x or entry[1] != x._version:
            return None
        return entry[2], entry[3]

    def _source(self, row: int, x: Tensor | None) -> str:
        """Which tensor of the block before the block's input is, untouched: sum, output or ""."""
        known = None if x is None else self._find(x)
        return known[1] if known and known[0] == row - 1 and known[1] in ("sum", "output") else ""

    def _write_skip(self, rows: Iterable[tuple[int, list[metrics.Scalar], dict[str, str]]]) -> None:
        """Write what was measured of the skip path, and what could not be."""
        keys, values = list[Key](), list[metrics.Scalar]()
        for row, measured, reasons in rows:
            keys.append((row, COLUMNS[0]))
            values.extend(measured)
            for column, reason in reasons.items():
                self.miss(row, (column,), reason)
        if keys and self._pool is None:
            table = metrics.stack(values, self._cells.device).view(len(keys), -1)
            self._cells.write_rows(self._cells.slot, keys, table)

    def _write_gates(self) -> None:
        """Saturated and dead fractions over the activations that ran inside each block."""
        slot = self._cells.slot
        for row, counts, sizes in self._gates.count(self._sites.features):
            if not counts:
                columns = ("saturated_fraction", "dead_fraction")
                self.miss(row, columns, "no known activation inside the block")
            elif self._pool is not None:
                per_channel = [n // len(c) for n, c in zip(sizes, counts, strict=True)]
                self._pool.gates(row, counts, per_channel)
            else:
                saturated, dead = fractions(counts, sizes)
                self._cells.put(slot, row, "saturated_fraction", saturated)
                self._cells.put(slot, row, "dead_fraction", dead)
        self._gates.clear()

    def miss(self, row: int, columns: tuple[str, ...], reason: str) -> None:
        """Note why columns are NaN for a block."""
        for column in columns:
            self.reasons[column][reason].add(row)

    # -- forward again -------------------------------------------------------------------------

    def awaits(self, module: str) -> bool:
        """Whether blocks inside a module ran without gradients in the pass that is recorded."""
        if not self._postponed or not self._live or self.failure:
            return False
        owners = (self.anatomy.blocks[row].owner for row, _ in self._postponed)
        return any(f"{owner}.".startswith(f"{module}.") for owner in owners)

    @_guarded
    def hook_operands(self, row: int, addition: Addition) -> None:
        """Hook the input of a block that runs again, and what leads to its shortcut."""
        self._begun = self._pass()
        if (row, "grad_input") in self._postponed and addition.origin is not None:
            self._watch_input(row, addition.origin)
        if not self._core:
            self._watch_shortcut(row, addition)
        self._begun = None

    @_guarded
    def hook_again(self, row: int, site: str, x: Tensor) -> None:
        """Hook a tensor of a block that runs again."""
        self._begun = self._pass()
        if self._find(x) is None and not (self._core and site == "sum"):
            self._known[id(x)] = (weakref.ref(x), x._version, row, site)
        if (row, f"grad_{site}") in self._postponed:
            self._hook(x, row, f"grad_{site}")
        self._begun = None

    def conclude(self) -> None:
        """Write the gradients that came; say of which tensors none came because they have none."""
        for row, size in () if self.lookback is None else self.lookback.gradients():
            if (row, "grad_output") not in self._written:
                self._cells.put(self._cells.slot, row, "grad_output", size)
                self._cells.put(self._cells.slot, row, "grad_nonfinite", 0.0)
        for row, column in self._postponed - self._hooked:
            self.miss(row, _WITHOUT[column], _NO_GRADIENTS)

    # -- backward ------------------------------------------------------------------------------

    def _hook(self, x: Tensor, row: int, column: str) -> None:
        if not x.requires_grad and not torch.is_grad_enabled():
            self._postponed.add((row, column))  # it may run again in the backward pass
            return
        if not x.requires_grad:
            self.miss(row, _WITHOUT[column], _NOT_ASKED)
            return
        begun, slot = self._begun, self._cells.slot
        self._hooked.add((row, column))
        handle = x.register_hook(lambda g: self._gradient(begun, slot, row, column, g))
        if column == "grad_sum":
            self._sum_hooks[row] = handle

    def _is_current(self, begun: "_Pass | None") -> bool:
        """Whether the pass in which a hook was set is still the one being recorded."""
        return self._live and begun is not None and begun is self._pass()

    def _see_backward(self) -> None:
        if not self.seen_backward:
            self.seen_backward = True
            self._backward_begins()

    @_guarded
    def _gradient(self, begun: "_Pass", slot: int, row: int, column: str, g: Tensor) -> None:
        """Write G2; hand dL/du to the share of the block's input, or finish that share."""
        if not self._is_current(begun):
            return
        self._see_backward()
        key = row, column
        read = self.lookback is not None and self.lookback.has_read(row)
        self.repeats += read or key in self._written
        self._written.add(key)
        size, broken = metrics.gradient(g, self._count)
        if self._pool is None:
            self._cells.put(slot, row, column, size)
        else:
            self._pool.gradient(row, column, size, g.shape[0] if g.dim() else 1)
        if self._own_sites:
            self._compute_own_gradients(row, column, g)
        if column == "grad_sum":
            self._shares.hold(row, g)
        if column == "grad_output" or column == self._grad_column(row, "output"):
            self._put(slot, row, "grad_nonfinite", broken, float(g.numel()))
        for child in self._children.get((row, column), ()):
            self._share(slot, child, self._skip.head(g))

    def _watch_input(self, row: int, x: Tensor) -> None:
        """Read dL/dx where the tensor was the output of an earlier block, else by a hook."""
        known = self._find(x)
        source = None
        if known is not None and known[1] in ("sum", "output"):
            source = (known[0], self._grad_column(known[0], known[1]))
        if source is not None and source in self._hooked:
            self._cells.alias(row, "grad_input", source)
            self._children[source].append(row)
        else:
            self._hook(x, row, "grad_input")
            self._children[row, "grad_input"].append(row)

    def _grad_column(self, row: int, site: str) -> str:
        """The column in which the gradient hook of a measured tensor writes."""
        return "grad_output" if site == "output" and self._writes_output(row) else "grad_sum"

    def _writes_output(self, row: int) -> bool:
        block = self.anatomy.blocks[row]
        return block.shortcut == "none" or block.after_add != "none"

    def _watch_shortcut(self, row: int, addition: Addition) -> None:
        """Arrange for the gradient that enters x through the shortcut to be held for its share."""
        x, h = addition.origin, addition.shortcut
        if x is None or not x.requires_grad:
            return
        if h is x:
            self._shares.pass_on(row, addition.shortcut_scale)
            return
        leaving = None if addition.is_gated else entries(h, x)
        if leaving is None:
            self.miss(row, ("shortcut_share",), TANGLED)
            return
        if not leaving and torch.is_grad_enabled():
            reason = "no gradient leads from the shortcut back to the block's input"
            self.miss(row, ("shortcut_share",), reason)
        begun = self._begun
        for node, index in leaving:
            node.register_hook(lambda grads, _, i=index: self._collect(begun, row, grads[i]))

    @_guarded
    def _collect(self, begun: "_Pass", row: int, g: Tensor | None) -> None:
        if g is not None and self._is_current(begun):
            self._shares.collect(row, g)

    def _share(self, slot: int, row: int, total: Tensor) -> None:
        via = self._shares.take(row)
        if via is None or via.shape != total.shape:
            return
        size = 0.0 if self._pool is None else metrics.norm(total)
        self._put(slot, row, "shortcut_share", metrics.share(via, total), size * size)

    def _put(
        self, slot: int, row: int, column: str, value: metrics.Scalar, weight: metrics.Scalar
    ) -> None:
        """Write a cell; `weight` is what the value is a mean over, for several ranks to add up."""
        if self._pool is None:
            self._cells.put(slot, row, column, value)
        else:
            self._pool.put(row, column, value, weight)

    @_guarded
    def _gap(self, begun: "_Pass", slot: int, g: Tensor, logits: Logits | None) -> None:
        """The gradient of the logits has come."""
        if self._is_current(begun):
            self._see_backward()
            self.head.gap(slot, g, logits)


def _scaled(x: Tensor, factor: float) -> Tensor:
    """What goes into the sum where the addition scales an operand."""
    return x if factor == 1 else x.detach() * factor
