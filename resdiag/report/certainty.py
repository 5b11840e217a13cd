"""How sure an answer is: seeds, spread, what is missing, how long it was trained, data, device."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from resdiag.models.variants import variant_words
from resdiag.report.comparisons import ByDepth, depth_rule
from resdiag.report.origin import changed_settings, is_lossy, list_sources
from resdiag.report.results import Group, Results
from resdiag.report.training_outcome import training_rule
from resdiag.report.words import Summary, count, listing, settings_words, summarise
from resdiag.training.recipe import RECIPES


def certainty(results: Results, by_depth: Sequence[ByDepth]) -> list[str]:
    """Seeds, spread, what is missing, how long it was trained, data, device."""
    lines = [_seeds(results), *([depth_rule(by_depth)] if by_depth else []), *_short(results)]
    lines.append(training_rule(results))
    lines += [missing_words(results), *_disagreement(results), *_spread(results)]
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
                f"{item.run.steps} steps, {item.epochs:.2g} epochs; the recipe has {recipe.epochs}"
            )
    if not found:
        return []
    words = listing(list(dict.fromkeys(found)), 3)
    return [f"A short training: {words}; it shows early learning, not how a full one ends."]


def missing_words(results: Results) -> str:
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


def _errors(group: Group) -> Summary:
    return summarise([*group.test_errors.values()])


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
