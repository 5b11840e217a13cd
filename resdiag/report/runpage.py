"""The page of one run, or of a handful side by side: verdicts, evidence, figures, origin."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from resdiag.diagnose.degraded import compare
from resdiag.diagnose.finding import Evidence
from resdiag.diagnose.rundata import RunData, count_classes
from resdiag.diagnose.text import unjudged
from resdiag.diagnose.verdict import Verdict, judge
from resdiag.plots.kinds import KINDS
from resdiag.report.heatmap import MOST_CELLS, make_heat_map
from resdiag.report.origin import is_lossy, list_sources, origin_section
from resdiag.report.outcomes import Outcome, measure
from resdiag.report.parts import (
    Bullets,
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
from resdiag.report.sections import choose_key, figures_section
from resdiag.report.training_outcome import DIVERGES, MOST_NAMES, UNKNOWN, plural, run_outcome
from resdiag.report.words import MEASURES, count, joined, listing, number, tame
from resdiag.runs.folder import Run

if TYPE_CHECKING:
    import pandas as pd

_NUMBERS = {"loss": "last loss"} | {
    name: words for name, words in MEASURES.items() if name not in ("status", "verdict")
}
_MOST_LINES = 8
_OTHER_RESERVATIONS = 2  # one seed, and how many checks had all their numbers
_ONE_SEED = (
    "Each run is one seed: it shows what happened, not how often. Networks are compared over three "
    "seeds or more."
)


@dataclass(frozen=True)
class _Seen:
    """A run with its name on the page and what was concluded."""

    run: Run
    name: str
    verdict: Verdict
    numbers: Mapping[str, Outcome]

    @cached_property
    def losses(self) -> "pd.Series[float]":
        """The finite losses by step, as a mean cross-entropy where they are a sum of that."""
        losses = RunData(self.run).cross_entropy
        return losses[np.isfinite(losses)]

    @cached_property
    def outcome(self) -> str:
        """How the training went."""
        return run_outcome(self.run, float(self.numbers["test_error"]), losses=self.losses)

    @property
    def data(self) -> str:
        """Name of its data."""
        return tame(str(self.run.data.get("name") or self.run.config.data), 80)


MOST_PLOTS = 4
"""Kinds of plots that a report draws unless all are asked for."""


def choose_plots(verdicts: Sequence[Verdict]) -> list[str]:
    """The kinds of plots that a report draws first.

    Those that the verdicts advise, the curves, the error by depth and the gradients, of which the
    first four are drawn, and those that other packages have added.
    """
    advised = [kind for verdict in verdicts for kind in _advised(verdict)[: MOST_PLOTS - 1]]
    shown = list(dict.fromkeys(["curves", "depth"] if len(verdicts) > 1 else ["curves"]))
    wanted = [*shown, *advised, "gradnorms", "signal"]
    added = [kind for kind in KINDS if not KINDS.is_built_in(kind)]
    return [*list(dict.fromkeys(kind for kind in wanted if kind in KINDS))[:MOST_PLOTS], *added]


def write_run_page(
    runs: Sequence[Run], pictures: Sequence[Picture], verdicts: Sequence[Verdict] = ()
) -> Page:
    """Everything that a report of runs, at least one, says, and drawings of them.

    Args:
        runs: The runs.
        pictures: The drawings.
        verdicts: What was concluded of each run; without them each is judged here.

    Raises:
        UsageError: A run is damaged.
    """
    seen = [
        _Seen(run, name, verdict, measure(run, ()))
        for run, name, verdict in zip(runs, _names(runs), verdicts or map(judge, runs), strict=True)
    ]
    maps = [make_heat_map(one.run, one.name, MOST_CELLS // len(seen)) for one in seen]
    one = len(runs) == 1
    headline, found = _alone(seen[0]) if one else _together(seen)
    named = one and seen[0].verdict.is_named
    advised = _advised(seen[0].verdict) if named else []
    key = choose_key(pictures, [*advised, "curves"])
    sections = [
        Section(id="runs", title="How it ended", parts=[_outcomes(seen)]),
        figures_section(pictures, thinned=1, key=key),
        _evidence(seen),
        origin_section(runs, [run.config.seed for run in runs], "runs"),
        _settings(seen),
    ]
    return Page(
        name=seen[0].name if one else count(len(runs), "run"),
        about="a run recorded" if one else "runs recorded",
        question=f"What happened in {seen[0].name if one else 'these runs'}?",
        headline=headline,
        found=found,
        sure=_sure(seen),
        claim=(),
        key=key,
        heat_maps=[one for one in maps if one is not None],
        sections=[section for section in sections if section.parts],
    )


def _names(runs: Sequence[Run]) -> list[str]:
    """Labels where they tell the runs apart, else the names of their folders."""
    labels = [tame(run.label, 80) for run in runs]
    if len(set(labels)) == len(labels):
        return labels
    return [tame(run.path.name, 80) or label for run, label in zip(runs, labels, strict=True)]


# -- the first screen ------------------------------------------------------------------------------


def _alone(seen: _Seen) -> tuple[str, list[str]]:
    """Whether it trains, and the cause; then the verdict, why, the end, what else was found."""
    verdict = seen.verdict
    cause = f" Cause: {verdict.cause}." if verdict.cause else ""
    found = [f"{verdict.name}: {verdict.summary}", verdict.why, f"How it ended: {_ended(seen)}."]
    found += [f"Also {finding.name}: {finding.summary}" for finding in verdict.findings[1:]]
    return tame(f"{seen.name} {_went(seen)}.{cause}"), _short(found, "finding")


def _went(seen: _Seen) -> str:
    """`diverges: not finite from step 1 on`, `trains: mean loss ...`, with the numbers."""
    run, first = seen.run, seen.numbers["first_nonfinite_step"]
    outcome, losses = seen.outcome, seen.losses
    if outcome == DIVERGES:
        known = isinstance(first, float) and math.isfinite(first)
        return f"{outcome}: not finite from step {first:g} on" if known else outcome
    steps = f"after {count(run.steps, 'step')}"
    if outcome == UNKNOWN:
        return f"is {run.status} {steps}; whether it trains cannot be judged"
    classes, fifth = count_classes(run), max(1, len(losses) // 5)
    first, last = (float(part.mean()) for part in (losses.iloc[:fifth], losses.iloc[-fifth:]))
    other = f"guessing is {math.log(classes):.3g}" if classes else f"of the first {first:.3g}"
    test = number(seen.numbers["test_error"], "test_error")
    error = "" if test == "-" else f", the final test error {test}"
    said = f"the mean loss of the last fifth is {last:.3g}, {other}"
    return f"{outcome}: {steps}, {said}{error}"


def _advised(verdict: Verdict) -> list[str]:
    """The kinds of plots that the verdict advises to look at."""
    return re.findall(r"^resdiag plot (\S+)", "\n".join(verdict.next), re.MULTILINE)


def _together(seen: Sequence[_Seen]) -> tuple[str, list[str]]:
    """Which runs train; the verdicts counted, whether the error grows with depth, a line each."""
    tally = Counter(one.verdict.name for one in seen)
    went: dict[str, list[str]] = {}
    for one in seen:
        went.setdefault(one.outcome, []).append(one.name)
    said = listing([f"{name} {amount}" for name, amount in tally.most_common()], 9)
    found = [
        f"Verdicts: {said}.",
        *_by_depth(seen),
        *(f"{one.name}: {one.verdict.name}. {one.verdict.summary}" for one in seen),
    ]
    clauses = [
        f"{joined(names) if len(names) <= MOST_NAMES else count(len(names), 'run')} "
        f"{outcome if len(names) == 1 else plural(outcome)}"
        for outcome, names in went.items()
    ]
    return tame(f"{'; '.join(clauses)}."), _short(found, "line")


def _by_depth(seen: Sequence[_Seen]) -> list[str]:
    return [
        f"{item.model}, error by depth: {item.name}. {item.summary}"
        for item in compare([one.run for one in seen])
        if len(item.depths) > 1
    ]


def _short(lines: Sequence[str], noun: str) -> list[str]:
    """The first lines, and how many more there are."""
    more = len(lines) - _MOST_LINES
    rest = [f"And {count(more, f'more {noun}')}, below."] if more > 0 else []
    return [*map(tame, lines[:_MOST_LINES]), *rest]


def _ended(seen: _Seen) -> str:
    """`done after 500 of 500 steps: last loss 1.33, final test error 49.87 %`."""
    run = seen.run
    steps = f"{run.steps} of {run.config.steps}" if run.config.steps else str(run.steps)
    known = {name: seen.numbers[name] for name in _NUMBERS}
    said = [
        f"{_NUMBERS[name]} {number(value, name)}"
        for name, value in known.items()
        if isinstance(value, float) and not math.isnan(value)
    ]
    return f"{run.status} after {steps} steps" + (f": {', '.join(said)}" if said else "")


def _sure(seen: Sequence[_Seen]) -> list[str]:
    """What one seed is worth, what could be judged and what not, where it ran."""
    lines = [_ONE_SEED]
    checks = ["{}: {} of {}".format(one.name, *one.verdict.checks) for one in seen]
    lines.append(f"Checks that had all the numbers that they need: {listing(checks)}.")
    lines += _reservations(seen)
    data = list(dict.fromkeys(one.data for one in seen if one.data))
    lossy = (
        ", lossy copies: compare errors with each other only" if any(map(is_lossy, data)) else ""
    )
    runs = [one.run for one in seen]
    where = [words for words, _ in list_sources(runs, "environment", ("device", "dtype")) if words]
    known = [f"Data: {listing(data)}{lossy}."] if data else []
    known += [f"Computed on: {listing(where)}."] if where else []
    return [*_short(lines, "reservation"), *map(tame, known)]


def _reservations(seen: Sequence[_Seen]) -> list[str]:
    """What could not be judged, in which runs, and why."""
    found: dict[str, list[str]] = {}
    for one in seen:
        for line in _by_reason(unjudged(one.verdict)):
            found.setdefault(line.replace("`", ""), []).append(one.name)
    lines = []
    for line, names in found.items():
        where = f" in {listing(names, MOST_NAMES)}" if len(names) < len(seen) else ""
        lines.append(f"Not judged{where}: {line}")
    return lines


def _by_reason(lines: Sequence[str]) -> list[str]:
    """Rules that could not be applied, those with the same reason together."""
    rules: dict[str, list[str]] = {}
    for line in lines:
        rule, _, reason = line.partition(": ")
        rules.setdefault(reason, []).append(rule)
    return [f"{joined(names)}: {reason}" for reason, names in rules.items()]


# -- chapters --------------------------------------------------------------------------------------


def _outcomes(seen: Sequence[_Seen]) -> Table:
    """How each run ended, its verdict, its numbers; of one run, a row for each that is known."""
    rows: list[list[Entry]] = []
    for one in seen:
        verdict = one.verdict
        places = {"step": verdict.step, "block": verdict.block}
        since = [f"{key} {value}" for key, value in places.items() if value is not None]
        status = Mark(one.run.status, "bad" if one.run.status == "diverged" else "plain")
        numbers = [number(one.numbers[name], name) for name in _NUMBERS]
        rows.append([one.name, status, verdict.name, ", ".join(since), *numbers, one.data])
    header = ["run", "how it ended", "verdict", "since", *_NUMBERS.values(), "data"]
    if len(rows) == 1:
        facts = [
            [name, value]
            for name, value in zip(header, rows[0], strict=True)
            if value not in ("-", "")
        ]
        return Table(caption="Verdict and numbers", header=["", "value"], rows=facts)
    numeric = range(4, 4 + len(_NUMBERS))
    table = Table(caption="Verdict and numbers", header=header, rows=rows, numeric=numeric)
    return table.without_constants(3)


def _evidence(seen: Sequence[_Seen]) -> Section:
    """Per run the numbers of every rule that fired, with their thresholds and sources."""
    parts: list[Part] = []
    header = ["evidence", "metric", "step", "block", "value", "threshold", "source"]
    for one in seen:
        rows = [_evidence_row(item) for item in one.verdict.evidence]
        if rows:
            parts.append(Table(caption=one.name, header=header, rows=rows, numeric=(2, 3, 4, 5)))
        if one.verdict.next:
            parts.append(Text(f"What to do next with {one.name}:"))
            parts.append(Code("\n".join(one.verdict.next)))
    if len(lines := _reservations(seen)) > _MOST_LINES - _OTHER_RESERVATIONS:
        parts.append(Folded("All that was not judged", [Bullets([*map(tame, lines)])]))
    return Section(id="evidence", title="Evidence", parts=parts)


def _evidence_row(item: Evidence) -> list[Entry]:
    places = ["-" if at is None else str(at) for at in (item.step, item.block)]
    value = "nan" if math.isnan(item.value) else number(item.value)
    return [
        tame(item.text), item.metric, *places, value, number(item.threshold), tame(item.source),
    ]  # fmt: skip


def _settings(seen: Sequence[_Seen]) -> Section:
    """The settings of each run, as its folder has them."""
    parts: list[Part] = []
    for one in seen:
        text = json.dumps(one.run.config.to_dict(), indent=1, sort_keys=True, ensure_ascii=False)
        parts.append(Folded(f"Settings of {one.name}", [Code(text, "json")], True))
    return Section(id="settings", title="Settings", parts=parts)
