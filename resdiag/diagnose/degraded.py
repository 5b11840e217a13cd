"""Degradation: a training error that grows with depth. It takes several runs, and seeds.

Source: He et al. 2015, arXiv:1512.03385, section 1: the deeper network has the higher *training*
error, so it is not overfitting.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from resdiag.diagnose.finding import DEFINITION, Evidence, Finding, Threshold, plain
from resdiag.runs.folder import Run
from resdiag.runs.watched_config import WatchedConfig
from resdiag.theory.intervals import PERCENT, Interval, difference

LEAST_SEEDS = Threshold(3, "Runs per depth; with fewer there is no spread to compare with.")
LEAST_GAP = Threshold(0.001, "0.1 percentage points of error.")
CLOSE = "the training error grows, the test error by no more than the seeds scatter"
"""Why more seeds would have to decide."""

_SOURCE = "He et al. 2015, arXiv:1512.03385; " + DEFINITION


@dataclass(frozen=True, kw_only=True)
class Depth:
    """What the runs of one network and depth ended with.

    Attributes:
        depth: Weighted layers.
        train: Final training errors, one per run, 0..1; NaN where a run diverged.
        test: Final test errors, likewise.
        seeds: Their seeds, likewise; empty if not known.
    """

    depth: int
    train: tuple[float, ...]
    test: tuple[float, ...]
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Gap:
    """How much worse the deepest network ends than the shallowest, which is fixed beforehand.

    The best of several shallower ones would be chosen by its luck: under no change at all, that
    reports a degradation more often than the level says.

    Attributes:
        interval: Difference of the mean errors, 0..1.
    """

    interval: Interval

    @property
    def value(self) -> float:
        """Difference of the mean errors, 0..1."""
        return self.interval.value

    @property
    def counts(self) -> bool:
        """Whether it exceeds `LEAST_GAP` and its interval lies above 0."""
        return self.value > LEAST_GAP and self.interval.low > 0

    def __str__(self) -> str:
        return f"{points(self.interval)} points"


def points(interval: Interval) -> str:
    """A difference of error rates in points, with its interval where there is one.

    >>> points(Interval(0.0407, 0.0291, 0.0523, 3)), points(Interval(0.01))
    ('+4.07 [2.91, 5.23]', '+1.00')
    """
    value = f"{100 * interval.value:+.2f}"
    if math.isnan(interval.low):
        return value
    return f"{value} [{100 * interval.low:.2f}, {100 * interval.high:.2f}]"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The conclusion on one network over its depths.

    Attributes:
        model: The network.
        name: "degraded", "overfit", "not_degraded" or "undecidable".
        summary: One sentence.
        depths: The numbers, shallowest first.
        finding: The finding, where there is one.
        train: Gap of the training error; None without numbers.
        test: Gap of the test error; None without numbers.
    """

    model: str
    name: str
    summary: str
    depths: tuple[Depth, ...] = ()
    finding: Finding | None = field(default=None)
    train: Gap | None = None
    test: Gap | None = None

    def to_dict(self) -> dict[str, object]:
        """For JSON, see `plain`."""
        depths = [
            {"depth": d.depth, "train_error": list(d.train), "test_error": list(d.test)}
            for d in self.depths
        ]
        finding = None if self.finding is None else self.finding.to_dict()
        fields = {"model": self.model, "name": self.name, "summary": self.summary}
        return {**fields, "depths": plain(depths), "finding": finding}


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """One conclusion per network of the runs, in order of first appearance.

    degraded: the mean final training error at the greatest depth exceeds that at the smallest by
    more than 0.1 points, and the 95 % interval of the difference lies above 0, over 3 seeds or more
    each, and both hold of the test error too. overfit: they hold of the test error, and not of the
    training error. not_degraded: they hold of neither, which shows no change and does not exclude
    one within the interval. undecidable where they hold of the training error and the test error
    grows by less, where seeds or depths are missing, where runs differ in data or steps, and where
    some diverged. The intervals are t intervals of the differences seed by seed, where both depths
    were run with the same seeds; else Welch's.
    """
    models = dict.fromkeys(run.config.model for run in runs)
    return [_conclude(m, [run for run in runs if run.config.model == m]) for m in models]


def _conclude(model: str, runs: Sequence[Run]) -> Comparison:
    depths = tuple(_depth(d, runs) for d in sorted({_depth_of(run) for run in runs}))
    for what in ("data", "steps"):
        values = {getattr(run.config, what) for run in runs}
        if len(values) > 1:
            reason = f"the runs differ in {what}: {', '.join(sorted(map(str, values)))}"
            return compare_depths(model, depths, reason)
    return compare_depths(model, depths)


