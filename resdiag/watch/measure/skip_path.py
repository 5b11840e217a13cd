"""The skip path of one forward pass: what the after-adds do to it, block after block.

Measured on the first samples of a batch: the definitions are averages over units (sample, channel,
position), and one number per unit costs as much as a batch of activations.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resdiag.watch.base.functions import Call, compose
from resdiag.watch.measure.changes import relative_change, relative_changes, slope_at
from resdiag.watch.measure.reductions import Scalar, norm, on_host, quotient

COLUMNS = (
    *("perturbation", "identity_defect", "skip_gain_stage", "skip_gain", "identity_drift"),
    *("branch_ratio", "negative_fraction", "slope_mean", "slope_mean_sq"),
)
"""What `SkipPath.close` returns, in order; the branch ratio is filled in elsewhere."""

NOT_ELEMENTWISE = "the after-add is a normalisation: it has no slope per unit"
MIXED = "a projection or a gate is on the shortcut: no unit gradient leads through it"
BROKEN = "something stands between the blocks: no skip path leads through it"
OTHER_PASS = "the shortcuts lead through a block that was not the one that had been traced"
NEW_AFTER = "the block had no after-add in its first pass: its sum was not kept"
_PER_UNIT = ("identity_defect", "identity_drift", "slope_mean", "slope_mean_sq")


class _Chain:
    """One number per unit carried along the shortcuts: the product of the slopes on the way."""

    def __init__(self) -> None:
        self.lost = ""  # why the product cannot be known any more
        self._product: Tensor | None = None  # None: 1 for every unit
        self._alive: Tensor | None = None  # 1 where a unit leads back to the chain's beginning
        self._share: Scalar = 1.0  # of units that are alive

    def lose(self, reason: str) -> None:
        """Nothing can be said from here on; the first reason stays."""
        self.lost = self.lost or reason
        self._product = self._alive = None

    def cross(self, x: Tensor, path: tuple[Call, ...]) -> None:
        """Pass a shortcut without parameters, e.g. option A, which drops and appends units."""
        if path and not self.lost:
            lead = compose(path)
            ones = torch.ones_like(x)
            alive = lead(ones if self._alive is None else self._alive)
            self._product = lead(ones if self._product is None else self._product)
            self._alive = (alive != 0).to(alive.dtype)
            self._share = _mean(self._alive)

    def multiply(self, factor: Tensor) -> None:
        """Pass an after-add with slopes `factor`, one per unit or one for all."""
        before = self._product
        if before is not None and factor.dim() and before.shape != factor.shape:
            self.lose(BROKEN)
        elif not self.lost:
            self._product = factor if before is None else before * factor

    def alive(self, units: float) -> Scalar:
        """How many of so many units survive."""
        return units if self._alive is None else self._share * self._alive.numel()

    def mean(self) -> Scalar:
        """Mean over the surviving units."""
        if self.lost:
            return math.nan
        return 1.0 if self._product is None else quotient(_mean(self._product), self._share)


@dataclass(eq=False)
class _Passage:
    """One block's first samples, copied while the forward pass runs, measured when it has ended."""

    row: int
    x: Tensor | None = None  # block input where its shape is needed
    h: Tensor | None = None  # shortcut output as it goes into the sum, where `source` is ""
    # calls of a parameter-free shortcut, () for the identity, None for a projection
    path: tuple[Call, ...] | None = None
    scale: float = 1.0  # factor on the shortcut inside the addition
    stage: int | None = None  # the block's stage; None for a block of which P1 alone is measured
    projected: bool = False  # whether the shortcut is a projection, which no unit leads through
    joined: bool = False  # whether x is the sum or output of the block before, or there is none
    source: str = ""  # which of the two h itself is, "sum" or "output"; "" if it is neither
    u: Tensor | None = None  # the sum before the after-add
    after: tuple[Call, ...] = ()  # the after-add's calls, () for none
    output: Tensor | None = None  # the block's output where it cannot be computed from u
    rejected: bool = False  # whether nothing that was seen of the block holds

    @property
    def is_elementwise(self) -> bool:
        """Whether the output can be computed from the sum."""
        return all(call.is_activation for call in self.after)

    def ends(self) -> dict[str, Tensor]:
        """What the next block may begin with: the sum, and what the after-add made of it."""
        if self.u is None or self.rejected:
            return {}
        output = compose(self.after)(self.u) if self.output is None else self.output
        return {"sum": self.u, "output": output}


