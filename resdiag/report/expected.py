"""Expected values beside what came out: met, not met, or not decidable, each by a rule."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resdiag.report.origin import changed_settings, is_lossy
from resdiag.report.outcomes import key_of
from resdiag.report.parts import Entry, Mark, Part, Section, Table, Text
from resdiag.report.results import CellResult, Group, Results
from resdiag.report.words import (
    ERRORS,
    Summary,
    count,
    listing,
    measure_words,
    number,
    settings_words,
    spread_words,
    summarise,
)
from resdiag.study.spec import WORDS, Expected
from resdiag.theory.intervals import PERCENT, half_length

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
    names = ("test_error", "best_test_error")
    return {name: summarise([member.number(name) for member in ended]) for name in names}


def _incomparable(ended: Sequence[CellResult], changed: Sequence[str]) -> str:
    """Why an error rate must not be held against an expected one; empty if it may."""
    lossy = list(dict.fromkeys(item.data for item in ended if is_lossy(item.data)))
    if lossy:
        return f"{listing(lossy)}: lossy copies; the expected error is of the original images"
    if changed:
        return f"differs from the published training: {listing(changed)}"
    return ""


def _judge_words(item: Expected, words: Sequence[str]) -> tuple[str, str]:
    other = [word for word in words if word != item.value]
    if not words:
        return OPEN, "not judged"
    if not other:
        return MET, ""
    found = listing([f"{word} in {other.count(word)}" for word in dict.fromkeys(other)])
    return NOT_MET, f"{found} of {len(words)}"


def _judge_numbers(
    item: Expected, ended: Sequence[CellResult], numbers: Sequence[float], found: Summary
) -> tuple[str, str]:
    """Within the tolerance or not, if the interval of the mean does not cross its edge."""
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
    error = half_length(found.deviation, found.n) if found.n > 1 else 0.0
    if error > 0 and abs(distance - limit) < error:
        return OPEN, f"the mean of {count(found.n, 'seed')} is too uncertain for the tolerance"
    return (MET if distance <= limit * (1 + _ROUNDING) + _ROUNDING else NOT_MET), ""


def expected_words(judged: Sequence[Judged]) -> list[str]:
    """How many expected values are met, and which ones are not; empty if nothing was expected.

    Those that follow from a definition and hold are counted apart: they could not have failed.
    """
    sure = [item for item in judged if item.expected.is_identity and item.outcome == MET]
    judged = [item for item in judged if item not in sure]
    if sure:
        held = f"{len(sure)} {'holds' if len(sure) == 1 else 'hold'} by definition."
        return [*expected_words(judged), f"Besides, {held}" if judged else f"All {held}"]
    tally = Counter(item.outcome for item in judged)
    total = count(len(judged), "expected value")
    if not judged:
        return []
    if tally[OPEN] == len(judged):
        return [f"None of {total} can be decided."]
    if tally[MET] == len(judged) > 1:
        return [f"All {len(judged)} expected values are met."]
    rest = f", {tally[OPEN]} cannot be decided" if tally[OPEN] else ""
    met, missed = (
        f"{tally[name]} {'is' if tally[name] == 1 else 'are'}" for name in (MET, NOT_MET)
    )
    words = f"{met.partition(' ')[0]} of {total} {met.partition(' ')[2]} met, {missed} not{rest}."
    return [words, *_not_met(judged)]


def _not_met(judged: Sequence[Judged]) -> list[str]:
    """The expected values that did not come out, by measure; of words, by the word."""
    missed: dict[str, list[str]] = {}
    for item in judged:
        if item.outcome == NOT_MET:
            want = item.expected
            claim = measure_words(want.measure, want.step, want.block)
            if isinstance(want.value, str):
                claim, found = f"{claim} {want.value}", item.reason
            else:
                mean = item.reason or number(item.numbers.mean, want.measure)
                found = f"{mean}, expected {number(want.value, want.measure)}"
            missed.setdefault(claim, []).append(f"{settings_words(item.settings)} ({found})")
    return [f"Not met: {claim}: {listing(where, 8)}." for claim, where in missed.items()]


KINDS = {MET: "good", NOT_MET: "bad"}
FEW = 3
"""Rows of a source that are worth a table of their own."""
SEVERAL = "From several sources"
"""Caption of the table of the others."""
_NUMERIC = ("expected", "mean", "spread (sd)", "range", "n", "final", "best epoch")


def expected_section(judged: Sequence[Judged]) -> Section:
    """A table per source; sources with few rows share one, and stand in a column of it."""
    if not judged:
        return Section(id="expected", title="Expected values", parts=())
    lots: dict[tuple[bool, str], list[Judged]] = {}
    for item in judged:
        lots.setdefault((_word(item), item.expected.source), []).append(item)
    small = {key for key, items in lots.items() if len(items) < FEW}
    tables: dict[tuple[bool, str], list[Judged]] = {}
    for key, items in lots.items():
        word = key[0]
        alone = key not in small or sum(other[0] == word for other in small) == 1
        tables.setdefault(key if alone else (word, ""), []).extend(items)
    rule = Text(
        "A number is met if its mean over seeds is within the tolerance, and not decidable if the "
        f"{PERCENT} t interval of the mean crosses the edge of the tolerance. A word is met "
        "if every cell has it. Error rates on other data, or of another training, are not compared "
        "with published ones."
    )
    parts: list[Part] = [_short(_table(source, items)) for (_, source), items in tables.items()]
    return Section(id="expected", title="Expected values", parts=[rule, *parts])


def _short(table: Table) -> Part:
    """The table without the columns that are the same everywhere; a sentence if all are."""
    first = {str(row[1]) for row in table.rows}
    short = table.without_constants(2)
    if len(table.rows) < 2 or len(short.header) > 2 or len(first) > 1:
        return short
    cells = "; ".join(str(row[0]) for row in table.rows)
    note = short.note.removeprefix("In every row: ")
    return Text(f"{table.caption}. {first.pop()} in all {len(table.rows)}: {cells}. {note}")


def _word(item: Judged) -> bool:
    return item.expected.measure in WORDS


def _table(source: str, items: Sequence[Judged]) -> Table:
    """The rows of one source, or of several."""
    word = _word(items[0])
    rows = [_word_row(item) if word else _number_row(item) for item in items]
    header = ["cells", "judged", "measure", "expected"]
    header += ["result"] if word else ["mean", "spread (sd)", "range"]
    header += ["n", "data"]
    if any(item.errors for item in items):
        header += ["final", "best epoch"]
        rows = [[*row, *_final_and_best(item)] for row, item in zip(rows, items, strict=True)]
    if not source:
        header += ["source"]
        rows = [[*row, item.expected.source] for row, item in zip(rows, items, strict=True)]
    right = ("n",) if word else _NUMERIC
    numeric = [place for place, name in enumerate(header) if name in right]
    return Table(caption=source or SEVERAL, header=header, rows=rows, numeric=numeric)


def _judgement(item: Judged) -> Mark:
    return Mark(item.outcome, KINDS.get(item.outcome, "open"), item.reason)


def _word_row(item: Judged) -> list[Entry]:
    found = ", ".join(f"{word} {amount}" for word, amount in item.words.items()) or "-"
    want = item.expected
    return [
        settings_words(item.settings), _judgement(item), measure_words(want.measure),
        str(want.value), found, f"{item.ended} of {item.cells}", listing(item.data),
    ]  # fmt: skip


def _number_row(item: Judged) -> list[Entry]:
    want, found = item.expected, item.numbers
    value, mean, low, high, deviation, tolerance = (
        number(one, want.measure)
        for one in (want.value, found.mean, found.low, found.high, found.deviation,
                    want.tolerance or 0.0)
    )  # fmt: skip
    allowed = f"× / {want.factor:g}" if want.factor else f"± {tolerance}"
    spread = deviation if want.factor is None else f"× {math.exp(found.deviation):.3g}"
    return [
        settings_words(item.settings),
        _judgement(item),
        measure_words(want.measure, want.step, want.block),
        f"{value} {allowed}",
        mean,
        spread if found.n > 1 else "-",
        (low if low == high else f"{low} to {high}") if found.n else "-",
        f"{item.ended} of {item.cells}",
        listing(item.data),
    ]


def _final_and_best(item: Judged) -> list[Entry]:
    """Both errors: the best one is chosen on the test images, and flatters."""
    found = (item.errors.get(name) for name in ("test_error", "best_test_error"))
    return [spread_words(one, "test_error") if one else "-" for one in found]
