"""The chapters of a report: expected values, outcomes, figures, cells, origin, how to remake it."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from resdiag.report.answer import answer
from resdiag.report.contrasts import contrast_parts
from resdiag.report.expected import expected_section, judge_all
from resdiag.report.origin import origin_section, remake_section
from resdiag.report.parts import (
    Code,
    Entry,
    Folded,
    Mark,
    Page,
    Part,
    Picture,
    Section,
    Table,
    Text,
)
from resdiag.report.results import CellResult, Group, Results
from resdiag.report.training_outcome import (
    AT_CHANCE,
    DIVERGES,
    FALLS,
    FLAT,
    TRAINS,
    TRAINS_ONLY,
    UNKNOWN,
    training_outcome,
)
from resdiag.report.words import (
    count,
    listing,
    measure_words,
    settings_words,
    spread_words,
    summarise,
    tame,
)

_MOST_COLUMNS = 12
_STATES = {"done": "plain", "diverged": "bad", "failed": "bad"}


def write_page(results: Results, pictures: Sequence[Picture]) -> Page:
    """Everything that a report says: of the results of a study, and the figures that it names."""
    file, judged = results.study.file, judge_all(results)
    said = answer(results, judged)
    claim = [("Expected result", file.expects), ("Source of the claim", file.source)]
    key = choose_key(pictures, said.plots)
    seeds = [item.cell.request.seed for item in results.cells]
    sections = [
        expected_section(judged),
        _outcomes(results),
        figures_section(pictures, max((item.thinned for item in results.cells), default=1), key),
        _cells(results),
        origin_section(results.runs, seeds, "cells"),
        remake_section(results),
    ]
    return Page(
        name=results.study.name,
        question=file.question,
        headline=said.headline,
        found=said.found,
        sure=said.sure,
        table=said.table,
        key=key,
        expected=said.expected,
        claim=[pair for pair in claim if pair[1]],
        sections=[section for section in sections if section.parts],
    )


# -- outcomes --------------------------------------------------------------------------------------


def _outcomes(results: Results) -> Section:
    """How it ended by setting, as a matrix and as a table with numbers."""
    parts: list[Part] = []
    if len(results.telling) > 1:
        parts.append(_matrix(results, "How it ended", _ended_words))
        if any(item.outcomes.get("verdict") for item in results.cells):
            parts.append(_matrix(results, "Verdicts", _verdict_words))
    parts += contrast_parts(results)
    parts.append(Folded("Numbers by setting", [_numbers(results)]))
    return Section(id="outcomes", title="Results", parts=parts)


def _matrix(results: Results, caption: str, words: Callable[[Group], Entry]) -> Part:
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
    entries = {str(words(group)) for group in results.groups}
    if len(entries) == 1:
        return Text(f"{caption}: {entries.pop()} in all {count(len(results.groups), 'setting')}.")
    return Table(
        caption=f"{caption}, cells by {column.replace('_', ' ')}", header=header, rows=body
    )


def _values(results: Results, name: str) -> list[Any]:
    found = {repr(group.settings[name]): group.settings[name] for group in results.groups}
    values = list(found.values())
    return sorted(values) if _are_numbers(values) else values


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


_SHORT = {
    TRAINS: ("trains", "good"),
    TRAINS_ONLY: ("trains, test error at chance", "open"),
    AT_CHANCE: ("at chance", "open"),
    DIVERGES: ("diverged", "bad"),
    FALLS: ("lowers its loss", "good"),
    FLAT: ("does not lower its loss", "open"),
    UNKNOWN: ("done", "plain"),
}
"""How training went, in a table: the word and its mark. Too few steps to say: done."""


def _ended_words(group: Group) -> Entry:
    """`3 trains`, `2 at chance, 1 diverged`, `1 missing`."""
    total = len(group.members)
    tally = Counter(_went(member) for member in group.members)
    words = ", ".join(f"{amount} {word}" for (word, _), amount in tally.items())
    (word, kind), amount = tally.most_common(1)[0]
    if amount == total:
        return Mark(f"{total} {word}" if total > 1 else word, kind)
    return words


def _went(item: CellResult) -> tuple[str, str]:
    return _SHORT[training_outcome(item)] if item.ended else (item.state, "plain")


def _verdict_words(group: Group) -> Entry:
    names = Counter(str(member.outcomes.get("verdict") or "no verdict") for member in group.members)
    return ", ".join(f"{name} {n}" if len(names) > 1 else name for name, n in names.items())


def _numbers(results: Results) -> Table:
    """Mean ± sd of what a whole run has, by setting."""
    names = ("test_error", "best_test_error", "train_error", "loss", "first_nonfinite_step")
    rows: list[list[Entry]] = []
    for group in results.groups:
        state = _ended_words(group)
        data = listing(list(dict.fromkeys(member.data for member in group.members)))
        ended = {name: [member.number(name) for member in group.ended] for name in names}
        numbers = [spread_words(summarise(values), name) for name, values in ended.items()]
        rows.append([settings_words(group.settings), state, *numbers, data])
    header = ["cells", "how it ended", *(measure_words(name) for name in names), "data"]
    header[5] = "last loss"
    return Table(
        caption="Mean ± standard deviation over the seeds that ended; -: no value",
        header=header,
        rows=rows,
        numeric=(2, 3, 4, 5, 6),
    )


# -- figures ---------------------------------------------------------------------------------------


def choose_key(pictures: Sequence[Picture], plots: Sequence[str]) -> Picture | None:
    """The figure that shows the answer: of the first kind of plot that was drawn, the first.

    Args:
        pictures: The drawings.
        plots: Kinds of plots, the best one first; without any of them the first drawing is chosen.
    """
    drawn = [picture for picture in pictures if picture.svg]
    drawn = drawn or [picture for picture in pictures if picture.svg is not None]
    by_kind = [p for kind in plots for p in drawn if p.name.split("-")[1:2] == [kind]]
    return next(iter([*by_kind, *drawn]), None)


def figures_section(
    pictures: Sequence[Picture], thinned: int, key: Picture | None = None
) -> Section:
    """Each figure; what could not be drawn says why.

    Args:
        pictures: The drawings, those of one figure together.
        thinned: Most steps that one row of a curve stands for.
        key: The one that stands under the answer already.
    """
    parts: list[Part] = []
    shown = [picture for picture in pictures if picture.svg != b""] or pictures
    left = [picture.title for picture in pictures if picture not in shown]
    for number_, some in groupby(shown, key=lambda picture: picture.number):
        members = list(some)
        images = [_drawn(member, key) for member in members]
        parts.append(Text(f"{'' if left else f'Figure {number_}. '}{members[0].question}"))
        parts += images[:1]
        if len(images) > 1:
            parts.append(Folded(f"Figure {number_}, {len(images) - 1} more", images[1:]))
    if left:
        parts.append(
            Text(
                f"Not drawn here: {'; '.join(left)}. Their data are in the folder figures; with "
                "--all-figures the report draws them."
            )
        )
    if thinned > 1 and parts:
        note = f"Loss and batch error in curves are means over up to {thinned} steps."
        parts.insert(0, Text(note))
    return Section(id="figures", title="Figures", parts=parts)


def _drawn(picture: Picture, key: Picture | None) -> Part:
    if picture.svg is None:
        return Text(f"{picture.title}: not drawn: {picture.reason}")
    if picture is key:
        return Text(f"{picture.title}: see the figure under the answer.")
    return picture


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
        header = ["cell", "how it ended", "verdict", "since", "summary", "data"]
        table = Table(
            caption="Verdict per cell", header=header, rows=list(map(_verdict_row, ended))
        )
        parts.append(Folded(f"Verdicts of {count(len(ended), 'cell')}", [table], True))
    return Section(id="cells", title="Cells", parts=parts)


def _verdict_row(item: CellResult) -> list[Entry]:
    verdict = (item.run.written_verdict if item.run else None) or {}
    since = [f"{key} {verdict[key]}" for key in ("step", "block") if verdict.get(key) is not None]
    said = tame(str(verdict.get("summary") or ""))
    return [
        item.cell.id, Mark(item.state, _STATES.get(item.state, "plain")),
        str(verdict.get("name") or "-"), ", ".join(since), said, item.data,
    ]  # fmt: skip
