"""Findings: what one rule saw, as numbers with their thresholds and sources; and what a rule is.

JSON has no NaN and no infinity: `plain` writes NaN as null and the infinities as "inf" and "-inf".
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from resdiag.diagnose.rundata import RunData

DEFINITION = "definition of the rule"
"""Source of a number that no publication has."""


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

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Evidence":
        """What `to_dict` wrote; what is missing is unknown."""
        return cls(
            metric=str(document.get("metric", "")),
            step=document.get("step"),
            block=document.get("block"),
            value=_number(document.get("value")),
            threshold=_number(document.get("threshold")),
            text=str(document.get("text", "")),
            source=str(document.get("source", "")),
        )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One rule that fired.

    Attributes:
        name: Name of the rule, a key of `resdiag.FINDINGS`.
        step: Step since when; None if it covers the run.
        block: First block concerned, forward order; None if none can be named.
        summary: One sentence: what happened, where, when.
        why: One or two sentences: the mechanism, theory beside measurement.
        evidence: The numbers.
        next: Commands to run, or what to change, next.
        cause: The cause in a few words, for tables and programs.
    """

    name: str
    step: int | None = None
    block: int | None = None
    summary: str
    why: str
    evidence: tuple[Evidence, ...]
    next: tuple[str, ...] = ()
    cause: str = ""

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON-safe values, see `plain`."""
        return {name: plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Finding":
        """What `to_dict` wrote; what is missing is unknown."""
        return cls(
            name=str(document.get("name", "")),
            step=document.get("step"),
            block=document.get("block"),
            summary=str(document.get("summary", "")),
            why=str(document.get("why", "")),
            evidence=tuple(map(Evidence.from_dict, document.get("evidence", ()))),
            next=tuple(map(str, document.get("next", ()))),
            cause=str(document.get("cause", "")),
        )


@dataclass(frozen=True)
class NotJudged:
    """A rule that could not be applied, and why.

    Attributes:
        name: The rule.
        reason: What is missing.
        needs: How much a longer run would have to have, such as "20 steps"; "" where more of the
            same would not help.
        applies: False where the rule is not about such a network or run.
    """

    name: str
    reason: str
    needs: str = ""
    applies: bool = True

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


Outcome: TypeAlias = Iterator[Finding | NotJudged]
"""What a rule yields: what it found, or could not judge."""


def _number(value: object) -> float:
    """A number that `plain` wrote."""
    return math.nan if value is None else float(str(value))


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


class Threshold(float):
    """A number that a rule compares with, and its meaning; otherwise an ordinary float.

    Args:
        value: The number.
        meaning: What is compared with it; printed in the reference of findings.
        source: Where the number comes from, where the rule's own source does not say.

    >>> most = Threshold(50, "RMS of a branch over that of its shortcut")
    >>> 51 > most, f"more than {most} times"
    (True, 'more than 50 times')
    """

    meaning: str
    source: str

    def __new__(cls, value: float, meaning: str = "", source: str = "") -> "Threshold":
        """A float with two attributes."""
        number = super().__new__(cls, value)
        number.meaning, number.source = meaning, source
        return number

    def __format__(self, spec: str) -> str:
        return format(float(self), spec or "g")


Judge: TypeAlias = "Callable[[RunData], Iterable[Finding | NotJudged]]"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One kind of finding: when it is reported, what it means, and what to do about it.

    This row is all there is to say about a finding: `resdiag.judge`, `resdiag explain`, reports and
    the reference read it. `resdiag.register_finding` adds one.

    Attributes:
        name: Name of the finding, and of the verdict where it is the most upstream one.
        judge: Takes the data of a run and yields what it found, or could not judge. It must not
            raise on a missing, non-finite or empty column. Its docstring is the definition, its
            first line says in which case it reports something.
        needs: What it cannot do without: columns of the block table or of the step table, "blocks"
            for their descriptions, "unavailable" for the list of what could not be recorded.
        applies: Which runs it is about.
        is_condition: Whether it says what a network is prone to, not what happened to it. Where
            the run learned all the same, it is reported and does not name the verdict.
        cause: The usual cause in a few words.
        why: The mechanism in a sentence.
        remedy: What to do about it.
        plots: Kinds of plots to look at.
        thresholds: The numbers that it compares with.
        source: The publication or definition behind it.
    """

    name: str
    judge: Judge
    needs: tuple[str, ...]
    applies: str = "every run"
    is_condition: bool = False
    cause: str
    why: str
    remedy: str
    plots: tuple[str, ...] = ()
    thresholds: tuple[Threshold, ...] = ()
    source: str = DEFINITION

    @property
    def definition(self) -> str:
        """The docstring of `judge`."""
        return inspect.getdoc(self.judge) or ""

    @property
    def untried(self) -> str:
        """The remedy as a line of advice that says that nobody tried it on this network."""
        return f"to try: {self.remedy}"

    @property
    def fires_when(self) -> str:
        """The first line of the definition."""
        return self.definition.split("\n")[0]

    def evidence(
        self,
        metric: str,
        value: float,
        threshold: float,
        text: str,
        *,
        step: int | None = None,
        block: int | None = None,
        source: str = "",
    ) -> Evidence:
        """A number of this rule; its source is the rule's unless another is given.

        Args:
            metric: Id of the metric, or a column of the step table.
            value: What was measured.
            threshold: What it was compared with; NaN where it only illustrates.
            text: One sentence for people, without a capital and a full stop.
            step: Step it was read at.
            block: Index of the block.
            source: Where the number or its threshold comes from.
        """
        return Evidence(
            metric=metric, step=step, block=block, value=value, threshold=threshold, text=text,
            source=source or self.source,
        )  # fmt: skip

    def not_judged(self, reason: str, needs: str = "") -> NotJudged:
        """That this rule could not be applied, and why; `needs` as in `NotJudged`."""
        return NotJudged(self.name, reason, needs)

    def not_applicable(self, reason: str) -> NotJudged:
        """That this rule is not about such a run."""
        return NotJudged(self.name, reason, applies=False)

    def found(
        self,
        *evidence: Evidence,
        summary: str = "",
        cause: str = "",
        why: str = "",
        next: Sequence[str] = (),
    ) -> Finding:
        """A finding; what is not given is said of the first evidence, or by the rule.

        Args:
            *evidence: The numbers, the most telling one first; step and block are those of the
                first one.
            summary: What happened, where and when, without a full stop.
            cause: The cause, where it is known better than the rule's.
            why: The mechanism, where it is known better than the rule's.
            next: Commands to run next, instead of the rule's remedy and plots.
        """
        commands = tuple(f"resdiag plot {kind}" for kind in self.plots)
        commands = (self.untried, *commands) if commands else (self.remedy,)
        return Finding(
            name=self.name,
            step=evidence[0].step,
            block=evidence[0].block,
            cause=cause or self.cause,
            summary=sentence(summary or evidence[0].text),
            why=sentence(why or self.why),
            evidence=evidence,
            next=tuple(next) or commands,
        )


def sentence(text: str) -> str:
    """The text with a capital at its beginning and a full stop."""
    return text[:1].upper() + text[1:] + "." * (not text.endswith("."))
