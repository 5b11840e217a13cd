"""Findings: what one rule saw, as numbers with their thresholds and sources.

JSON has no NaN and no infinity: `plain` writes NaN as null and the infinities as "inf" and "-inf".
"""

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One number beside the threshold that it crossed.

    Attributes:
        metric: Id in `resdiag.watch.catalog.METRICS`, or of the curve table.
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
        name: Name of the rule, one of `resdiag.explain.verdict.NAMES` without "healthy".
        step: Step since when; None if it covers the run.
        block: First block concerned, forward order; None if none can be named.
        summary: One sentence: what happened, where, when.
        why: One or two sentences: the mechanism, theory beside measurement.
        evidence: The numbers.
        next: Commands to run next.
    """

    name: str
    step: int | None = None
    block: int | None = None
    summary: str
    why: str
    evidence: tuple[Evidence, ...]
    next: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON-safe values, see `plain`."""
        return {name: plain(value) for name, value in asdict(self).items()}


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
