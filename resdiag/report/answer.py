"""The answer to a study's question, computed by rule from what was expected and what came out.

No sentence here is written for one study: each is a count or a comparison with its rule.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resdiag.models.variants import variant_words
from resdiag.report.comparisons import (
    ByDepth,
    compare_by_depth,
    depth_headline,
    depth_rule,
    depth_table,
    threshold_table,
    threshold_words,
)
from resdiag.report.expected import MET, NOT_MET, OPEN, Judged, is_metric, metric_table
from resdiag.report.origin import changed_settings, is_lossy, list_sources
from resdiag.report.parts import Table
from resdiag.report.results import Group, Results
from resdiag.report.words import (
    Summary,
    count,
    listing,
    measure_words,
    number,
    settings_words,
    summarise,
)
from resdiag.training.recipe import RECIPES

_MOST_RANKS = 8
"""Settings whose variants are ranked on the first screen."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the first screen says.

    Attributes:
        headline: One sentence.
        found: What came out, most telling first.
        sure: How sure that is: seeds, spread, what is missing, which data.
        table: The numbers that answer the question, if they fit there.
    """

    headline: str
    found: Sequence[str]
    sure: Sequence[str]
    table: Table | None = None


def answer(results: Results, judged: Sequence[Judged]) -> Answer:
    """Put the answer together."""
    ended = [item for item in results.cells if item.ended]
    if not ended:
        return Answer(
            headline=f"No answer yet: none of {count(len(results.cells), 'cell')} has ended.",
            found=(),
            sure=[_missing(results)],
        )
    lines = compare_by_depth(results)
    rates = None if lines else threshold_table(results)
    found = [*_not_met(judged), *_came_out(judged)]
    found += [*([] if rates else threshold_words(results)), *_broken(results)]
    found += [*_ranked(results), *_verdicts(results)]
    if lines and judged:
        found.insert(0, depth_headline(lines))
    return Answer(
        headline=depth_headline(lines) + _so_far(results) if lines and not judged
        else _headline(results, judged),
        found=found,
        sure=_sure(results, lines),
        table=depth_table(lines) if lines else rates or metric_table(judged),
    )  # fmt: skip


def _so_far(results: Results) -> str:
    ended = sum(item.ended for item in results.cells)
    total = len(results.cells)
    return "" if ended == total else f" So far {ended} of {total} cells ended."


def _headline(results: Results, judged: Sequence[Judged]) -> str:
    """Expected values by outcome, or by state if nothing was expected."""
    ended = [item for item in results.cells if item.ended]
    part = "" if len(ended) == len(results.cells) else f" so far ({len(ended)} of "
    part += f"{len(results.cells)} cells)" if part else ""
    tally = Counter(item.outcome for item in judged)
    decided = tally[MET] + tally[NOT_MET]
    if decided:
        rest = f", {tally[OPEN]} cannot be decided" if tally[OPEN] else ""
        missed = f"{tally[NOT_MET]} {'is' if tally[NOT_MET] == 1 else 'are'} not"
        met = f"{tally[MET]} of {count(len(judged), 'expected value')}"
        if tally[MET] == len(judged) > 1:
            return f"All {len(judged)} expected values are met{part}."
        return f"{met} {'is' if tally[MET] == 1 else 'are'} met, {missed}{rest}{part}."
    lost = sum(item.state == "diverged" for item in ended)
    why = f"None of {count(len(judged), 'expected value')} can be decided" if judged else ""
    why = why or "The study has no expected values"
    return f"{why}; {lost} of {count(len(ended), 'cell')} that ended diverged{part}."


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


def _came_out(judged: Sequence[Judged]) -> list[str]:
    """Metrics that came out alike, and as expected, in all the settings they were expected of."""
    found: dict[str, list[str]] = {}
    for item in judged:
        if is_metric(item):
            want = item.expected
            words = f"{number(item.numbers.mean)}, expected {number(want.value)}"
            found.setdefault(measure_words(want.measure, want.step, want.block), []).append(words)
    return [
        f"In all {len(words)} settings, {measure}: {words[0]}."
        for measure, words in found.items()
        if len(words) > 1 and len(set(words)) == 1
    ]


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
    first, second = (_errors(group) for group in ordered[:2])
    return f"Final test error{place} ({data}): {listing(words, 9)}; {_compare(first, second)}."


def _compare(one: Summary, other: Summary) -> str:
    """Whether two means differ by more than two standard errors of their difference."""
    if min(one.n, other.n) < 2:
        return "with one seed, the first two cannot be ranked"
    error = math.hypot(one.deviation / math.sqrt(one.n), other.deviation / math.sqrt(other.n))
    clear = abs(one.mean - other.mean) > 2 * error
    return f"the first two differ by {'more' if clear else 'less'} than two standard errors"


def _errors(group: Group) -> Summary:
    return summarise([member.number("test_error") for member in group.members])


def _verdicts(results: Results) -> list[str]:
    tally = Counter(str(item.outcomes.get("verdict", "")) for item in results.cells if item.ended)
    words = [f"{name} {amount}" for name, amount in tally.most_common() if name]
    return [f"Verdicts: {', '.join(words)}."] if words else []


# -- how sure --------------------------------------------------------------------------------------


def _sure(results: Results, by_depth: Sequence[ByDepth]) -> list[str]:
    """Seeds, spread, what is missing, how long it was trained, data, device."""
    lines = [_seeds(results), *([depth_rule(by_depth)] if by_depth else []), *_short(results)]
    lines += [_missing(results), *_disagreement(results), *_spread(results)]
    return [
        line for line in [*lines, _data(results), *_changed(results), _devices(results)] if line
    ]


def _seeds(results: Results) -> str:
    sizes = [len(group.ended) for group in results.groups if group.ended]
    low, high = min(sizes), max(sizes)
    n = f"n = {low}" if low == high else f"n = {low} to {high}"
    single = ": a single seed has no spread" if high == 1 else ""
    return f"{n} per setting, {count(len(sizes), 'setting')}{single}."


def _short(results: Results) -> list[str]:
    """How much of a recipe that counts in epochs was run, if it was cut short."""
    found = []
    for item in results.cells:
        recipe = RECIPES[item.cell.request.recipe]
        if item.run and item.ended and item.cell.request.steps and not recipe.steps:
            found.append(
                f"{item.run.steps} steps, {item.epochs:.2g} of the recipe's {recipe.epochs} epochs"
            )
    words = listing(list(dict.fromkeys(found)), 3)
    return [f"A short training: {words}; it does not show how a full one ends."] if found else []


def _missing(results: Results) -> str:
    """Cells that are no result, by state."""
    left = [item for item in results.cells if not item.ended]
    if not left:
        return f"All {count(len(results.cells), 'cell')} ended."
    states = Counter(item.state for item in left)
    words = ", ".join(f"{amount} {state}" for state, amount in states.most_common())
    where = list(dict.fromkeys(variant_words(item.cell.request.variant) for item in left))
    return (
        f"Without a result: {len(left)} of {len(results.cells)} cells ({words}): {listing(where)}."
    )


def _disagreement(results: Results) -> list[str]:
    """Settings whose seeds ended differently."""
    mixed = [
        settings_words(group.settings)
        for group in results.groups
        if len({member.state for member in group.ended}) > 1
    ]
    several = sum(len(group.ended) > 1 for group in results.groups)
    if not several:
        return []
    if not mixed:
        return [f"The seeds agree on how it ended in all {several} settings with several seeds."]
    return [f"The seeds disagree on how it ended in {len(mixed)} of {several}: {listing(mixed)}."]


def _spread(results: Results) -> list[str]:
    """Largest spread of the final test error over seeds, if the training was long enough."""
    spreads = [
        (found.high - found.low, settings_words(group.settings))
        for group in results.groups
        if group.trained and (found := _errors(group)).n > 1
    ]
    if not spreads:
        return []
    most, where = max(spreads)
    middle = float(np.median([spread for spread, _ in spreads]))
    return [
        f"Range of the final test error over seeds: {100 * middle:.2f} points in the median "
        f"setting, {100 * most:.2f} at {where}."
    ]


def _data(results: Results) -> str:
    """Names of the data, and what lossy copies mean."""
    names = list(dict.fromkeys(item.data for item in results.cells if item.run))
    if not names:
        return ""
    lossy = [name for name in names if is_lossy(name)]
    warning = (
        f" {listing(lossy)} is a lossy copy: its error rates can be compared with each other, "
        "not with published ones."
        if lossy
        else ""
    )
    return f"Data: {listing(names)}.{warning}"


def _changed(results: Results) -> list[str]:
    changed = changed_settings(results.study)
    return (
        [f"Differs from the training of the shipped study: {listing(changed)}."] if changed else []
    )


def _devices(results: Results) -> str:
    found = list_sources(results.runs, "environment", ("device", "dtype"))
    words = [f"{name} ({amount})" if len(found) > 1 else name for name, amount in found]
    return f"Computed on: {'; '.join(words)}." if any(name for name, _ in found) else ""
