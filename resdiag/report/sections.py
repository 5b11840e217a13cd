"""The chapters of a report: expected values, outcomes, figures, cells, origin, how to remake it."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from resdiag.report.answer import answer
from resdiag.report.figures import Picture
from resdiag.report.judged import MET, NOT_MET, Judged, Summary, judge_all, summarise
from resdiag.report.origin import list_sources, remake_commands
from resdiag.report.parts import (
    Code,
    Entry,
    Folded,
    Image,
    Mark,
    Page,
    Part,
    Section,
    Table,
    Text,
)
from resdiag.report.results import CellResult, Group, Results
from resdiag.report.words import (
    ERRORS,
    count,
    listing,
    measure_words,
    number,
    settings_words,
    tame,
)
from resdiag.study.spec import WORDS

_KINDS = {MET: "good", NOT_MET: "bad"}
_MOST_COLUMNS = 12
_STATES = {"done": "plain", "diverged": "bad", "failed": "bad"}


def write_page(results: Results, pictures: Sequence[Picture], made: str = "") -> Page:
    """Everything that a report says.

    Args:
        results: Of the study.
        pictures: The figures that it names.
        made: With what the page was made; empty for pages that are compared.
    """
    file, judged = results.study.file, judge_all(results)
    said = answer(results, judged)
    claim = [("Expected before", file.expects), ("Whose claim", file.source)]
    sections = [
        _expected(judged),
        _outcomes(results),
        _figures(results, pictures),
        _cells(results),
        _origin(results),
        _remake(results),
    ]
    return Page(
        name=results.study.name,
        question=file.question,
        headline=said.headline,
        found=said.found,
        sure=said.sure,
        claim=[pair for pair in claim if pair[1]],
        sections=[section for section in sections if section.parts],
        made=made,
    )


# -- expected values -------------------------------------------------------------------------------


def _expected(judged: Sequence[Judged]) -> Section:
    """A table per source: what was published or predicted beside what came out."""
    ordered = sorted(judged, key=lambda item: (_word(item), item.expected.source))
    groups = [
        (source, list(items))
        for source, items in groupby(ordered, key=lambda item: item.expected.source)
    ]
    first = {item.expected.source: place for place, item in reversed(list(enumerate(judged)))}
    groups.sort(key=lambda pair: first[pair[0]])
    tables: list[Part] = [_expected_table(source, items) for source, items in groups]
    if not tables:
        return Section(id="expected", title="Expected values", parts=())
    rule = Text(
        "A number is met if the mean over seeds lies within the tolerance, and open if two "
        "standard errors of that mean reach over its edge. A word is met if every cell says it. "
        "Error rates on other data or of another training are not held against published ones."
    )
    return Section(id="expected", title="Expected values", parts=[rule, *tables])


def _word(item: Judged) -> bool:
    return item.expected.measure in WORDS


def _expected_table(source: str, items: Sequence[Judged]) -> Table:
    rows = [_word_row(item) if _word(item) else _number_row(item) for item in items]
    first = ["cells", "judged", "measure", "expected"]
    if _word(items[0]):
        return Table(
            caption=source, header=[*first, "came out", "n", "data"], rows=rows, numeric=(5,)
        )
    header = [*first, "mean", "spread (sd)", "least to most", "n", "data"]
    if any(item.errors for item in items):
        header += ["final", "best epoch"]
        rows = [[*row, *_final_and_best(item)] for row, item in zip(rows, items, strict=True)]
    return Table(caption=source, header=header, rows=rows, numeric=(3, 4, 5, 6, 7, 9, 10))


def _judgement(item: Judged) -> Mark:
    return Mark(item.outcome, _KINDS.get(item.outcome, "open"), item.reason)


def _word_row(item: Judged) -> list[Entry]:
    found = ", ".join(f"{word} {amount}" for word, amount in item.words.items()) or "-"
    want = item.expected
    return [
        settings_words(item.settings), _judgement(item), measure_words(want.measure),
        str(want.value), found, f"{item.ended} of {item.cells}", listing(item.data),
    ]  # fmt: skip


def _number_row(item: Judged) -> list[Entry]:
    want, found = item.expected, item.numbers
    allowed = f"× / {want.factor:g}" if want.factor else f"± {_plain(want.tolerance, want.measure)}"
    log = want.factor is not None
    spread = f"× {math.exp(found.deviation):.3g}" if log else number(found.deviation, want.measure)
    return [
        settings_words(item.settings),
        _judgement(item),
        measure_words(want.measure, want.step, want.block),
        f"{number(want.value, want.measure)} {allowed}",
        number(found.mean, want.measure),
        spread if found.n > 1 else "-",
        f"{number(found.low, want.measure)} to {number(found.high, want.measure)}"
        if found.n
        else "-",
        f"{item.ended} of {item.cells}",
        listing(item.data),
    ]  # fmt: skip


def _final_and_best(item: Judged) -> list[Entry]:
    """Both errors: the best one is chosen on the test images, and flatters."""
    found = (item.errors.get(name) for name in ("test_error", "best_test_error"))
    return [_spread_words(one, "test_error") if one else "-" for one in found]


def _plain(tolerance: float | None, measure: str) -> str:
    return number(tolerance or 0.0, measure)


# -- outcomes --------------------------------------------------------------------------------------


def _outcomes(results: Results) -> Section:
    """How it ended by setting, as a matrix and as a table with numbers."""
    parts: list[Part] = []
    if len(results.telling) > 1:
        parts.append(_matrix(results, "How it ended", _ended_words))
        if any(item.outcomes.get("verdict") for item in results.cells):
            parts.append(_matrix(results, "Verdicts", _verdict_words))
    parts.append(Folded("Numbers by setting", [_numbers(results)]))
    return Section(id="outcomes", title="What came out", parts=parts)


def _matrix(results: Results, caption: str, words: Callable[[Group], Entry]) -> Table:
    """Settings against the last telling one: the learning rate, the warm-up, or the depth."""
    numeric = [name for name in results.telling if _are_numbers(_values(results, name))]
    column = numeric[-1] if numeric else results.telling[-1]
    if len(_values(results, column)) > _MOST_COLUMNS:
        column = results.telling[-1]
    rows = [name for name in results.telling if name != column]
    columns = _values(results, column)
    cells: dict[str, dict[str, Entry]] = {}
    for group in results.groups:
        name = settings_words({key: group.settings[key] for key in rows})
        cells.setdefault(name, {})[repr(group.settings[column])] = words(group)
    header = [", ".join(rows), *(settings_words({column: value}) or column for value in columns)]
    body = [[name, *(row.get(repr(value), "") for value in columns)] for name, row in cells.items()]
    return Table(
        caption=f"{caption}, cells by {column.replace('_', ' ')}", header=header, rows=body
    )


def _values(results: Results, name: str) -> list[Any]:
    found = {repr(group.settings[name]): group.settings[name] for group in results.groups}
    values = list(found.values())
    return sorted(values) if _are_numbers(values) else values


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _ended_words(group: Group) -> Entry:
    """`3 done`, `2 of 3 diverged`, `1 missing`."""
    states = Counter(member.state for member in group.members)
    total = len(group.members)
    words = ", ".join(f"{amount} {state}" for state, amount in states.items())
    if states["diverged"] == total:
        return Mark(f"{total} diverged" if total > 1 else "diverged", "bad")
    return words if len(states) > 1 or total > 1 else next(iter(states))


def _verdict_words(group: Group) -> Entry:
    names = Counter(str(member.outcomes.get("verdict") or "-") for member in group.members)
    return ", ".join(f"{name} {n}" if len(names) > 1 else name for name, n in names.items())


def _numbers(results: Results) -> Table:
    """Mean ± sd of what a whole run has, by setting."""
    names = ("test_error", "best_test_error", "train_error", "loss", "first_nonfinite_step")
    rows: list[list[Entry]] = []
    for group in results.groups:
        state = _ended_words(group)
        data = listing(list(dict.fromkeys(member.data for member in group.members)))
        numbers = [_mean(group, name) for name in names]
        rows.append([settings_words(group.settings), state, *numbers, data])
    header = ["cells", "how it ended", *(measure_words(name) for name in names), "data"]
    header[5] = "last loss"
    return Table(
        caption="Mean ± standard deviation over the seeds that ended; - where there is none",
        header=header,
        rows=rows,
        numeric=(2, 3, 4, 5, 6),
    )


def _mean(group: Group, name: str) -> str:
    values = [member.outcomes.get(name, math.nan) for member in group.ended]
    return _spread_words(summarise([v for v in values if not isinstance(v, str)]), name)


def _spread_words(found: Summary, name: str) -> str:
    """`8.38 ± 0.12 %`; without the spread if there is one number only."""
    if found.n < 2:
        return number(found.mean, name)
    mean, spread = (number(v, name).removesuffix(" %") for v in (found.mean, found.deviation))
    return f"{mean} ± {spread}" + (" %" if name in ERRORS else "")


# -- figures ---------------------------------------------------------------------------------------


def _figures(results: Results, pictures: Sequence[Picture]) -> Section:
    """Each figure of the study file; what could not be drawn says why."""
    parts: list[Part] = []
    for number_, some in groupby(pictures, key=lambda picture: picture.number):
        members = list(some)
        images: list[Part] = [_image(picture) for picture in members]
        parts.append(Text(f"Figure {number_}. {members[0].question}"))
        parts += images[:1]
        if len(images) > 1:
            parts.append(Folded(f"Figure {number_}, {len(images) - 1} more", images[1:]))
    thinned = max((item.thinned for item in results.cells), default=1)
    if thinned > 1 and parts:
        note = f"Loss and batch error in curves are means over up to {thinned} steps."
        parts.insert(0, Text(note))
    return Section(id="figures", title="Figures", parts=parts)


def _image(picture: Picture) -> Part:
    if picture.svg is None:
        return Text(f"{picture.title}: not drawn: {picture.reason}")
    return Image(picture, picture.table)


# -- cells -----------------------------------------------------------------------------------------


def _cells(results: Results) -> Section:
    """Failures first, then the verdict on every cell."""
    parts: list[Part] = []
    failed = [item for item in results.cells if item.state == "failed"]
    if failed:
        why: list[list[Entry]] = [
            [item.cell.id, Mark("failed", "bad"), tame(item.message)] for item in failed
        ]
        parts.append(
            Table(caption="What failed and why", header=["cell", "state", "why"], rows=why)
        )
        parts.append(Code(f"resdiag study retry {results.study.name} --failed"))
    left = [item for item in results.cells if not item.ended and item.state != "failed"]
    if left:
        states = Counter(item.state for item in left)
        words = ", ".join(f"{amount} {state}" for state, amount in states.items())
        names = listing([item.cell.id for item in left], 12)
        parts.append(Text(f"Not ended: {count(len(left), 'cell')} ({words}): {names}."))
    ended = [item for item in results.cells if item.ended]
    if ended:
        header = ["cell", "how it ended", "verdict", "since", "what it says", "data"]
        table = Table(
            caption="Verdict per cell", header=header, rows=list(map(_verdict_row, ended))
        )
        parts.append(Folded(f"Verdicts of {count(len(ended), 'cell')}", [table], True))
    return Section(id="cells", title="Cells", parts=parts)


def _verdict_row(item: CellResult) -> list[Entry]:
    verdict = (item.run.verdict if item.run else None) or {}
    since = [f"{key} {verdict[key]}" for key in ("step", "block") if verdict.get(key) is not None]
    said = tame(str(verdict.get("summary") or ""))
    return [
        item.cell.id, Mark(item.state, _STATES.get(item.state, "plain")),
        str(verdict.get("name") or "-"), ", ".join(since), said, item.data,
    ]  # fmt: skip


# -- origin ----------------------------------------------------------------------------------------

_DATA = ("name", "train", "test", "classes", "sha256")
_MACHINE = (
    "device", "device_name", "dtype", "threads", "cpu_capability", "torch", "cuda", "resdiag",
    "python", "git",
)  # fmt: skip


def _origin(results: Results) -> Section:
    parts: list[Part] = []
    for part, names, caption in (
        ("data", _DATA, "Data"),
        ("environment", _MACHINE, "Device and versions"),
    ):
        found = list_sources(results, part, names)
        rows: list[list[Entry]] = [[words or "not known", str(n)] for words, n in found]
        if rows:
            header = [caption.lower(), "cells"]
            parts.append(Table(caption=caption, header=header, rows=rows, numeric=(1,)))
    seeds = sorted({item.cell.request.seed for item in results.cells})
    parts.append(Text(f"Seeds: {listing(list(map(str, seeds)), 20)}."))
    notes = sorted({note for item in results.cells if item.run for note in item.run.notes})
    parts += [Text(f"Not watched: {tame(note)}") for note in notes[:5]]
    return Section(id="origin", title="Data, device, versions, seeds", parts=parts)


def _remake(results: Results) -> Section:
    commands = "\n".join(remake_commands(results))
    document = json.dumps(results.study.document, indent=1, sort_keys=True, ensure_ascii=False)
    return Section(
        id="remake",
        title="How to remake it",
        parts=[Code(commands), Folded("The study as it was run", [Code(document, "json")], True)],
    )
