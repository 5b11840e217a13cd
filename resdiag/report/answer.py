"""The answer to a study's question, computed by rule from what came out.

No sentence here is written for one study: each is a count or a comparison with its rule. What was
expected stands apart, see `resdiag.report.expected`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from resdiag.diagnose.degraded import points
from resdiag.models.variants import variant_words
from resdiag.report.certainty import certainty, missing_words
from resdiag.report.comparisons import (
    ByDepth,
    compare_by_depth,
    depth_headline,
    depth_table,
    threshold_headline,
    threshold_table,
    threshold_words,
)
from resdiag.report.expected import Judged, expected_words
from resdiag.report.metric_answer import metric_headline, metric_table, metrics_alike
from resdiag.report.parts import Table
from resdiag.report.results import Group, Results
from resdiag.report.training_outcome import seeds_words, training_headline
from resdiag.report.words import Summary, count, listing, settings_words, summarise
from resdiag.theory.intervals import difference

_MOST_RANKS = 8
"""Settings whose variants are ranked on the first screen."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the first screen says.

    Attributes:
        headline: One sentence.
        found: What came out, most telling first.
        sure: How sure that is: seeds, spread, what is missing, which data.
        expected: How many expected values are met, and which ones are not.
        table: The numbers that answer the question, if they fit there.
        plots: Kinds of plots that show the answer, the best one first.
    """

    headline: str
    found: Sequence[str]
    sure: Sequence[str]
    expected: Sequence[str] = ()
    table: Table | None = None
    plots: Sequence[str] = ()


def answer(results: Results, judged: Sequence[Judged]) -> Answer:
    """Put the answer together: what the cells say of the setting that the study varies.

    The first of these that is known: the error by depth, where no value was expected; the learning
    rate at which networks diverge; which networks train; how an expected metric changes with depth.
    """
    if not any(item.ended for item in results.cells):
        return Answer(
            headline=f"No answer yet: none of {count(len(results.cells), 'cell')} has ended.",
            found=(),
            sure=[missing_words(results)],
        )
    lines = compare_by_depth(results)
    rates = None if lines else threshold_table(results)
    said = _headlines(results, judged, lines)
    return Answer(
        headline=said[0][0] + _so_far(results),
        found=[
            *(sentence for sentence, _ in said[1:]), *metrics_alike(judged),
            *([] if rates else threshold_words(results)), *_broken(results), *_ranked(results),
            *_verdicts(results),
        ],
        sure=certainty(results, lines),
        expected=expected_words(judged),
        table=depth_table(lines) if lines else rates or metric_table(judged),
        plots=said[0][1],
    )  # fmt: skip


def _headlines(
    results: Results, judged: Sequence[Judged], lines: Sequence[ByDepth]
) -> list[tuple[str, Sequence[str]]]:
    """The sentences that could answer, the best one first, each with the plots that show it."""
    by_depth = (depth_headline(lines), ("depth", "curves")) if lines else ("", ())
    rates = threshold_headline(results)
    metric = metric_headline(judged)
    seeds = seeds_words(results)
    found: list[tuple[str, Sequence[str]]] = [
        by_depth if not judged else ("", ()),
        (f"{rates}; {seeds}." if rates else "", ("gradnorms", "nonfinite")),
        (training_headline(results), ("curves",)),
        (f"{metric}; {seeds}." if metric else "", ("signal", "growth")),
        by_depth if judged else ("", ()),
    ]
    known = [pair for pair in found if pair[0]]
    return known or [(_ended(results), ("curves",))]


def _ended(results: Results) -> str:
    """What is left to say of cells that made too few steps to train, and of no other question."""
    ended = [item for item in results.cells if item.ended]
    return f"{count(len(ended), 'cell')} ended, in too few steps to say whether they train."


def _so_far(results: Results) -> str:
    ended = sum(item.ended for item in results.cells)
    total = len(results.cells)
    return "" if ended == total else f" So far {ended} of {total} cells ended."


def _broken(results: Results) -> list[str]:
    """How many cells diverged, by variant."""
    ended, lost = Counter[str](), Counter[str]()
    for item in results.cells:
        if item.ended:
            variant = variant_words(item.cell.request.variant)
            ended[variant] += 1
            lost[variant] += item.state == "diverged"
    total = sum(lost.values())
    if not total:
        return [f"None of {count(sum(ended.values()), 'cell')} diverged."]
    by_variant = [f"{name} {lost[name]} of {ended[name]}" for name in ended if lost[name]]
    none = [name for name in ended if not lost[name]]
    rest = f"; none of {', '.join(none)}" if none else ""
    return [f"Diverged: {total} of {sum(ended.values())} cells: {', '.join(by_variant)}{rest}."]


def _ranked(results: Results) -> list[str]:
    """Per setting but the variant, the variants by mean final test error."""
    fields = [name for name in results.telling if name != "variant"]
    places: dict[str, list[Group]] = {}
    for group in results.groups:
        if group.trained and _errors(group).n:
            where = settings_words({name: group.settings[name] for name in fields})
            places.setdefault(where, []).append(group)
    lines = [_rank(where, groups) for where, groups in places.items() if len(groups) > 1]
    more = len(lines) - _MOST_RANKS
    rest = [f"{count(more, 'more setting')}: see the numbers by setting."] if more > 0 else []
    return [*lines[:_MOST_RANKS], *rest]


def _rank(where: str, groups: Sequence[Group]) -> str:
    """Variants in the order of their mean final test error, and whether the first two differ."""
    ordered = sorted(groups, key=lambda group: _errors(group).mean)
    words = []
    for group in ordered:
        found = _errors(group)
        spread = f" ± {100 * found.deviation:.2f}" if found.n > 1 else ""
        name = variant_words(group.members[0].cell.request.variant)
        words.append(f"{name} {100 * found.mean:.2f}{spread} % (n = {found.n})")
    data = listing(list(dict.fromkeys(item.data for group in ordered for item in group.members)))
    place = f" at {where}" if where else ""
    told = _compare(*ordered[:2])
    return f"Final test error{place} ({data}): {listing(words, 9)}; {told}."


def _compare(one: Group, other: Group) -> str:
    """How much the error of the second network is above that of the first."""
    first, second = one.test_errors, other.test_errors
    if min(len(first), len(second)) < 2:
        return "with one seed, the first two cannot be ranked"
    gap = difference([*second.values()], [*first.values()], ([*second], [*first]))
    return f"the second minus the first is {points(gap)} points"


def _errors(group: Group) -> Summary:
    return summarise([*group.test_errors.values()])


def _verdicts(results: Results) -> list[str]:
    tally = Counter(str(item.outcomes.get("verdict", "")) for item in results.cells if item.ended)
    words = [f"{name} {amount}" for name, amount in tally.most_common() if name]
    return [f"Verdicts: {', '.join(words)}."] if words else []
