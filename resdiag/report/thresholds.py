"""Where the learning rate varies: the least one at which a cell diverged, by everything else."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from resdiag.report.parts import Table
from resdiag.report.results import Results
from resdiag.report.words import listing, settings_words

_CAPTION = "Least learning rate at which a seed diverged"

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
    words = f"{min(lost):g}" + (f" (none at {max(below):g})" if below else ", the least tried")
    above = [rate for rate in kept if rate > min(lost)]
    return f"{words}, yet none at {listing([f'{rate:g}' for rate in above])}" if above else words
