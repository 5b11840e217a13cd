"""What is shown of a running training: its last step, its losses, its blocks, its findings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from resdiag.diagnose.finding import plain
from resdiag.diagnose.verdict import Verdict
from resdiag.runs.folder import Run, columns_of
from resdiag.training.curve import MostChangedBlock

STRIP = "grad_output"
"""The metric of the strip of blocks."""

_NONFINITE = "output_nonfinite", "grad_nonfinite"
_POINTS = 400  # of a curve that is shown


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A training as of its last recorded step; plain data, so that a page can be sent it.

    Attributes:
        label: The network.
        status: "running", or as the run says.
        step: The last step that is known, from 0; -1 before the first one.
        steps: How many there will be; 0 if that is not known.
        losses: Pairs of step and loss, thinned to a few hundred.
        gradients: Norm of the gradient at each block's output; infinite where it or the output is
            not finite, NaN where it is unknown.
        names: The blocks' names.
        worst: The block that changed most since the first step, in words.
        verdict: Name of the verdict so far; "" if it was not judged.
        findings: One line for each finding of the verdict, the verdict's own first.
    """

    label: str
    status: str
    step: int
    steps: int
    losses: tuple[tuple[int, float], ...]
    gradients: tuple[float, ...]
    names: tuple[str, ...]
    worst: str
    verdict: str = ""
    findings: tuple[str, ...] = ()

    @property
    def loss(self) -> float:
        """The last loss; NaN if none was told."""
        return self.losses[-1][1] if self.losses else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: NaN becomes null, infinities "inf" and "-inf"."""
        return {name: plain(value) for name, value in self.__dict__.items()}


def take_snapshot(run: Run, verdict: Verdict | None, *, running: bool = False) -> Snapshot:
    """What is to be shown of a run.

    Args:
        run: As of now.
        verdict: The last one on it, perhaps of some steps ago.
        running: Whether it is going on, whatever the run says of its status.
    """
    table = columns_of(run.metrics([STRIP, *_NONFINITE]))
    curve = run.curve()
    told = curve.dropna(subset=["loss"])
    steps = table.get("step", np.array([]))
    last = max([*curve["step"][-1:], *steps[-1:], -1])
    worst = MostChangedBlock()
    strip = np.full(len(run.blocks), math.nan)
    if len(steps):
        rows = steps == steps[-1]
        values = np.asarray(table[STRIP][rows], dtype=float)
        for name in _NONFINITE:
            values[~np.isfinite(values) & (table[name][rows] > 0)] = math.inf
        strip[table["block"][rows]] = values
        worst.update(table)
    return Snapshot(
        label=run.label,
        status="running" if running else run.status,
        step=int(last),
        steps=run.config.steps if run.config.steps > run.steps else 0,
        losses=thin(
            [
                (int(step), float(loss))
                for step, loss in zip(told["step"], told["loss"], strict=True)
            ]
        ),
        gradients=tuple(map(float, strip)),
        names=tuple(str(block.get("name", "")) for block in run.blocks),
        worst=worst.words,
        verdict=verdict.name if verdict else "",
        findings=tuple(_lines(verdict)) if verdict else (),
    )


def _lines(verdict: Verdict) -> list[str]:
    """A line for each finding: name, since when, where, and what."""
    lines = []
    for finding in verdict.findings:
        place = [] if finding.step is None else [f"step {finding.step}"]
        place += [] if finding.block is None else [f"block {finding.block}"]
        where = f" ({', '.join(place)})" if place else ""
        lines.append(f"{finding.name}{where}: {finding.summary}")
    return lines


def thin(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """At most a few hundred points: the last one, and every k-th before it."""
    every = math.ceil(len(points) / _POINTS) or 1
    return tuple(points[::-1][::every][::-1])
