"""Degradation: a training error that grows with depth. It takes several runs, and seeds.

Source: He et al. 2015, arXiv:1512.03385, section 1: the deeper network has the higher *training*
error, so it is not overfitting.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from resdiag.explain.finding import Evidence, Finding, plain
from resdiag.runs.folder import Run
from resdiag.runs.watched import WatchedConfig

LEAST_SEEDS = 3
"""Runs per depth; with fewer there is no spread to compare with."""

LEAST_GAP = 0.001
"""0.1 percentage points of error."""

ERRORS = 2.0
"""Standard errors of the difference."""

_SOURCE = "He et al. 2015, arXiv:1512.03385; definition of resdiag.explain.degraded"


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


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The conclusion on one network over its depths.

    Attributes:
        model: The network.
        name: "degraded", "overfit", "not_degraded" or "undecidable".
        summary: One sentence.
        depths: The numbers, shallowest first.
        finding: The finding, where there is one.
    """

    model: str
    name: str
    summary: str
    depths: tuple[Depth, ...] = ()
    finding: Finding | None = field(default=None)

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
    error does too. overfit: the test error does, and the training error does not. Else
    not_degraded. undecidable where seeds or depths are missing, where runs differ in data or steps,
    and where some diverged.
    """
    models = dict.fromkeys(run.config.model for run in runs)
    return [_conclude(m, [run for run in runs if run.config.model == m]) for m in models]


def _conclude(model: str, runs: Sequence[Run]) -> Comparison:
    depths = tuple(_depth(d, runs) for d in sorted({_depth_of(run) for run in runs}))
    reason = _obstacle(runs, depths)
    if reason:
        return Comparison(
            model=model, name="undecidable", summary=f"Degradation: {reason}.", depths=depths
        )
    last = depths[-1]
    best = min(depths[:-1], key=lambda d: float(np.mean(d.train)))
    train, test = (_gap(getattr(last, k), getattr(best, k)) for k in ("train", "test"))
    words = f"depth {last.depth} against {best.depth}: training error {_points(train)}, "
    words += f"test error {_points(test)}"
    name = "not_degraded"
    if test[0] > test[1]:
        name = "degraded" if train[0] > train[1] else "overfit"
    if name == "not_degraded":
        return Comparison(model=model, name=name, summary=f"{words}.", depths=depths)
    finding = _finding(name, words, train if name == "degraded" else test)
    return Comparison(
        model=model, name=name, summary=finding.summary, depths=depths, finding=finding
    )


def _obstacle(runs: Sequence[Run], depths: Sequence[Depth]) -> str:
    """Why nothing can be said, or ""."""
    if len(depths) < 2:
        return f"runs of one depth only ({depths[0].depth}), two are needed"
    few = [d for d in depths if len(d.train) < LEAST_SEEDS]
    if few:
        return f"{len(few[0].train)} seeds at depth {few[0].depth}, {LEAST_SEEDS} are needed"
    for what in ("data", "steps"):
        values = {getattr(run.config, what) for run in runs}
        if len(values) > 1:
            return f"the runs differ in {what}: {', '.join(sorted(map(str, values)))}"
    for d in depths:
        lost = sum(not math.isfinite(a + b) for a, b in zip(d.train, d.test, strict=True))
        if lost:
            return f"{lost} of {len(d.train)} runs at depth {d.depth} have no final error"
    return ""


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


def _gap(deep: Sequence[float], shallow: Sequence[float]) -> tuple[float, float]:
    """Difference of the means, and what it must exceed."""
    a, b = np.asarray(deep), np.asarray(shallow)
    error = math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    return float(a.mean() - b.mean()), max(LEAST_GAP, ERRORS * error)


def _points(gap: tuple[float, float]) -> str:
    return f"{100 * gap[0]:+.2f} points (more than {100 * gap[1]:.2f} would count)"


def _finding(name: str, words: str, gap: tuple[float, float]) -> Finding:
    why = {
        "degraded": "The deeper network could copy the shallower one and does worse in training: "
        "it is not optimised, not overfitted.",
        "overfit": "The deeper network is not worse on what it is trained on: more depth overfits.",
    }[name]
    evidence = Evidence(
        metric="train_error" if name == "degraded" else "test_error", value=gap[0],
        threshold=gap[1], text=words, source=_SOURCE,
    )  # fmt: skip
    return Finding(
        name=name, cause=name, summary=words[:1].upper() + words[1:] + ".", why=why,
        evidence=(evidence,), next=("resdiag plot curves RUN...",), confidence=0.95,
    )  # fmt: skip
