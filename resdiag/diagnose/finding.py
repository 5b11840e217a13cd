"""Findings: what one rule saw, as numbers with their thresholds and sources.

JSON has no NaN and no infinity: `plain` writes NaN as null and the infinities as "inf" and "-inf".
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TypeAlias


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One number beside the threshold that it crossed.

    Attributes:
        metric: Id in `resdiag.catalog.table.METRICS`, or of the curve table.
        step: Step it was read at; None if it covers the run.
        block: Block index; None if it belongs to the whole network.
        value: What was measured.
        threshold: What it was compared with; NaN where it only illustrates.
        text: One sentence for people.
        source: Where the rule or the number beside it comes from.
    """

    metric: str
    step: int | None = None
    block: int | None = None
    value: float
    threshold: float = math.nan
    text: str
    source: str

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON-safe values, see `plain`."""
        return {name: plain(value) for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One rule that fired.

    Attributes:
        name: Name of the rule, one of `resdiag.diagnose.verdict.NAMES` without "healthy".
        step: Step since when; None if it covers the run.
        block: First block concerned, forward order; None if none can be named.
        summary: One sentence: what happened, where, when.
        why: One or two sentences: the mechanism, theory beside measurement.
        evidence: The numbers.
        next: Commands to run next.
        cause: The cause in a few words, for tables and programs.
        confidence: 0.5 at a threshold, towards 1 far beyond it, see `confidence`; no probability.
    """

    name: str
    step: int | None = None
    block: int | None = None
    summary: str
    why: str
    evidence: tuple[Evidence, ...]
    next: tuple[str, ...] = ()
    cause: str = ""
    confidence: float = 0.9

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON-safe values, see `plain`."""
        return {name: plain(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class NotJudged:
    """A rule that could not be applied, and why.

    Attributes:
        name: The rule.
        reason: What is missing.
        needs: How much a longer run would have to have, such as "20 steps"; "" where more of the
            same would not help.
    """

    name: str
    reason: str
    needs: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


Outcome: TypeAlias = Iterator[Finding | NotJudged]
"""What a rule yields: what it found, or could not judge."""


def confidence(value: float, threshold: float) -> float:
    """How far a number lies beyond its threshold: 0.5 at it, 0.75 at its double, 0.9 at ten times.

    Args:
        value: Positive; whichever side of the threshold it is on.
        threshold: Positive.

    >>> confidence(2.8, 1.4), confidence(0.0, 1e-6), confidence(1.4, 1.4)
    (0.75, 0.99, 0.5)
    """
    if not (value > 0 and threshold > 0 and math.isfinite(value)):
        return 0.99
    octaves = abs(math.log2(value / threshold))
    return round(min(0.99, 1 - 0.5 / (1 + octaves)), 2)


def plain(value: object) -> object:
    """A copy of `value` that strict JSON can hold.

    >>> plain({"loss": float("inf"), "gain": float("nan"), "steps": (1, 2.5)})
    {'loss': 'inf', 'gain': None, 'steps': [1, 2.5]}
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        number = float(value)  # numpy's float64 is a float, but prints its type
        return number if math.isfinite(number) else None if math.isnan(number) else str(number)
    return value
