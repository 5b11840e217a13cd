"""The verdict in words, as the command line prints it."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from resdiag.diagnose.breakdown import EXPLODED
from resdiag.diagnose.finding import Evidence
from resdiag.diagnose.registry import FINDINGS
from resdiag.summary import Summary
from resdiag.terminal import LABEL, beside, paint, width_of_text, wrap

if TYPE_CHECKING:
    from resdiag.diagnose.verdict import Verdict

_COMMAND = re.compile(r"(?P<command>resdiag[ .].*?)(?:  # (?P<why>.*))?")


def render(verdict: "Verdict", width: int | None = None, colour: bool = False) -> str:
    """The verdict as plain text: Verdict, Why, Evidence, Next, Unjudged.

    Lines are wrapped between words only: a path that is longer than a line has one of its own. A
    command is never wrapped, so that it can be copied.

    Args:
        verdict: What `resdiag.judge` returns.
        width: Columns of a line; None for those of the terminal, from 60 to 100, and 100 where
            standard output is none.
        colour: With ANSI escape codes: the name and its severity, labels, remarks.
    """
    width = (width or width_of_text()) - LABEL
    lines: list[str] = []
    for label, own in _parts(verdict, width):
        painted = (_paint(line, label, index, verdict) for index, line in enumerate(own))
        lines += beside(label, [*painted] if colour else own, colour=colour)
    return "\n".join(lines)


def title(verdict: "Verdict") -> str:
    """The name of a verdict, since when and where, and the cause."""
    where = [f"step {verdict.step}"] if verdict.step is not None else []
    where += [f"block {verdict.block}"] if verdict.block is not None else []
    named = verdict.name + (f" ({', '.join(where)})" if where else "")
    return named + (f": {verdict.cause}" if verdict.cause else "")


def to_html(verdict: "Verdict") -> str:
    """The verdict for a notebook: the same parts, evidence as a table, what to do next as code."""
    border = {"fault": "#b3261e", "healthy": "#1e7d32"}.get(severity(verdict), "#8a6d00")
    others = ", ".join(finding.name for finding in verdict.findings[verdict.is_named :])
    parts = [f"<p><b>{escape(title(verdict))}</b><br>{escape(verdict.summary)}</p>"]
    parts.append(f"<p>also: {escape(others)}</p>" if others else "")
    parts.append(f"<p>{escape(verdict.why)}</p>")
    rows = [
        (item.text, f"{item.threshold:.3g}" if math.isfinite(item.threshold) else "", item.metric)
        for item in verdict.evidence
    ]
    if rows:
        table = Summary("", ("evidence", "threshold", "metric"), rows)
        parts.append(table._repr_html_())
    if verdict.next:
        parts.append(f"<p>Next</p><pre>{escape(chr(10).join(verdict.next))}</pre>")
    missing = "".join(f"<li>{escape(line)}</li>" for line in unjudged(verdict))
    if missing:
        parts.append(f"<details><summary>Not judged</summary><ul>{missing}</ul></details>")
    style = f"border-left:.3em solid {border};padding-left:1em"
    return f"<div style='{style}'>{''.join(parts)}</div>"


def severity(verdict: "Verdict") -> str:
    """The style of a verdict's name; a condition is a fault where the run broke of it."""
    if not verdict.is_named:
        return verdict.name
    broke = any(finding.name == EXPLODED.name for finding in verdict.findings)
    return "fault" if broke else kind_of(verdict.name)


def kind_of(finding: str) -> str:
    """The style of a finding: of a condition, which a network can learn in spite of, or a fault."""
    row = FINDINGS.get(finding)
    return "condition" if row is not None and row.is_condition else "fault"


def commands(texts: Sequence[str], width: int) -> list[str]:
    """What to do next: commands whole, each with its remark behind it, or below if that is long."""
    return [line for text in texts for line in _wrap_command(text, width)]


def unjudged(verdict: "Verdict") -> list[str]:
    """What could not be judged, a line per reason; what only waits for more steps is one line."""
    waits = {str(item) for item in verdict.waiting}
    names: dict[str, list[str]] = {}
    for line in verdict.not_judged:
        name, _, reason = line.partition(": ")
        if line not in waits:
            names.setdefault(reason if name in FINDINGS else line, []).append(name)
    lines = [
        reason if reason in verdict.not_judged else f"{', '.join(of)}: {reason}"
        for reason, of in names.items()
    ]
    short = ", ".join(f"{item.name} ({item.needs})" for item in verdict.waiting)
    return [*lines, *([f"needs a longer run: {short}"] if short else [])]


def _parts(verdict: "Verdict", width: int) -> Iterator[tuple[str, list[str]]]:
    """The label and the lines of each part; lines have at most `width` columns."""
    others = [finding.name for finding in verdict.findings[verdict.is_named :]]
    also = [f"also: {', '.join(others)}"] if others else []
    bullets = [f"- {text}" for text in unjudged(verdict)]
    yield "Verdict", _wrap_all([title(verdict), verdict.summary, *also], width)
    yield "Why", wrap(verdict.why, width)
    yield "Evidence", _wrap_all(map(_describe, verdict.evidence), width, "  ")
    yield "Next", commands(verdict.next, width)
    yield "Unjudged", _wrap_all(bullets, width, "  ")


def _wrap_all(texts: Iterable[str], width: int, indent: str = "") -> list[str]:
    return [line for text in texts for line in wrap(text, width, indent)]


def _describe(item: Evidence) -> str:
    limit = f"threshold {item.threshold:.3g}; " if math.isfinite(item.threshold) else ""
    return f"- {item.text} [{limit}{item.metric}]"


def _wrap_command(text: str, width: int) -> list[str]:
    """A command whole on its line, and what it is for beside it or, if that is too long, below."""
    match = _COMMAND.fullmatch(text)
    if match is None:
        return wrap(text, width)
    if len(text) <= width or not match["why"]:
        return [text]
    return [match["command"], *wrap(f"  # {match['why']}", width, "  # ")]


def _paint(line: str, label: str, index: int, verdict: "Verdict") -> str:
    """A line in the colours of its part."""
    if label == "Verdict" and index == 0:
        name = verdict.name
        return paint(name, severity(verdict)) + line.removeprefix(name)
    if label == "Verdict":
        names = {finding.name for finding in verdict.findings}
        known = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in names) or r"(?!)")
        return known.sub(lambda found: paint(found[0], kind_of(found[0])), line)
    if label == "Unjudged":
        return paint(line, "note")
    if label == "Next" and "# " in line:
        command, _, why = line.partition("# ")
        return command + paint(f"# {why}", "note")
    return line