def compare_depths(model: str, depths: Sequence[Depth], reason: str = "") -> Comparison:
    """The conclusion of `compare` from numbers.

    Args:
        model: What the network is called.
        depths: At least one, shallowest first.
        reason: Why nothing can be said, if that is known already.
    """
    depths = tuple(depths)
    gaps = _gaps(depths)
    reason = _obstacle(depths) or reason
    if reason or not gaps:
        return Comparison(
            model=model,
            name="undecidable",
            summary=f"Degradation: {reason}.",
            depths=depths,
            **gaps,
        )
    train, test = gaps["train"], gaps["test"]
    words = (
        f"depth {depths[-1].depth} against {depths[0].depth}: training error {train}, "
        f"test error {test}, with {PERCENT} intervals"
    )
    if train.counts and not test.counts and test.value > 0:
        return Comparison(
            model=model,
            name="undecidable",
            summary=f"Degradation: {CLOSE}: {words}.",
            depths=depths,
            **gaps,
        )
    if not test.counts:
        return Comparison(
            model=model, name="not_degraded", summary=f"{words}.", depths=depths, **gaps
        )
    name = "degraded" if train.counts else "overfit"
    finding = _finding(name, words, train if name == "degraded" else test)
    return Comparison(
        model=model, name=name, summary=finding.summary, depths=depths, finding=finding, **gaps
    )


def _obstacle(depths: Sequence[Depth]) -> str:
    """Why the numbers do not decide, or ""."""
    if len(depths) < 2:
        return f"runs of one depth only ({depths[0].depth}), two are needed"
    ends = (depths[0], depths[-1])
    few = [d for d in ends if len(d.train) < LEAST_SEEDS]
    if few:
        number = len(few[0].train)
        return (
            f"{number} seed{'s' * (number != 1)} at depth {few[0].depth}, {LEAST_SEEDS} are needed"
        )
    for d in ends:
        lost = sum(not math.isfinite(a + b) for a, b in zip(d.train, d.test, strict=True))
        if lost:
            return f"{lost} of {len(d.train)} runs at depth {d.depth} have no final error"
    return ""


def _gaps(depths: Sequence[Depth]) -> dict[str, Any]:
    """The deepest network against the shallowest, where both have all their numbers."""
    shallow, deep = depths[0], depths[-1]
    whole = (bool(d.train) and np.isfinite([*d.train, *d.test]).all() for d in (shallow, deep))
    if len(depths) < 2 or not all(whole):
        return {}
    seeds = (deep.seeds, shallow.seeds)
    return {
        kind: Gap(difference(getattr(deep, kind), getattr(shallow, kind), seeds))
        for kind in ("train", "test")
    }


def _depth(depth: int, runs: Sequence[Run]) -> Depth:
    mine = [run for run in runs if _depth_of(run) == depth]
    train, test = ([_last(run, f"{kind}_error") for run in mine] for kind in ("train", "test"))
    seeds = tuple(run.config.seed for run in mine)
    return Depth(depth=depth, train=tuple(train), test=tuple(test), seeds=seeds)


def _depth_of(run: Run) -> int:
    return len(run.blocks) if isinstance(run.config, WatchedConfig) else run.config.depth


def _last(run: Run, column: str) -> float:
    """The last error that was evaluated; NaN for a run that has not come to its end."""
    if run.status != "done":
        return math.nan
    frame = run.curve()
    if column not in frame:
        return math.nan
    known = frame[column].dropna().to_numpy(dtype=float)
    return float(known[-1]) if len(known) else math.nan


def _finding(name: str, words: str, gap: Gap) -> Finding:
    why = {
        "degraded": "The deeper network could copy the shallower one and does worse in training: "
        "it is not optimised, not overfitted.",
        "overfit": "The deeper network is not worse on what it is trained on: more depth overfits.",
    }[name]
    evidence = Evidence(
        metric="train_error" if name == "degraded" else "test_error", value=gap.value,
        threshold=float(LEAST_GAP), text=words, source=_SOURCE,
    )  # fmt: skip
    return Finding(
        name=name, cause=name, summary=words[:1].upper() + words[1:] + ".", why=why,
        evidence=(evidence,), next=("resdiag plot curves RUN...",),
    )  # fmt: skip
