"""Whether a network trains, stays at chance or diverges: "done" says only that a cell ended."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from resdiag.diagnose.progress import LEAST_LOSSES, has_fallen, is_below_guessing
from resdiag.diagnose.rundata import count_classes
from resdiag.report.results import CellResult, Group, Results
from resdiag.report.words import count, joined, settings_words
from resdiag.runs.folder import Run

if TYPE_CHECKING:
    import pandas as pd

TRAINS = "trains"
TRAINS_ONLY = "trains but is at chance on the test images"
AT_CHANCE = "stays at chance"
DIVERGES = "diverges"
UNKNOWN = "cannot be judged"
FALLS = "lowers its loss"
FLAT = "does not lower its loss"
NO_RESULT = "has no result"
"""How training went, as a verb of one network."""

_PLURAL = {
    TRAINS: "train",
    TRAINS_ONLY: "train but are at chance on the test images",
    AT_CHANCE: "stay at chance",
    DIVERGES: "diverge",
    FALLS: "lower their loss",
    FLAT: "do not lower their loss",
    NO_RESULT: "have no result",
}
_ERRORS = 2.0
"""Standard errors below which a test error is that of guessing."""

MOST_NAMES = 4
"""Networks or runs of one outcome that a sentence names; more of them are counted."""

_MOST_PLACES = 3
"""Depths of one outcome that a sentence names; more of them are counted."""

Outcomes: TypeAlias = tuple[tuple[str, int, int], ...]
"""Per outcome of a group of seeds: the verb, the seeds with it, all its seeds."""


def training_outcome(item: CellResult) -> str:
    """How the training of a cell went: one of the words above."""
    if not item.ended:
        return NO_RESULT
    if item.state == "diverged" or item.run is None:
        return DIVERGES if item.state == "diverged" else UNKNOWN
    return run_outcome(item.run, item.number("test_error"), item.thinned)


def run_outcome(
    run: Run, test_error: float, thinned: int = 1, losses: "pd.Series[float] | None" = None
) -> str:
    """How the training of a run went, so far if it goes on: one of the words above.

    It trains if the mean loss of the last fifth of the steps is below that of guessing, ln K of K
    classes, by the margin of the rules of `resdiag.diagnose.progress`. Where
    K is not known, it lowers its loss if that has fallen by the rule there.

    Args:
        run: The run.
        test_error: The final one, NaN if there is none.
        thinned: Steps that a row of its curve stands for.
        losses: The mean cross-entropy by step; None if the loss of the run is that.
    """
    curve, classes = run.curve(), count_classes(run)
    if run.status == "diverged":
        return DIVERGES
    told = losses if losses is not None else curve.get("loss")
    if told is None or thinned * len(told) < LEAST_LOSSES:
        return UNKNOWN
    finite = told[np.isfinite(told)]
    if finite.empty:
        return UNKNOWN
    if classes is None:
        return FALLS if has_fallen(finite) else FLAT
    if not is_below_guessing(finite, classes):
        return AT_CHANCE
    return TRAINS_ONLY if _guesses(run, test_error, classes) else TRAINS


def plural(outcome: str) -> str:
    """The verb of several networks."""
    return _PLURAL.get(outcome, outcome)


def _guesses(run: Run, error: float, classes: int) -> bool:
    """Whether a test error is that of guessing, within two standard errors of that."""
    images, chance = run.data.get("test"), 1 - 1 / classes
    if not isinstance(images, int) or images < 1 or math.isnan(error):
        return False
    return error > chance - _ERRORS * math.sqrt(chance * (1 - chance) / images)


def training_headline(results: Results) -> str:
    """One sentence: which networks train, which stay at chance, which diverge, and where.

    Empty if that is known of no cell, because they made too few steps.
    """
    if all(training_outcome(item) in (UNKNOWN, NO_RESULT) for item in results.cells):
        return ""
    fields = results.telling[1:]
    found: dict[str, dict[str, Outcomes]] = {}
    for group in results.groups:
        first = {name: group.settings[name] for name in results.telling[:1]}
        name = settings_words(first) or "The network"
        where = _place({field: group.settings[field] for field in fields}, fields)
        found.setdefault(name, {})[where] = _outcomes(group)
    said: dict[str, list[str]] = {}
    phrases = {name: _phrase(places, fields, 1) for name, places in found.items()}
    for name, phrase in phrases.items():
        said.setdefault(phrase, []).append(name)
    clauses = [
        f"{joined(names)} {_phrase(found[names[0]], fields, len(names))}" for names in said.values()
    ]
    return "; ".join([*clauses, seeds_words(results)]) + "."


def seeds_words(results: Results) -> str:
    """How many seeds stand behind an answer.

    Cells that have not ended do not count.
    """
    sizes = {len(group.ended) for group in results.groups if group.ended}
    low, high = min(sizes), max(sizes)
    if low != high:
        return f"{low} to {high} seeds"
    return "one seed" if low == 1 else count(low, "seed")


def training_rule(results: Results) -> str:
    """What the words mean; empty where none is used."""
    known = {training_outcome(item) for item in results.cells}
    if not known & {TRAINS, TRAINS_ONLY, AT_CHANCE}:
        return ""
    rule = (
        "Trains: the mean loss over the last fifth of the steps is below that of guessing, ln K of "
        "K classes, by 2 % or more; at chance: it is not."
    )
    only = " At chance on the test images: within two standard errors of the error of guessing."
    return rule + (only if TRAINS_ONLY in known else "")


def _outcomes(group: Group) -> Outcomes:
    tally = Counter(training_outcome(member) for member in group.ended) or {NO_RESULT: 1}
    total = sum(tally.values())
    return tuple((verb, amount, total) for verb, amount in tally.items())


def _phrase(places: Mapping[str, Outcomes], fields: Sequence[str], subjects: int) -> str:
    """What one network does, or several alike do, in all places or in each."""
    whole: dict[str, list[str]] = {}
    some: dict[str, list[str]] = {}
    for where, outcomes in places.items():
        for verb, amount, total in outcomes:
            whole.setdefault(verb, [])
            if amount == total:
                whole[verb].append(where)
            else:
                at = _at([where], len(places), fields)
                some.setdefault(verb, []).append(f" in {amount} of {total} seeds{at}")
    parts = []
    for verb, where_whole in whole.items():
        found = [_at(where_whole, len(places), fields)] if where_whole else []
        found += some.get(verb, [])
        parts.append((verb if subjects == 1 else plural(verb)) + " and".join(found))
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]


def _place(settings: Mapping[str, object], fields: Sequence[str]) -> str:
    """A depth as its number, other settings in words."""
    return str(settings["depth"]) if list(fields) == ["depth"] else settings_words(settings)


def _at(where: Sequence[str], total: int, fields: Sequence[str]) -> str:
    """` at both depths`, ` at depths 8 and 20`, ` in 4 of 6 settings`; empty for the only place."""
    if not fields or where == [""]:
        return ""
    depths = list(fields) == ["depth"]
    noun = "depths" if depths else "settings"
    if len(where) == total > 1:
        amount = "both" if total == 2 else f"all {total}"
    elif len(where) > (_MOST_PLACES if depths else 1):
        amount = f"{len(where)} of {total}"
    else:
        amount, noun = "", "depth " if len(where) == 1 else "depths "
        return f" at {noun if depths else ''}{joined(where)}"
    return f" {'at' if depths else 'in'} {amount} {noun}"
