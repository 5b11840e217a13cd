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

LEAST_SEEDS = Threshold(3, "Runs per depth; with fewer there is no spread to compare with.")
LEAST_GAP = Threshold(0.001, "0.1 percentage points of error.")
ERRORS = Threshold(2.0, "Standard errors of the difference.")
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
    """

    depth: int
    train: tuple[float, ...]
    test: tuple[float, ...]


@dataclass(frozen=True)
class Gap:
    """How much worse the deepest network ends than the best shallower one.

    Attributes:
        value: Difference of the mean errors, 0..1.
        limit: What it must exceed; NaN where one depth has a single run.
    """

    value: float
    limit: float

    @property
    def counts(self) -> bool:
        """Whether it exceeds its limit."""
        return self.value > self.limit

    def __str__(self) -> str:
        return f"{100 * self.value:+.2f} points (more than {100 * self.limit:.2f} would count)"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The conclusion on one network over its depths.

    Attributes:
        model: The network.
        name: "degraded", "overfit", "not_degraded" or "undecidable".
        summary: One sentence.
        depths: The numbers, shallowest first.
        finding: The finding, where there is one.
        best: Index of the depth that the deepest one is compared with; None without numbers.
        train: Gap of the training error; None without numbers.
        test: Gap of the test error; None without numbers.
    """

    model: str
    name: str
    summary: str
    depths: tuple[Depth, ...] = ()
    finding: Finding | None = field(default=None)
    best: int | None = None
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

    degraded: the mean final training error at the greatest depth exceeds that at the best smaller
    depth by more than 0.1 points and 2 standard errors, over 3 seeds or more each, and the test
    error does too. overfit: the test error does, and the training error does not. not_degraded:
    neither does, which shows no change and does not exclude one within the limits. undecidable
    where the training error does and the test error grows by less, where seeds or depths are
    missing, where runs differ in data or steps, and where some diverged.
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
        f"depth {depths[-1].depth} against {depths[gaps['best']].depth}: training error {train}, "
    )
    words += f"test error {test}"
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
    few = [d for d in depths if len(d.train) < LEAST_SEEDS]
    if few:
        number = len(few[0].train)
        return (
            f"{number} seed{'s' * (number != 1)} at depth {few[0].depth}, {LEAST_SEEDS} are needed"
        )
    for d in depths:
        lost = sum(not math.isfinite(a + b) for a, b in zip(d.train, d.test, strict=True))
        if lost:
            return f"{lost} of {len(d.train)} runs at depth {d.depth} have no final error"
    return ""


def _gaps(depths: Sequence[Depth]) -> dict[str, Any]:
    """The deepest network against the shallower one that ends best in training, where it can be."""
    whole = [bool(d.train) and np.isfinite([*d.train, *d.test]).all() for d in depths]
    known = [index for index, known in enumerate(whole[:-1]) if known]
    if not known or not whole[-1]:
        return {}
    best = min(known, key=lambda index: float(np.mean(depths[index].train)))
    train, test = (
        _gap(getattr(depths[-1], k), getattr(depths[best], k)) for k in ("train", "test")
    )
    return {"best": best, "train": train, "test": test}


def _depth(depth: int, runs: Sequence[Run]) -> Depth:
    mine = [run for run in runs if _depth_of(run) == depth]
    train, test = ([_last(run, f"{kind}_error") for run in mine] for kind in ("train", "test"))
    return Depth(depth=depth, train=tuple(train), test=tuple(test))


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


def _gap(deep: Sequence[float], shallow: Sequence[float]) -> Gap:
    """Difference of the means, and what it must exceed."""
    a, b = np.asarray(deep), np.asarray(shallow)
    if min(len(a), len(b)) < 2:
        return Gap(float(a.mean() - b.mean()), math.nan)
    error = math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    return Gap(float(a.mean() - b.mean()), max(LEAST_GAP, ERRORS * error))


def _finding(name: str, words: str, gap: Gap) -> Finding:
    why = {
        "degraded": "The deeper network could copy the shallower one and does worse in training: "
        "it is not optimised, not overfitted.",
        "overfit": "The deeper network is not worse on what it is trained on: more depth overfits.",
    }[name]
    evidence = Evidence(
        metric="train_error" if name == "degraded" else "test_error", value=gap.value,
        threshold=gap.limit, text=words, source=_SOURCE,
    )  # fmt: skip
    return Finding(
        name=name, cause=name, summary=words[:1].upper() + words[1:] + ".", why=why,
        evidence=(evidence,), next=("resdiag plot curves RUN...",),
    )  # fmt: skip
