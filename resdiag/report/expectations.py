"""The chapter of expected values: what was published or predicted beside what came out."""

import math
from collections.abc import Sequence

from resdiag.report.judged import MET, NOT_MET, Judged
from resdiag.report.parts import Entry, Mark, Part, Section, Table, Text
from resdiag.report.summary import spread_words
from resdiag.report.words import listing, measure_words, number, settings_words
from resdiag.study.spec import OUTCOMES, WORDS

_KINDS = {MET: "good", NOT_MET: "bad"}
FEW = 3
"""Rows of a source that are worth a table of their own."""
SEVERAL = "From several sources"
"""Caption of the table of the others."""
_NUMERIC = ("expected", "mean", "spread (sd)", "least to most", "n", "final", "best epoch")


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
        "A number is met if the mean over seeds lies within the tolerance, and open if two "
        "standard errors of that mean reach over its edge. A word is met if every cell says it. "
        "Error rates on other data or of another training are not held against published ones."
    )
    parts: list[Part] = [_table(source, items) for (_, source), items in tables.items()]
    return Section(id="expected", title="Expected values", parts=[rule, *parts])


def _word(item: Judged) -> bool:
    return item.expected.measure in WORDS


def _table(source: str, items: Sequence[Judged]) -> Table:
    """The rows of one source, or of several."""
    word = _word(items[0])
    rows = [_word_row(item) if word else _number_row(item) for item in items]
    header = ["cells", "judged", "measure", "expected"]
    header += ["came out"] if word else ["mean", "spread (sd)", "least to most"]
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


def is_metric(item: Judged) -> bool:
    """Whether a recorded metric was expected, and came out as a number."""
    return item.expected.measure not in OUTCOMES and item.numbers.n > 0


def metric_table(judged: Sequence[Judged]) -> Table | None:
    """The first expected metric that varies, by depth: what came out, and what was expected."""
    lots: dict[str, list[Judged]] = {}
    for item in filter(is_metric, judged):
        want = item.expected
        lots.setdefault(measure_words(want.measure, want.step, want.block), []).append(item)
    for measure, items in lots.items():
        depths = sorted({item.settings["depth"] for item in items if "depth" in item.settings})
        if len(depths) < 2 or len({number(item.numbers.mean) for item in items}) == 1:
            continue
        rows: dict[str, dict[int, Entry]] = {}
        for item in items:
            name = settings_words({k: v for k, v in item.settings.items() if k != "depth"})
            words = f"{number(item.numbers.mean)} ({number(item.expected.value)})"
            kind = _KINDS.get(item.outcome, "open")
            rows.setdefault(name, {})[item.settings["depth"]] = Mark(words, kind)
        return Table(
            caption=f"{measure}: mean over seeds, in brackets what was expected",
            header=["cells", *(f"depth {depth}" for depth in depths)],
            rows=[[name, *(row.get(depth, "") for depth in depths)] for name, row in rows.items()],
        )
    return None


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
    return [spread_words(one, "test_error") if one else "-" for one in found]


def _plain(tolerance: float | None, measure: str) -> str:
    return number(tolerance or 0.0, measure)