class SkipPath:
    """Running products of after-add slopes (P3) and iterates of the after-add (P4).

    While the forward pass runs, only the first samples are copied; `finish` measures all blocks in
    one go: the same operations cost a third of what they cost between two convolutions. `samples`
    at the head of the batch are looked at, None for all; of the `core` set P1 only is measured.
    """

    def __init__(self, samples: int | None, *, core: bool = False) -> None:
        self.samples, self._core = samples, core
        # told each block's row, values, and what each value is a mean over: the sum of squares or
        # the number of units below its fraction bar
        self.weigh: Callable[[int, list[Scalar], list[Scalar]], None] | None = None
        self._memory: dict[tuple[int, str], tuple[tuple[Any, ...], Tensor]] = {}
        self.reset()

    def reset(self) -> None:
        """Begin a forward pass, or let go of the last one."""
        self._stage, self._whole = _Chain(), _Chain()
        self._base: Tensor | None = None  # h at the stage's first block
        self._iterate: Tensor | None = None  # what the after-adds since then made of it
        self._drift: Scalar = 0.0  # how far that is from the base
        self._passages: dict[int, _Passage] = {}
        self._at: int | None = None  # the stage
        self._is_adrift = False  # whether a block of the stage was rejected

    def forget(self) -> None:
        """Give the memory of the copies back."""
        self._memory.clear()

    def head(self, x: Tensor) -> Tensor:
        """The samples looked at, detached."""
        return x.detach()[: self.samples]

    def open(
        self,
        row: int,
        x: Tensor | None,
        h: Tensor,
        path: tuple[Call, ...] | None,
        scale: float,
        *,
        stage: int,
        projected: bool,
        joined: bool,
        source: str,
    ) -> None:
        """Pass a block's shortcut; see `_Passage`, `x` is None if it is unknown."""
        path = None if x is None else path
        # what the block before made is computed from its sum: no second copy
        source = source if path == () and scale == 1 and row - 1 in self._passages else ""
        shape = self.head(x) if x is not None and path else None
        copy = None if source else self._keep(row, "h", h)
        self._passages[row] = _Passage(
            row, shape, copy, path, scale, stage, projected, joined, source
        )

    def add(self, row: int, u: Tensor) -> None:
        """Pass a block's sum, before an in-place after-add overwrites it."""
        if self._core:
            self.pass_by(row)
        self._passages[row].u = self._keep(row, "u", u)

    def pass_by(self, row: int) -> None:
        """Pass a block that has had no after-add so far: of the core set nothing is to be kept."""
        self._passages[row] = _Passage(row)

    def reject(self, stages: Mapping[int, int], order: Sequence[int]) -> None:
        """Nothing that was seen of some blocks, of these stages, holds; `order` is the pass's."""
        for row, stage in stages.items():
            self._passages[row] = _Passage(row, stage=stage, rejected=True)
        self._passages = {row: self._passages[row] for row in order if row in self._passages}

    def close(self, row: int, output: Tensor, after: tuple[Call, ...]) -> None:
        """Pass a block's end, after the after-add's calls, () for none."""
        passage = self._passages[row]
        passage.after = after
        if not passage.is_elementwise:
            passage.output = self.head(output).clone()

    def _keep(self, row: int, name: str, x: Tensor) -> Tensor:
        """Copy the first samples; the memory stays from pass to pass, fresh pages cost more."""
        if self.samples is None:  # too much to hold on to
            return x.detach().clone()
        known = self._memory.get((row, name))
        like = x.shape, x.stride(), x.dtype, x.device
        if known is None or known[0] != like:
            known = self._memory[row, name] = like, torch.empty_like(self.head(x))
        copy = known[1]
        if not x.is_cpu or not x.is_contiguous():
            return copy.copy_(self.head(x))
        # one operation in place of three: half the time where no cache holds their code
        return torch.narrow_copy(x.detach(), 0, 0, len(copy), out=copy)

    def finish(self) -> Iterator[tuple[int, list[Scalar], dict[str, str]]]:
        """Measure the blocks in forward order: rows, scalars as in `COLUMNS`, why some are NaN."""
        if self._core:
            yield from self._perturbations()
            return
        last: dict[str, Tensor] = {}  # of the block before
        for passage in self._passages.values():
            u, h = passage.u, last.get(passage.source, passage.h)
            ends = passage.ends()
            if passage.rejected or (h is None and passage.source):
                last = ends
                yield passage.row, [math.nan] * len(COLUMNS), self._lose(passage)
                continue
            if u is None or h is None:  # an exception passed
                continue
            self._cross(passage, h)
            last, output = ends, ends["output"]
            if passage.output is not None:  # a normalisation: what it does to the sum can be said
                for chain in (self._stage, self._whole):
                    chain.lose(NOT_ELEMENTWISE)
                values = self._values(u, relative_change(output, u), *[math.nan] * 4)
            elif passage.after:
                values = self._measure(passage, u, output, h)
            else:  # by definition rather than by rounding
                values = self._values(u, 0.0, 0.0, self._drift, 1.0, 1.0)
            if self.weigh is not None:
                self.weigh(passage.row, values, self._weights(u, h))
            yield passage.row, values, self._missing(passage)
        self.reset()

    def _perturbations(self) -> Iterator[tuple[int, list[Scalar], dict[str, str]]]:
        """P1 of each block, and nothing else."""
        nothing = [math.nan] * (len(COLUMNS) - 1)
        outputs, sums = dict[int, Tensor](), dict[int, Tensor]()
        for row, passage in self._passages.items():
            if passage.u is not None and passage.after and not passage.rejected:
                outputs[row], sums[row] = passage.ends()["output"], passage.u
        changes = relative_changes(list(outputs.values()), list(sums.values()))
        known: dict[int, Scalar] = dict(zip(sums, changes, strict=True))
        for row, passage in self._passages.items():
            lost = passage.rejected or (passage.u is None and passage.after)
            values = [math.nan if lost else known.get(row, 0.0), *nothing]
            if self.weigh is not None:
                size = 1.0 if passage.u is None else norm(passage.u)
                self.weigh(row, values, [size * size, *[0.0] * len(nothing)])
            why = OTHER_PASS if passage.rejected else NEW_AFTER
            yield row, values, {COLUMNS[0]: why} if lost else {}
        self.reset()

    def _lose(self, passage: _Passage) -> dict[str, str]:
        """A block that was rejected interrupts the products, and the stage's iterates."""
        self._begin_stage(passage)
        for chain in (self._stage, self._whole):
            chain.lose(OTHER_PASS)
        self._is_adrift, self._drift = True, math.nan
        return dict.fromkeys(COLUMNS, OTHER_PASS)

    def _begin_stage(self, passage: _Passage) -> bool:
        """Whether a stage begins with a block: its product and its iterates do then."""
        new, self._at = passage.stage != self._at, passage.stage
        if new:
            self._stage, self._base, self._iterate, self._drift = _Chain(), None, None, 0.0
            self._is_adrift = False
        return new

    def _cross(self, passage: _Passage, h: Tensor) -> None:
        """Lead the running products through the block's shortcut."""
        new = self._begin_stage(passage)
        path = passage.path
        begun = [] if new else [self._stage]
        if new and passage.projected:  # the product of the network begins anew with the stage
            self._whole = _Chain()
        else:
            begun.append(self._whole)
        for chain in begun:
            if not passage.joined:
                chain.lose(BROKEN)
            if path is None or any(call.is_activation for call in path):
                chain.lose(MIXED)
            elif passage.x is not None:
                chain.cross(passage.x, path)
        if passage.scale != 1:
            for chain in (self._stage, self._whole):
                chain.multiply(h.new_full((), passage.scale))
        if self._base is None:
            self._base = self._iterate = h

    def _measure(self, passage: _Passage, u: Tensor, output: Tensor, h: Tensor) -> list[Scalar]:
        """What an elementwise after-add does."""
        after, settled = passage.after, passage.source == "output"  # h came out of the one before
        f = compose(after)
        idempotent = len(after) == 1 and after[0].is_idempotent
        slopes = slope_at(after, u, output)
        for chain in (self._stage, self._whole):
            chain.multiply(slopes)
        mean = square = _mean(slopes)
        if len(after) > 1 or after[0].name != "relu":  # its slopes are 0 or 1
            size = norm(slopes)
            square = size * size / slopes.numel()
        change, drift = relative_change(output, u), self._advance(f, idempotent=idempotent)
        defect = 0.0 if idempotent and settled else relative_change(f(h), h)
        return self._values(u, change, defect, drift, mean, square)

    def _values(
        self, u: Tensor, change: Scalar, defect: Scalar, drift: Scalar, mean: Scalar, square: Scalar
    ) -> list[Scalar]:
        """What `COLUMNS` names, in order."""
        gains = self._stage.mean(), self._whole.mean()
        return [change, defect, *gains, drift, math.nan, _share(u < 0), mean, square]

    def _weights(self, u: Tensor, h: Tensor) -> list[Scalar]:
        """The denominators of the values of a block just measured, in the order of `COLUMNS`."""
        assert self._base is not None
        sums, shortcuts, base = (size * size for size in map(norm, (u, h, self._base)))
        units = float(u.numel())
        alive = self._stage.alive(units), self._whole.alive(units)
        return [sums, shortcuts, *alive, base, *[units] * 4]

    def _missing(self, passage: _Passage) -> dict[str, str]:
        """Why columns of the block just measured are NaN."""
        reasons = {"skip_gain_stage": self._stage.lost, "skip_gain": self._whole.lost}
        if self._is_adrift:
            reasons["identity_drift"] = OTHER_PASS
        if not passage.is_elementwise:
            reasons |= dict.fromkeys(_PER_UNIT, NOT_ELEMENTWISE)
        return {column: reason for column, reason in reasons.items() if reason}

    def _advance(self, f: Callable[[Tensor], Tensor], *, idempotent: bool) -> Scalar:
        """P4: apply f once more to the iterate that began as the stage's first h."""
        base, iterate = self._base, self._iterate
        if self._is_adrift or base is None or iterate is None:
            return math.nan
        if not idempotent or iterate is base:
            self._iterate = f(iterate)
            self._drift = relative_change(self._iterate, base)
        return self._drift


def _mean(x: Tensor) -> Scalar:
    if not on_host(x.device):
        return x.mean(dtype=torch.float64)
    # the CPU sums float32 pairwise: exact to 1e-7, and four times as fast
    return float((x.mean() if x.dtype == torch.float32 else x.mean(dtype=torch.float64)).numpy())


def _share(x: Tensor) -> Scalar:
    count = torch.count_nonzero(x)
    if on_host(x.device):
        return int(count.numpy()) / max(1, x.numel())
    return count.double() / x.numel()
