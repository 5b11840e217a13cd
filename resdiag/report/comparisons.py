"""Comparisons along one setting: the error by depth, and the learning rate that breaks it."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from resdiag.diagnose.degraded import (
    CLOSE,
    LEAST_SEEDS,
    Comparison,
    Depth,
    Gap,
    compare_depths,
    points,
)
from resdiag.report.parts import Entry, Mark, Table
from resdiag.report.results import Group, Results
from resdiag.report.words import count, joined, listing, settings_words, spread_words, summarise
from resdiag.theory.intervals import PERCENT

_WORDS = {
    "degraded": "worse with depth",
    "overfit": "worse with depth on test images only",
    "not_degraded": "not shown to be worse",
    "undecidable": "not decidable",
}
_VERBS = {
    "degraded": ("gets worse", "get worse"),
    "overfit": ("gets worse on test images only", "get worse on test images only"),
    "not_degraded": ("is not shown to get worse", "are not shown to get worse"),
    "undecidable": ("cannot be decided", "cannot be decided"),
}
"""The same as verbs, of one network and of several."""
_KINDS = {"degraded": "bad", "overfit": "bad", "undecidable": "open"}


@dataclass(frozen=True)
class ByDepth:
    """Cells that differ in depth and seed only.

    Attributes:
        name: Their settings in words.
        comparison: What the rule says.
    """

    name: str
    comparison: Comparison


def compare_by_depth(results: Results) -> list[ByDepth]:
    """The lines of a study over depth, each with what `resdiag.diagnose.degraded` says of it.

    None where depth does not vary, or where the question is another one.
    """
    if "depth" not in results.telling or not asks_of_errors(results):
        return []
    found = []
    for name, groups in group_networks(results).items():
        depths = sorted(map(_depth, groups), key=lambda depth: depth.depth)
        if len(depths) > 1 and any(math.isfinite(e) for d in depths for e in d.test):
            found.append(ByDepth(name, compare_depths(name, depths)))
    return found


def group_networks(results: Results) -> dict[str, list[Group]]:
    """The groups that differ in nothing but the depth, by their other settings in words."""
    rest = [name for name in results.telling if name != "depth"]
    lots: dict[str, list[Group]] = {}
    for group in results.groups:
        name = settings_words({key: group.settings[key] for key in rest})
        lots.setdefault(name or "the network", []).append(group)
    return lots


def asks_of_errors(results: Results) -> bool:
    """Whether final errors answer the study's question.

    Those of a study that expects values and trains for less than an epoch do not, nor those of one
    that expects values by the learning rate: it asks at which rate networks diverge.
    """
    if not results.study.file.expected:
        return True
    return "lr" not in results.telling and any(group.trained for group in results.groups)


def _depth(group: Group) -> Depth:
    return Depth(
        depth=group.members[0].cell.request.depth,
        train=tuple(member.number("train_error") for member in group.ended),
        test=tuple(member.number("test_error") for member in group.ended),
        seeds=tuple(member.cell.request.seed for member in group.ended),
    )


def depth_headline(lines: Sequence[ByDepth]) -> str:
    """The conclusions in one sentence; what was seen, where nothing can be concluded."""
    depths = sorted({d.depth for line in lines for d in line.comparison.depths})
    names: dict[str, list[str]] = {}
    for line in lines:
        names.setdefault(line.comparison.name, []).append(line.name)
    if set(names) != {"undecidable"}:
        said = [
            f"{joined(names[name])} {_VERBS[name][len(names[name]) > 1]}"
            for name in _VERBS
            if name in names
        ]
        return f"From depth {depths[0]} to {depths[-1]}, {'; '.join(said)}."
    known = [line.comparison.test for line in lines if line.comparison.test]
    if not known:
        return f"Whether the error grows with depth is not decidable yet: {_why_not(lines)}."
    more = sum(gap.value > 0 for gap in known)
    return (
        f"The test error at depth {depths[-1]} is higher than at {depths[0]} in {more} of "
        f"{count(len(known), 'setting')}, but this is not conclusive yet: {_why_not(lines)}."
    )


def _why_not(lines: Sequence[ByDepth]) -> str:
    """The commonest obstacle."""
    return Counter(map(_reason, lines)).most_common(1)[0][0]


def _reason(line: ByDepth) -> str:
    """Why nothing can be said of a line; its numbers stand in the table."""
    return line.comparison.summary.removeprefix("Degradation: ").partition(": ")[0].rstrip(".")


def depth_table(lines: Sequence[ByDepth]) -> Table:
    """Test error by depth with its spread, how far both errors change, and what that means."""
    depths = sorted({d.depth for line in lines for d in line.comparison.depths})
    header = ["cells", "with depth", *(f"depth {depth}" for depth in depths), "seeds"]
    header += ["change, test", "change, training"]
    rows = [_row(line, depths) for line in lines]
    return Table(
        caption="Final test error, mean ± standard deviation over seeds; change in points from the "
        f"shallowest network to the deepest, with its {PERCENT} interval",
        header=header,
        rows=rows,
        numeric=range(2, len(depths) + 5),
    )


def _row(line: ByDepth, depths: Sequence[int]) -> list[Entry]:
    known = {depth.depth: depth for depth in line.comparison.depths}
    errors = [
        spread_words(summarise(known[d].test), "test_error") if d in known else "" for d in depths
    ]
    sizes = [len(depth.test) for depth in line.comparison.depths]
    seeds = str(sizes[0]) if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"
    name = line.comparison.name
    # few seeds and a small change are seen in their columns, and said below
    seen = min(sizes) < LEAST_SEEDS or _reason(line) == CLOSE
    why = "" if name != "undecidable" or seen else _reason(line)
    mark = Mark(_WORDS[name], _KINDS.get(name, "good"), why)
    changes = [_change(line.comparison.test), _change(line.comparison.train)]
    return [line.name, mark, *errors, seeds, *changes]


def _change(gap: Gap | None) -> str:
    return "-" if gap is None else points(gap.interval)


def depth_rule(lines: Sequence[ByDepth]) -> str:
    """What the conclusions mean, and how many seeds they take."""
    least = min(len(depth.test) for line in lines for depth in line.comparison.depths)
    few = f" Some settings have {count(least, 'seed')} here: their changes may be chance."
    more = few if least < LEAST_SEEDS else ""
    return (
        f"Worse with depth: the change of the training and of the test error exceeds 0.1 points, "
        f"and its {PERCENT} interval lies above 0, over {LEAST_SEEDS} seeds or more at both "
        f"depths. Not decidable: only that of the training error does. The intervals are t "
        f"intervals of the differences seed by seed, since runs of one seed see the same batches."
        f"{more}"
    )


_CAPTION = "Lowest learning rate at which a seed diverged"

Rates: TypeAlias = dict[float, bool]
"""Learning rates that were tried, and whether a seed diverged."""


def threshold_words(results: Results) -> list[str]:
    """One sentence; none where the learning rate does not vary."""
    rest = [name for name in results.telling if name != "lr"]
    words = [
        f"{settings_words(dict(zip(rest, where, strict=True)))}: {_threshold(rates)}"
        for where, rates in _tried(results, rest).items()
    ]
    return [f"{_CAPTION}: {'; '.join(words)}."] if words else []


def threshold_headline(results: Results) -> str:
    """From which learning rate on each network diverges, at each depth; empty without rates.

    Without the full stop: how many seeds that is may be added.
    """
    depths = "depth" in results.telling
    rest = [name for name in results.telling if name not in ("lr", "depth")]
    by_network: dict[str, dict[int, Rates]] = {}
    for where, rates in _tried(results, [*rest, *(["depth"] if depths else [])]).items():
        name = settings_words(dict(zip(rest, where, strict=False))) or "the network"
        by_network.setdefault(name, {})[where[-1] if depths else 0] = rates
    clauses, kept = [], dict[str, float]()
    for name, by_depth in by_network.items():
        lowest = {depth: _lowest(rates) for depth, rates in sorted(by_depth.items())}
        if not any(lowest.values()):
            kept[name] = max(max(rates) for rates in by_depth.values())
            continue
        words = [
            (f"{rate:g}" if rate else "no rate tried") + (f" at depth {depth}" if depths else "")
            for depth, rate in lowest.items()
        ]
        clauses.append(f"{name} diverges from learning rate {joined(words)}")
    if kept:
        verb = "diverges" if len(kept) == 1 else "diverge"
        clauses.append(
            f"{joined(list(kept))} {verb} at no rate tried, up to {max(kept.values()):g}"
        )
    return "; ".join(clauses)


def _lowest(rates: Rates) -> float | None:
    """The lowest rate at which a seed diverged; None if none did."""
    return min((rate for rate, diverged in rates.items() if diverged), default=None)


def threshold_table(results: Results) -> Table | None:
    """A row per setting and a column per depth; None where neither varies with the rate."""
    rest = [name for name in results.telling if name not in ("lr", "depth")]
    tried = _tried(results, [*rest, "depth"]) if "depth" in results.telling else {}
    if not rest or not tried:
        return None
    depths = sorted({where[-1] for where in tried})
    names = list(dict.fromkeys(where[:-1] for where in tried))
    rows = [
        [
            settings_words(dict(zip(rest, name, strict=True))),
            *(_threshold(tried.get((*name, depth), {})) for depth in depths),
        ]
        for name in names
    ]
    header = ["cells", *(f"depth {depth}" for depth in depths)]
    return Table(caption=_CAPTION, header=header, rows=rows)


def _tried(results: Results, names: list[str]) -> Mapping[tuple[Any, ...], Rates]:
    """By the values of settings, the learning rates there, where there are several."""
    if "lr" not in results.telling:
        return {}
    places: dict[tuple[Any, ...], Rates] = {}
    for group in results.groups:
        if group.ended and group.settings["lr"] is not None:
            where = tuple(group.settings[name] for name in names)
            lost = any(member.state == "diverged" for member in group.ended)
            places.setdefault(where, {})[group.settings["lr"]] = lost
    return {where: rates for where, rates in places.items() if len(rates) > 1}


def _threshold(rates: Rates) -> str:
    """E.g. `0.01 (none at 0.001)`; "" where nothing was tried."""
    lost = [rate for rate, diverged in rates.items() if diverged]
    kept = [rate for rate, diverged in rates.items() if not diverged]
    if not lost:
        return f"none up to {max(kept):g}" if kept else ""
    below = [rate for rate in kept if rate < min(lost)]
    words = f"{min(lost):g}" + (f" (none at {max(below):g})" if below else ", the lowest tried")
    above = [rate for rate in kept if rate > min(lost)]
    return f"{words}, yet none at {listing([f'{rate:g}' for rate in above])}" if above else words
