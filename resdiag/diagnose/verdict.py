"""The verdict on a run: what happened, where, since when, why, and what to look at next."""

import math
import textwrap
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from resdiag.diagnose.advice import plots
from resdiag.diagnose.finding import Evidence, Finding, NotJudged, Rule, plain
from resdiag.diagnose.registry import CAUSES_FROM_THE_START, FINDINGS, HEALTHY, is_built_in
from resdiag.diagnose.rundata import RunData
from resdiag.runs.folder import Run
from resdiag.runs.watched import opened

if TYPE_CHECKING:
    from resdiag.watch.loop.monitor import Monitor

_COLUMNS = 100
_INDENT = 10


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The conclusion on one run.

    Attributes:
        name: The most upstream rule that fired, a key of `resdiag.FINDINGS`, or "healthy".
        cause: The cause in a few words; "" if nothing fired.
        step: Step since when; None if it covers the run or nothing fired.
        block: Index of the first block concerned; None if none can be named.
        confidence: How far beyond its threshold the first finding lies, 0.5 to 1; no probability.
        summary: One sentence.
        why: One or two sentences naming the mechanism, theory beside measurement.
        evidence: The numbers of every rule that fired, the verdict's own first.
        next: Commands to run next.
        findings: Every rule that fired, in the order of `resdiag.FINDINGS`.
        not_judged: Rules that could not be applied, each with its reason.
        waiting: Those of `not_judged` that a longer run would answer, with what they need.
    """

    name: str
    cause: str = ""
    step: int | None = None
    block: int | None = None
    confidence: float = 0.9
    summary: str
    why: str
    evidence: tuple[Evidence, ...] = ()
    next: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    not_judged: tuple[str, ...] = ()
    waiting: tuple[NotJudged, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The verdict for JSON: NaN becomes null, infinities "inf" and "-inf"."""
        return {name: plain(value) for name, value in asdict(self).items()}


def judge(run: "Run | Monitor") -> Verdict:
    """Judge a run by every rule of `resdiag.FINDINGS`; the most upstream one names it.

    A run that grew at initialisation and broke down later is `exploded_at_init`: that is the
    cause; its summary says both. No rule raises on a missing or odd column: what cannot be judged
    is listed in `not_judged`.

    Args:
        run: A run from a folder or from frames in memory, or a monitor; it may still be in
            progress.
    """
    seen = RunData(run := opened(run))
    outcomes = [outcome for row in FINDINGS.values() for outcome in _apply(row, seen)]
    findings = tuple(sorted((i for i in outcomes if isinstance(i, Finding)), key=_place))
    unanswered = [i for i in outcomes if isinstance(i, NotJudged)]
    waiting = tuple(i for i in unanswered if i.needs)
    open_questions = [str(i) for i in unanswered]
    if run.status != "diverged" and run.steps < run.config.steps:
        done = f"step {run.steps} of {run.config.steps}"
        open_questions.append(f"the rest of the run: it is at {done} ({run.status})")
    if not findings:
        return _healthy(seen, tuple(open_questions), waiting)
    first = findings[0]
    return Verdict(
        name=first.name,
        cause=first.cause,
        confidence=first.confidence,
        step=first.step,
        block=first.block,
        summary=first.summary,
        why=first.why,
        # a breakdown is evidence of two rules, and said once
        evidence=_once([item for finding in findings for item in finding.evidence]),
        next=first.next,
        findings=findings,
        not_judged=tuple(open_questions),
        waiting=waiting,
    )


def render(verdict: Verdict) -> str:
    """The verdict as plain text: Verdict, Why, Evidence, Next; lines of at most 100 columns."""
    where = [f"step {verdict.step}"] if verdict.step is not None else []
    where += [f"block {verdict.block}"] if verdict.block is not None else []
    title = verdict.name + (f" ({', '.join(where)})" if where else "")
    others = [finding.name for finding in verdict.findings[1:]]
    if verdict.cause:
        title += f": {verdict.cause} (confidence {verdict.confidence:.2f})"
    lines = [*_wrap("Verdict", title), *_wrap("", verdict.summary)]
    lines += _wrap("", f"also: {', '.join(others)}") if others else []
    lines += _wrap("Why", verdict.why)
    for index, item in enumerate(verdict.evidence):
        lines += _wrap("Evidence" * (index == 0), f"- {item.text} [{_limit(item)}{item.metric}]")
    for index, line in enumerate(verdict.next):
        lines += _wrap("Next" * (index == 0), line)
    for index, line in enumerate(unjudged(verdict)):
        lines += _wrap("Unjudged" * (index == 0), f"- {line}")
    return "\n".join(lines)


def unjudged(verdict: Verdict) -> list[str]:
    """What could not be judged; what only waits for more steps is one line."""
    waits = [str(item) for item in verdict.waiting]
    lines = [line for line in verdict.not_judged if line not in waits]
    short = ", ".join(f"{item.name} ({item.needs})" for item in verdict.waiting)
    return [*lines, *([f"needs a longer run: {short}"] if short else [])]


def _apply(row: Rule, seen: RunData) -> list[Finding | NotJudged]:
    if is_built_in(row):
        return list(row.judge(seen))
    try:
        return list(row.judge(seen))
    except Exception as error:  # somebody else's rule must not take the verdict from a run
        return [row.not_judged(f"{type(error).__name__}: {error}")]


def _place(finding: Finding) -> int:
    """Where a finding stands among causes and consequences."""
    late = finding.name in CAUSES_FROM_THE_START and (finding.step or 0) > 0
    return list(FINDINGS).index("exploded" if late else finding.name)


def _healthy(seen: RunData, not_judged: tuple[str, ...], waiting: tuple[NotJudged, ...]) -> Verdict:
    """No rule fired; how far the run went is said, not what it may still do."""
    losses = seen.series("loss")
    span = f" in {len(losses)} steps, last loss {losses.iloc[-1]:.3g}" if len(losses) else ""
    if len(losses) and seen.classes:
        span += f" (guessing is {math.log(seen.classes):.3g})"
    return Verdict(
        name=HEALTHY,
        summary=f"No rule fired{span}.",
        why="Growth, gradients, skip path and loss stayed within the thresholds of "
        "every rule" + ("; see what could not be judged." if not_judged else "."),
        next=plots(seen, "signal", "gradnorms", "biasshift"),
        not_judged=not_judged,
        waiting=waiting,
    )


def _once(items: list[Evidence]) -> tuple[Evidence, ...]:
    """Without repetitions, in order; compared by their words, for NaN differs from itself."""
    return tuple({(item.metric, item.text): item for item in reversed(items)}.values())[::-1]


def _limit(item: Evidence) -> str:
    return "" if math.isnan(item.threshold) else f"threshold {item.threshold:.3g}; "


def _wrap(label: str, text: str) -> list[str]:
    """Lines of one entry: the label in the first ten columns, the text wrapped beside it."""
    lines = textwrap.wrap(text, _COLUMNS - _INDENT) or [""]
    lines = [f"{'':{_INDENT}}{line}" for line in lines]
    return [f"{label:{_INDENT}}{lines[0][_INDENT:]}".rstrip(), *lines[1:]]
