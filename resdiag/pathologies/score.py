"""How often the verdict was right: rates with their intervals, the confusion matrix, the misses."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from resdiag.diagnose.finding import plain
from resdiag.diagnose.registry import FINDINGS, HEALTHY, UNDETERMINED
from resdiag.pathologies.result import CRASHED, Result

NORMAL = 1.959963984540054
"""Quantile 0.975 of the standard normal distribution, for intervals of 95 %."""
NEAR = 2
"""Steps by which a date may be off to count as right."""


def wilson(successes: int, trials: int, z: float = NORMAL) -> tuple[float, float]:
    """Wilson's interval of a share (Wilson 1927), without a correction for continuity.

    Args:
        successes: How many.
        trials: Of how many; without any, nothing is known and the interval is 0 to 1.
        z: Quantile of the standard normal distribution.

    >>> [round(bound, 3) for bound in wilson(9, 10)]
    [0.596, 0.982]
    """
    if not trials:
        return 0.0, 1.0
    share, extra = successes / trials, z * z / trials
    middle = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * math.sqrt(share * (1 - share) / trials + extra / (4 * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Rate:
    """A share with its interval of 95 %.

    Attributes:
        count: How many.
        of: Of how many.
    """

    count: int
    of: int

    @property
    def value(self) -> float:
        """The share; NaN of nothing."""
        return self.count / self.of if self.of else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval."""
        return wilson(self.count, self.of)

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        low, high = self.interval
        return {
            "count": self.count,
            "of": self.of,
            "value": plain(self.value),
            "interval": [low, high],
        }

    def __str__(self) -> str:
        if not self.of:
            return "-"
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}] ({self.count} of {self.of})"


def rate(results: Iterable[Result], holds: Callable[[Result], bool]) -> Rate:
    """The share of results of which something holds."""
    marks = [holds(result) for result in results]
    return Rate(sum(marks), len(marks))


@dataclass(frozen=True)
class Score:
    """The score of some results.

    Faults without an effect, where that was compared with a healthy twin, count nowhere but in
    `harmless`. A case that crashed counts as a miss.

    Attributes:
        results: The results.
    """

    results: Sequence[Result]

    @cached_property
    def counted(self) -> list[Result]:
        """Without faults that have no effect."""
        return [r for r in self.results if r.is_healthy or r.is_planted]

    @cached_property
    def planted(self) -> list[Result]:
        """Trainings with a fault that counts."""
        return [r for r in self.results if r.is_planted]

    @cached_property
    def healthy(self) -> list[Result]:
        """Trainings without a fault."""
        return [r for r in self.results if r.is_healthy]

    @cached_property
    def found(self) -> list[Result]:
        """Planted faults that the verdict names, with their cause."""
        return [r for r in self.planted if r.is_right]

    @property
    def precision(self) -> Rate:
        """Share of right verdicts among those that name a fault."""
        return rate(
            [r for r in self.counted if r.names_a_fault], lambda r: r.is_planted and r.is_right
        )

    @property
    def recall(self) -> Rate:
        """Share of planted faults that the verdict names, with their cause."""
        return rate(self.planted, lambda r: r.is_right)

    @property
    def block_named(self) -> Rate:
        """Share of found faults in a block whose block is named."""
        return rate([r for r in self.found if r.blocks], lambda r: r.names_the_block)

    @property
    def date_near(self) -> Rate:
        """Share of found faults that are dated to within `NEAR` steps."""
        return rate(self.found, lambda r: r.date_error <= NEAR)

    @property
    def date_error(self) -> float:
        """Median of the steps between a found fault's begin and its date; NaN without any."""
        errors = [r.date_error for r in self.found]
        return statistics.median(errors) if errors else math.nan

    @property
    def false_alarms(self) -> Rate:
        """Share of healthy trainings whose verdict names a fault."""
        return rate(self.healthy, lambda r: r.names_a_fault)

    @property
    def any_finding(self) -> Rate:
        """Share of healthy trainings with any finding, the verdict's or not."""
        return rate(self.healthy, lambda r: bool(r.findings))

    @property
    def called_healthy(self) -> Rate:
        """Share of healthy trainings that are called so, and not undetermined."""
        return rate(self.healthy, lambda r: r.verdict == HEALTHY)

    @property
    def harmless(self) -> Rate:
        """Share of faults compared with a healthy twin that did no harm."""
        compared = [r for r in self.results if r.harm is not None]
        return rate(compared, lambda r: r.harm is False)

    @property
    def crashed(self) -> Rate:
        """Share of cases that raised an error."""
        return rate(self.results, lambda r: r.verdict == CRASHED)

    def by(self, key: Callable[[Result], str]) -> dict[str, "Score"]:
        """The scores of parts, by what `key` returns, in the order of first appearance."""
        parts: dict[str, list[Result]] = {}
        for result in self.results:
            parts.setdefault(key(result), []).append(result)
        return {name: Score(part) for name, part in parts.items()}

    def confusion(self) -> dict[str, Counter[str]]:
        """By what was planted, how often each verdict was given, in the order of findings."""
        matrix: dict[str, Counter[str]] = {}
        for result in self.counted:
            matrix.setdefault(result.wanted, Counter())[result.verdict] += 1
        return {name: matrix[name] for name in sorted(matrix, key=order)}

    def misses(self) -> list[Result]:
        """Counted results whose verdict, or else whose block, is wrong."""
        return [r for r in self.counted if not r.is_right or (r.blocks and not r.names_the_block)]

    def to_dict(self) -> dict[str, Any]:
        """Every rate, for JSON."""
        names = (
            "precision", "recall", "block_named", "date_near", "false_alarms", "any_finding",
            "called_healthy", "harmless", "crashed",
        )  # fmt: skip
        rates = {name: getattr(self, name).to_dict() for name in names}
        return {"cases": len(self.results), "date_error": plain(self.date_error), **rates}


def order(name: str) -> tuple[int, str]:
    """A key that sorts verdicts: healthy, findings in their order, others, no verdict last."""
    known = [HEALTHY, *FINDINGS]
    last = {UNDETERMINED: len(known) + 1, CRASHED: len(known) + 2}
    return last.get(name, known.index(name) if name in known else len(known)), name


def explain_miss(result: Result) -> str:
    """Why a result is no hit, in a few words."""
    given = result.verdict + (f" ({result.cause})" if result.cause else "")
    names = [name for name, *_ in result.findings]
    if result.verdict == CRASHED:
        return f"crashed: {result.error}"
    if result.is_healthy:
        return f"named {given}"
    if result.is_right:
        return f"named block {result.block}"
    if result.verdict == result.wanted:
        return f"cause is '{result.cause}'"
    if result.wanted in names and result.verdict in (HEALTHY, UNDETERMINED):
        return f"reported as a condition, which names no verdict; {given}"
    if result.wanted in names:
        return f"ranked behind {given}"
    if result.wanted not in FINDINGS:
        return f"there is no such rule; {given}"
    if result.verdict == HEALTHY:
        return "no finding; the loss falls as in a healthy training"
    if result.verdict == UNDETERMINED:
        return "no finding; " + "; ".join(result.doubts or ("too little is known",))
    return f"named {given}"
