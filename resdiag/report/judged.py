"""Expected values beside what came out: met, not met, or not decidable, each by a rule."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resdiag.report.origin import changed_settings, is_lossy
from resdiag.report.outcomes import key_of
from resdiag.report.results import CellResult, Group, Results
from resdiag.report.summary import Summary, summarise
from resdiag.report.words import ERRORS, count, listing
from resdiag.study.spec import WORDS, Expected

MET, NOT_MET, OPEN = "met", "not met", "not decidable"
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One expected value and what came out with one group of settings.

    Attributes:
        expected: What the study file says.
        settings: Which cells.
        outcome: MET, NOT_MET or OPEN.
        reason: Why it is open, or what was found instead.
        numbers: What came out, if it is a number.
        errors: Final and best test error beside it, if an error is expected.
        words: How often each word came out, if it is a word.
        ended: Cells that ended.
        cells: Cells that there are.
        data: Names of the data.
    """

    expected: Expected
    settings: Mapping[str, Any]
    outcome: str
    reason: str
    numbers: Summary
    errors: Mapping[str, Summary]
    words: Mapping[str, int]
    ended: int
    cells: int
    data: tuple[str, ...]


def judge_all(results: Results) -> list[Judged]:
    """Every expected value with every group of settings that it is about."""
    changed = changed_settings(results.study)
    return [
        _judge(item, group, changed)
        for item in results.study.file.expected
        for group in results.group(results.select(item.cells.given))
    ]


def _judge(item: Expected, group: Group, changed: Sequence[str]) -> Judged:
    ended = group.ended
    values = [member.outcomes.get(key_of(item), math.nan) for member in ended]
    words = [value for value in values if isinstance(value, str)]
    numbers = [value for value in values if not isinstance(value, str)]
    summary = summarise(numbers, geometric=item.factor is not None)
    if not ended:
        outcome, reason = OPEN, "no cell has ended"
    elif item.measure in ERRORS and (why := _incomparable(ended, changed)):
        outcome, reason = OPEN, why
    elif item.measure in WORDS:
        outcome, reason = _judge_words(item, words)
    else:
        outcome, reason = _judge_numbers(item, ended, numbers, summary)
    return Judged(
        expected=item,
        settings=group.settings,
        outcome=outcome,
        reason=reason,
        numbers=summary,
        errors=_errors(ended) if item.measure in ERRORS else {},
        words={word: words.count(word) for word in dict.fromkeys(words)},
        ended=len(ended),
        cells=len(group.members),
        data=tuple(dict.fromkeys(member.data for member in group.members)),
    )


def _errors(ended: Sequence[CellResult]) -> dict[str, Summary]:
    found = {}
    for name in ("test_error", "best_test_error"):
        values = [member.outcomes.get(name, math.nan) for member in ended]
        found[name] = summarise([value for value in values if not isinstance(value, str)])
    return found


def _incomparable(ended: Sequence[CellResult], changed: Sequence[str]) -> str:
    """Why an error rate must not be held against an expected one; empty if it may."""
    lossy = list(dict.fromkeys(item.data for item in ended if is_lossy(item.data)))
    if lossy:
        return f"{listing(lossy)}: lossy copies; the expected error is of the original images"
    if changed:
        return f"not the training it was published for: {listing(changed)}"
    return ""


def _judge_words(item: Expected, words: Sequence[str]) -> tuple[str, str]:
    other = [word for word in words if word != item.value]
    if not other:
        return MET, ""
    found = listing([f"{word} in {other.count(word)}" for word in dict.fromkeys(other)])
    return NOT_MET, f"{found} of {len(words)}"


def _judge_numbers(
    item: Expected, ended: Sequence[CellResult], numbers: Sequence[float], found: Summary
) -> tuple[str, str]:
    """Within the tolerance or not, if two standard errors of the mean do not blur that."""
    broken = sum(m.state == "diverged" for m in ended) if item.measure in ERRORS else 0
    if broken:
        return NOT_MET, f"{broken} of {len(ended)} diverged"
    if any(math.isinf(value) for value in numbers):
        return NOT_MET, "not finite"
    if not found.n:
        return OPEN, "never reached" if item.measure.endswith("_step") else "not recorded"
    assert not isinstance(item.value, str)
    if item.factor is not None:
        if item.value <= 0:
            return OPEN, "a factor needs a positive number"
        distance, limit = abs(math.log(found.mean / item.value)), math.log(item.factor)
    else:
        distance, limit = abs(found.mean - item.value), item.tolerance or 0.0
    error = 2 * found.deviation / math.sqrt(found.n) if found.n > 1 else 0.0
    if error > 0 and abs(distance - limit) < error:
        return OPEN, f"the spread of {count(found.n, 'seed')} reaches over the tolerance"
    return (MET if distance <= limit * (1 + _ROUNDING) + _ROUNDING else NOT_MET), ""
