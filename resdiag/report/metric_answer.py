"""Expected metrics as an answer: how they change with depth, and what is the same everywhere."""

from collections.abc import Sequence

from resdiag.catalog.table import METRICS
from resdiag.report.expected import KINDS, Judged
from resdiag.report.parts import Entry, Mark, Table
from resdiag.report.words import joined, measure_words, number, settings_words
from resdiag.study.spec import OUTCOMES


def is_metric(item: Judged) -> bool:
    """Whether a recorded metric was expected, and came out as a number."""
    return item.expected.measure not in OUTCOMES and item.numbers.n > 0


def _by_measure(judged: Sequence[Judged]) -> dict[str, list[Judged]]:
    """The metrics that came out, by their words and where they are read."""
    lots: dict[str, list[Judged]] = {}
    for item in filter(is_metric, judged):
        want = item.expected
        lots.setdefault(measure_words(want.measure, want.step, want.block), []).append(item)
    return lots


def _varying(judged: Sequence[Judged]) -> tuple[str, dict[str, dict[int, Judged]]] | None:
    """The first metric that varies over depths: its words, and its values by network and depth."""
    for measure, items in _by_measure(judged).items():
        depths = {item.settings["depth"] for item in items if "depth" in item.settings}
        if len(depths) < 2 or len({number(item.numbers.mean) for item in items}) == 1:
            continue
        rows: dict[str, dict[int, Judged]] = {}
        for item in items:
            name = settings_words({k: v for k, v in item.settings.items() if k != "depth"})
            rows.setdefault(name, {})[item.settings["depth"]] = item
        return measure, rows
    return None


def metric_table(judged: Sequence[Judged]) -> Table | None:
    """The first expected metric that varies, by depth: what came out, and what was expected."""
    found = _varying(judged)
    if found is None:
        return None
    measure, rows = found
    depths = sorted({depth for row in rows.values() for depth in row})
    return Table(
        caption=f"{measure}: mean over seeds, expected value in brackets",
        header=["cells", *(f"depth {depth}" for depth in depths)],
        rows=[[name, *(_cell(row.get(depth)) for depth in depths)] for name, row in rows.items()],
    )


def _cell(item: Judged | None) -> Entry:
    if item is None:
        return ""
    words = f"{number(item.numbers.mean)} ({number(item.expected.value)})"
    return Mark(words, KINDS.get(item.outcome, "open"))


def metric_headline(judged: Sequence[Judged]) -> str:
    """By what factor the first expected metric that varies changes from depth to depth.

    Empty if no metric is expected at two depths. The largest factor comes first.
    """
    found = _varying(judged)
    if found is None:
        return ""
    _, rows = found
    want = next(iter(next(iter(rows.values())).values())).expected
    ends: dict[tuple[int, int], list[tuple[float, str]]] = {}
    for name, row in rows.items():
        low, high = min(row), max(row)
        first, last = row[low].numbers.mean, row[high].numbers.mean
        if low < high and first > 0:
            ends.setdefault((low, high), []).append((last / first, name))
    parts = []
    for (low, high), factors in ends.items():
        words = [f"{number(factor)} for {name}" for factor, name in sorted(factors, reverse=True)]
        parts.append(f"from depth {low} to {high} by {joined(words)}")
    label = METRICS[want.measure].label if want.measure in METRICS else want.measure
    place = measure_words("", want.step, want.block).strip()
    return f"The {label} {place} is multiplied {'; '.join(parts)}" if parts else ""


def metrics_alike(judged: Sequence[Judged]) -> list[str]:
    """Metrics that came out alike, and as expected, in all the settings they were expected of."""
    found = {
        measure: [f"{number(i.numbers.mean)}, expected {number(i.expected.value)}" for i in items]
        for measure, items in _by_measure(judged).items()
    }
    return [
        f"In all {len(words)} settings, {measure}: {words[0]}."
        for measure, words in found.items()
        if len(words) > 1 and len(set(words)) == 1
    ]
