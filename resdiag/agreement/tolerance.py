"""How far two runs that agree may differ: by what a repeat shows, or by what rounding explains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from resdiag.agreement.differences import Differences, Floats
from resdiag.runs.folder import Run

EPSILONS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Distance from 1 to the next larger number, by dtype."""

RECORDING = 32
"""Epsilons of float32 that the sums behind a recorded number may lose."""

KINKED = 2
"""Factor on the square root of epsilon times blocks passed, for gradients of ReLU networks.

Rounding moves a share of about epsilon of the units across the kink, where the slope jumps: the
gradient changes by about the square root of that share.
"""

MOST_KINKED = 0.1
"""Largest allowance for that, relative to the gradient."""

UPDATE = 0.01
"""Relative change of the weights by an update, as it is at most in most trainings."""

_KINKS = ("relu", "max_pool", "hard", "clamp", "threshold", "abs", "maximum", "shrink")

MARGIN = 10
"""Factor on what a repeat of the first run shows: another repeat may well show more."""


@dataclass(frozen=True)
class Tolerance:
    """The largest relative difference that counts as agreement, by metric, step and block.

    Attributes:
        kind: "repeat", "rounding", "given" or "none" (every difference counts).
        words: What it is, in words.
        rounding: What rounding explains, where that is needed.
        repeats: The differences that repeats of the first run showed, by metric.
        given: The number that was given.
    """

    kind: str
    words: str
    rounding: "Rounding | None" = None
    repeats: tuple[Mapping[str, Differences], ...] = ()
    given: float = 0.0

    def of(self, found: Differences) -> Floats:
        """The tolerance (S, B) of a metric at its steps and blocks."""
        if found.place.exact or self.kind == "none":
            return np.zeros_like(found.relative)
        if self.kind == "given":
            return np.full_like(found.relative, self.given)
        known = [shown for shown in self.noise(found.place.metric) if len(shown.steps)]
        if self.kind == "repeat" and known:
            largest = np.max([_spread(one, found) for one in known], axis=0)
            return np.asarray(MARGIN * largest)
        assert self.rounding is not None
        return self.rounding.of(found)

    def noise(self, metric: str) -> list[Differences]:
        """What the repeats showed of a metric; empty where none recorded it."""
        return [repeat[metric] for repeat in self.repeats if metric in repeat]


def _spread(shown: Differences, found: Differences) -> Floats:
    """The largest difference of a repeat over all blocks up to each step of `found`, (S, B)."""
    each = np.fmax.reduce(shown.relative, axis=1, initial=0.0)
    so_far = np.append(0.0, np.maximum.accumulate(each))
    known: Floats = so_far[np.searchsorted(shown.steps, found.steps, side="right")]
    return np.broadcast_to(known[:, None], found.relative.shape)


@dataclass(frozen=True)
class Rounding:
    """How large differences between equal computations are that round differently.

    A number behind p blocks may differ by s + 1 times (32 epsilons of float32, for the sums of the
    recorder, + p epsilons of the dtype) in step s, which has s updates behind it. The forward pass
    reaches block l (from 0) after l + 1 blocks, the loss after all n, the backward pass block l
    after 2 n - l. In networks with kinked functions, gradients and updates may differ by k (s + 1)
    more, with k the smaller of 2 ((2 n + 1) epsilon)^(1/2) and 0.1, and what comes after an update
    by 0.01 k (s + 1) more, as that is about what an update changes of the weights. These are first
    guesses: rounding can grow faster in a training, and a repeat shows how fast it does.

    Attributes:
        dtype: Of the arithmetic.
        blocks: n.
        is_kinked: Whether a block has a function such as ReLU, or does not say which it has.
    """

    dtype: str
    blocks: int
    is_kinked: bool

    @property
    def words(self) -> str:
        """What is allowed, in words."""
        epsilon = EPSILONS[self.dtype]
        kinks = "; gradients behind ReLU and the like more" if self.is_kinked else ""
        return (
            f"what rounding explains: {RECORDING * EPSILONS['float32']:.1e} + p x {epsilon:.1e} "
            f"(epsilon of {self.dtype}) behind p blocks{kinks}; times s + 1 in step s. A repeat of "
            "A would show how fast rounding grows in this training"
        )

    def of(self, found: Differences) -> Floats:
        """The tolerance (S, B) of a metric at its steps and blocks."""
        direction, epsilon = found.place.direction, EPSILONS[self.dtype]
        passed = np.full(len(found.blocks), 2.0 * self.blocks + 1)
        if found.place.per_block and direction == "forward":
            passed = found.blocks + 1.0
        elif found.place.per_block and direction == "backward":
            passed = 2.0 * self.blocks - found.blocks
        elif direction in ("data", "optimizer"):
            passed[:] = 1
        elif direction in ("forward", "loss"):
            passed[:] = self.blocks + 1
        limits = RECORDING * EPSILONS["float32"] + epsilon * passed
        limits = np.broadcast_to(limits, found.relative.shape)
        if self.is_kinked and direction not in ("data", "optimizer"):
            # all of a gradient's difference is in the gradients, UPDATE of it in the weights
            share = 1.0 if direction in ("backward", "update") else UPDATE * (found.steps > 0)
            whole = np.minimum(KINKED * np.sqrt(epsilon * (2.0 * self.blocks + 1)), MOST_KINKED)
            limits = limits + np.reshape(share * whole, (-1, 1))
        return np.asarray(limits * (found.steps[:, None] + 1.0))


def find_rounding(runs: Sequence[Run], stated: Sequence[str]) -> Rounding:
    """What rounding explains between runs of one network.

    Args:
        runs: The runs.
        stated: Dtypes that are known from elsewhere.
    """
    functions = [
        str(name)
        for block in runs[0].blocks
        for name in (*block.get("branch", ("relu",)), block.get("after_add", ""))
    ]
    is_kinked = any(kink in name.lower() for name in functions for kink in _KINKS)
    return Rounding(coarsest_dtype(runs, stated), len(runs[0].blocks), is_kinked)


def coarsest_dtype(runs: Sequence[Run], stated: Sequence[str] = ()) -> str:
    """The dtype with the largest epsilon that is stated, or that a run or a block of it says.

    float32 at least: numbers are stored in it.
    """
    said = [*stated, "float32"]
    for run in runs:
        said.append(str(getattr(run.config, "dtype", "")))
        said.append(str(run.environment.get("dtype", "")))
        said += [str(block.get("dtype", "")) for block in run.blocks]
    known = [name.removeprefix("torch.") for name in said]
    return max((name for name in known if name in EPSILONS), key=EPSILONS.__getitem__)
