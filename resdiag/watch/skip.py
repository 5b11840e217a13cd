"""The skip path of one forward pass: what the after-adds do to it, block after block.

Everything here is measured on the first samples of a batch: the definitions are averages over units
(sample, channel, position), and carrying one number per unit through all blocks costs as much as a
batch of activations.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resdiag.watch.calls import Call, compose
from resdiag.watch.metrics import norms, relative_change, relative_changes, slope

COLUMNS = (
    "perturbation",
    "identity_defect",
    "skip_gain_stage",
    "skip_gain",
    "identity_drift",
    "branch_ratio",
    "negative_fraction",
    "slope_mean",
    "slope_mean_sq",
)
"""What `SkipPath.close` returns, in order; the branch ratio is filled in elsewhere."""

NOT_ELEMENTWISE = "the after-add is a normalisation: it has no slope per unit"
MIXED = "a projection shortcut mixes units: no unit gradient leads through it"
BROKEN = "something stands between the blocks: no skip path leads through it"
_PER_UNIT = ("identity_defect", "identity_drift", "slope_mean", "slope_mean_sq")


class _Chain:
    """One number per unit carried along the shortcuts: the product of the slopes on the way.

    Attributes:
        lost: Why the product cannot be known any more, or "".
    """

    def __init__(self) -> None:
        self.lost = ""
        self._product: Tensor | None = None  # None: 1 for every unit
        self._alive: Tensor | None = None  # 1 where a unit leads back to the chain's beginning

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

    def multiply(self, factor: Tensor) -> None:
        """Pass an after-add with slopes `factor`, one per unit or one for all."""
        before = self._product
        if before is not None and factor.dim() and before.shape != factor.shape:
            self.lose(BROKEN)
        elif not self.lost:
            self._product = factor if before is None else before * factor

    def extend(self, factors: Sequence[Tensor], like: Tensor) -> list[Tensor]:
        """Pass after-adds in a row; after each, the mean over the surviving units, NaN if lost."""
        means = []
        alive = None if self._alive is None else _mean(self._alive)
        for factor in factors:
            self.multiply(factor)
            if self.lost:
                means.append(_nan(like))
            else:
                assert self._product is not None
                mean = _mean(self._product)
                means.append(mean if alive is None else mean / alive)
        return means

    def alive(self, units: float) -> float | Tensor:
        """How many of so many units survive."""
        return units if self._alive is None else self._alive.sum(dtype=torch.float64)

    def mean(self, like: Tensor) -> Tensor:
        """Mean over the surviving units; NaN once it is lost."""
        if self.lost:
            return _nan(like)
        if self._product is None:
            return like.new_ones((), dtype=torch.float64)
        if self._alive is None:
            return _mean(self._product)
        return _mean(self._product) / _mean(self._alive)


@dataclass(eq=False)
class _Passage:
    """One block's first samples, copied while the forward pass runs, measured when it has ended.

    Attributes:
        row: The block.
        x: Block input where its shape is needed, else None.
        h: Shortcut output, as it goes into the sum.
        path: Calls of a parameter-free shortcut, () for the identity, None for a projection.
        scale: Factor on the shortcut inside the addition.
        new: Whether a stage begins.
        joined: Whether the input is the output of the block before.
        u: The sum before the after-add.
        after: The after-add's calls, () for none.
        output: The block's output where it cannot be computed from u, else None.
    """

    row: int
    x: Tensor | None
    h: Tensor
    path: tuple[Call, ...] | None
    scale: float
    new: bool
    joined: bool
    u: Tensor
    after: tuple[Call, ...] = ()
    output: Tensor | None = None

    def like(self, other: "_Passage") -> bool:
        """Whether the after-adds do the same; arguments with tensors are never taken as equal."""
        pairs = zip(self.after, other.after, strict=False)
        return len(self.after) == len(other.after) and all(
            a.function is b.function and _plain(a) == _plain(b) is not None for a, b in pairs
        )


class SkipPath:
    """Running products of after-add slopes (P3) and iterates of the after-add (P4).

    While the forward pass runs, only the first samples are copied; `finish` measures all blocks in
    one go: the same operations cost a third of what they cost between two convolutions.

    Args:
        samples: Samples at the head of the batch to look at; None for all.

    Attributes:
        weigh: Told each block's row, values, and what each value is a mean over: the sum of squares
            or the number of units below its fraction bar.
    """

    def __init__(self, samples: int | None) -> None:
        self._samples = samples
        self.weigh: Callable[[int, Tensor, list[float | Tensor]], None] | None = None
        self.reset()

    def reset(self) -> None:
        """Begin a forward pass, or let go of the last one."""
        self._stage, self._whole = _Chain(), _Chain()
        self._drift: tuple[Tensor, Tensor] | None = None  # h at the stage's first block, iterate
        self._passages: dict[int, _Passage] = {}

    def head(self, x: Tensor) -> Tensor:
        """The samples looked at, detached."""
        return x.detach()[: self._samples]

    def open(
        self,
        row: int,
        x: Tensor | None,
        h: Tensor,
        path: tuple[Call, ...] | None,
        scale: float,
        *,
        new: bool,
        joined: bool,
    ) -> None:
        """Pass a block's shortcut.

        Args:
            row: The block.
            x: Block input, None if unknown.
            h: Shortcut output, as it goes into the sum.
            path: Calls of a parameter-free shortcut, () for the identity, None for a projection.
            scale: Factor on the shortcut inside the addition.
            new: Whether a stage begins: the per-stage products start again.
            joined: Whether the input is the output of the block before, or this is the first.
        """
        h = self.head(h).clone()
        shape = self.head(x) if x is not None and path else None
        path = None if x is None else path
        self._passages[row] = _Passage(row, shape, h, path, scale, new, joined, h)

    def add(self, row: int, u: Tensor) -> None:
        """Pass a block's sum, before an in-place after-add overwrites it."""
        self._passages[row].u = self.head(u).clone()

    def close(self, row: int, output: Tensor, after: tuple[Call, ...]) -> None:
        """Pass a block's end.

        Args:
            row: The block.
            output: The block's output.
            after: The after-add's calls, () for none.
        """
        passage = self._passages[row]
        passage.after = after
        if not all(call.is_activation for call in after):
            passage.output = self.head(output).clone()

    def finish(self) -> Iterator[tuple[int, Tensor, dict[str, str]]]:
        """Measure the blocks in forward order.

        Yields:
            Row; (9,) float64, see `COLUMNS`, NaN where undefined; why columns are NaN.
        """
        for alike in _runs(self._passages.values()):
            self._cross(alike[0])
            values = self._measure(alike)
            missing = self._missing(alike[0].after)
            if self.weigh is not None:
                for passage, value in zip(alike, values, strict=True):
                    self.weigh(passage.row, value, self._weights(passage))
            for passage, value in zip(alike, values, strict=True):
                yield passage.row, value, missing
        self.reset()

    def _cross(self, passage: _Passage) -> None:
        """Lead the running products through the block's shortcut."""
        if passage.new:
            self._stage, self._drift = _Chain(), None
        path = passage.path
        for chain in (self._whole,) if passage.new else (self._stage, self._whole):
            if not passage.joined:
                chain.lose(BROKEN)
            if path is None or any(call.is_activation for call in path):
                chain.lose(MIXED)
            elif passage.x is not None:
                chain.cross(passage.x, path)
        if passage.scale != 1:
            factor = passage.h.new_full((), passage.scale)
            for chain in (self._stage, self._whole):
                chain.multiply(factor)

    def _measure(self, alike: list[_Passage]) -> list[Tensor]:
        """The after-adds of blocks in a row that differ in nothing but their samples."""
        first = alike[0]
        if first.output is not None:
            return [self._unmeasurable(p.u, p.output) for p in alike if p.output is not None]
        if not first.after:
            return [self._untouched(p.u) for p in alike]
        # block by block, not stacked: temporaries that fit a cache are reused, large ones are not
        f = compose(first.after)
        sums, shortcuts = [p.u for p in alike], [p.h for p in alike]
        slopes = [slope(f, u) for u in sums]
        like = sums[0]
        columns = [
            relative_changes(map(f, sums), sums),
            relative_changes(map(f, shortcuts), shortcuts),
            *(torch.stack(chain.extend(slopes, like)) for chain in (self._stage, self._whole)),
            self._advance(f, shortcuts),
            _nan(like).expand(len(alike)),
            torch.stack([_share(u < 0) for u in sums]),
            torch.stack([_mean(x) for x in slopes]),
            norms(slopes).square() / slopes[0].numel(),
        ]
        return list(torch.stack(columns, dim=1).unbind())

    def _weights(self, passage: _Passage) -> list[float | Tensor]:
        """The denominators of the values of a block just measured, in the order of `COLUMNS`."""
        units = float(passage.u.numel())
        sums, shortcuts = norms([passage.u, passage.h]).square().unbind()
        base = units if self._drift is None else norms([self._drift[0]])[0].square()
        alive = [chain.alive(units) for chain in (self._stage, self._whole)]
        return [sums, shortcuts, *alive, base, units, units, units, units]

    def _missing(self, after: tuple[Call, ...]) -> dict[str, str]:
        """Why columns of the block just measured are NaN."""
        reasons = {"skip_gain_stage": self._stage.lost, "skip_gain": self._whole.lost}
        if not all(call.is_activation for call in after):
            reasons |= dict.fromkeys(_PER_UNIT, NOT_ELEMENTWISE)
        return {column: reason for column, reason in reasons.items() if reason}

    def _untouched(self, u: Tensor) -> Tensor:
        """No after-add: P1 = P2 = 0, slope 1, by definition rather than by rounding."""
        zero, one = u.new_zeros((), dtype=torch.float64), u.new_ones((), dtype=torch.float64)
        drift = zero if self._drift is None else relative_change(*reversed(self._drift))
        negative = _share(u < 0)
        return torch.stack([zero, zero, *self._gains(u), drift, _nan(u), negative, one, one])

    def _unmeasurable(self, u: Tensor, output: Tensor) -> Tensor:
        """A normalisation after the addition: only what it does to the sum can be said."""
        self._stage.lose(NOT_ELEMENTWISE)
        self._whole.lose(NOT_ELEMENTWISE)
        nan = _nan(u)
        return torch.stack([relative_change(output, u), *[nan] * 5, _share(u < 0), nan, nan])

    def _gains(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """P3 since the stage began, and since the first block."""
        return self._stage.mean(u), self._whole.mean(u)

    def _advance(self, f: Callable[[Tensor], Tensor], shortcuts: Sequence[Tensor]) -> Tensor:
        """P4: apply f once more per block to the iterate that began as the stage's first h."""
        base, iterate = self._drift or (shortcuts[0], shortcuts[0])

        def again() -> Iterator[Tensor]:
            nonlocal iterate
            for _ in shortcuts:
                iterate = f(iterate)
                yield iterate

        changes = relative_changes(again(), [base] * len(shortcuts))
        self._drift = base, iterate
        return changes


def _plain(call: Call) -> str | None:
    """A call's arguments as text; None if one is a tensor."""
    values = [*call.args, *call.kwargs.values()]
    return None if any(isinstance(v, Tensor) for v in values) else f"{call.args} {call.kwargs}"


def _runs(passages: Iterable[_Passage]) -> Iterator[list[_Passage]]:
    """Split into blocks in a row that share an after-add and are joined by plain identities."""
    run: list[_Passage] = []
    for passage in passages:
        plain = passage.joined and not passage.new and passage.path == () and passage.scale == 1
        if run and not (plain and passage.u.shape == run[0].u.shape and passage.like(run[0])):
            yield run
            run = []
        run.append(passage)
    if run:
        yield run


def _mean(x: Tensor) -> Tensor:
    if x.is_cpu and x.dtype == torch.float32:
        return x.mean().double()  # the CPU sums pairwise: exact to 1e-7, and four times as fast
    return x.mean(dtype=torch.float64)


def _share(x: Tensor) -> Tensor:
    """Share of True."""
    return torch.count_nonzero(x).double() / max(1, x.numel())


def _nan(like: Tensor) -> Tensor:
    return torch.full((), torch.nan, dtype=torch.float64, device=like.device)
