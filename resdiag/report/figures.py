"""The figures that a study file names: drawn, split where they are crowded, with their data."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from resdiag.errors import ResdiagError
from resdiag.plots.kinds import ACTIVATION_PLOT, KINDS
from resdiag.plots.plotkind import PlotKind
from resdiag.report.parts import Entry, Picture, Table
from resdiag.report.results import CellResult, Results
from resdiag.report.words import number, settings_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from resdiag.plots.view import Record, View
    from resdiag.runs.folder import Run

MOST_LINES = 10
"""Lines in a figure that can be told apart; of more, one figure per depth, and so on."""

MOST_REPEATS = 4
"""Lines of one variant beside others: `resdiag.plots.style` has so many line styles."""

_LATER = (
    "recipe", "steps", "epochs", "lr", "warmup", "momentum", "nesterov", "weight_decay",
    "record_first", "every", "commit_every",
)  # fmt: skip
"""Settings that act later than the first step."""


@dataclass(frozen=True, kw_only=True)
class Drawings:
    """Which figures are drawn, and how; the others have their data and tables only.

    Attributes:
        only: Names of the figures, or of the kinds of plots; None draws all.
        deepest: Whether of a figure that is split only the drawing of the deepest networks is made.
        pdf: Whether each is written as PDF, too: that takes as long as drawing it.
    """

    only: Collection[str] | None = None
    deepest: bool = False
    pdf: bool = False

    def include(self, name: str) -> bool:
        """Whether a figure or a kind of plot is among those."""
        return self.only is None or name in self.only


EVERYTHING = Drawings(pdf=True)


def draw_figures(results: Results, how: Drawings = EVERYTHING) -> Iterator[Picture]:
    """The figures of a study, in its order.

    Args:
        results: What came out.
        how: Which ones are drawn.
    """
    for place, figure in enumerate(results.study.file.figure, start=1):
        if figure.plot == ACTIVATION_PLOT.name:
            yield _draw_activations(place, figure.title, how)
            continue
        members = [item for item in results.select(figure.cells.given) if _has_records(item)]
        kind = KINDS[figure.plot]
        title = figure.title or kind.title
        stem = f"{place:02d}-{figure.plot}"
        blank = Picture(
            number=place, name=stem, title=title, question=kind.question, reading=kind.reading
        )
        if not members:
            yield replace(blank, reason="none of its cells has a recorded step")
            continue
        if kind.first_step_only:
            members = _distinct_at_start(members)
        facets = list(_facets(results, members))
        depths = [max(item.cell.request.depth for item in some) for _, some in facets]
        deepest = depths.index(max(depths))
        for number_, (where, some) in enumerate(facets):
            name = re.sub(r"[^a-z0-9.]+", "-", f"{stem} {where}".lower()).strip("-")
            full = f"{title}: {where}" if where else title
            one = replace(blank, name=name, title=full, depth=depths[number_])
            runs = [item.run for item in some if item.run is not None]
            wanted = how.include(name) and (number_ == deepest or not how.deepest)
            yield _draw(one, kind, runs, how if wanted else None)


def _has_records(item: CellResult) -> bool:
    run = item.run
    return run is not None and run.metrics_frame is not None and len(run.metrics_frame) > 0


def _distinct_at_start(members: Sequence[CellResult]) -> list[CellResult]:
    """One cell of those that are equal before the first update."""
    kept: dict[str, CellResult] = {}
    for item in members:
        plain = replace(item.cell.request, **dict.fromkeys(_LATER))  # type: ignore[arg-type]
        kept.setdefault(repr(asdict(plain)), item)
    return list(kept.values())


def _facets(
    results: Results, members: Sequence[CellResult]
) -> Iterator[tuple[str, list[CellResult]]]:
    """The cells in lots of at most `MOST_LINES` settings: by depth, then by what else tells."""
    split: list[str] = []
    order = [name for name in results.telling if name != "variant"]
    order.sort(key=lambda name: name not in ("data", "depth"))
    while order and _are_crowded(results, _lots(members, split)):
        split.append(order.pop(0))
    for where, lot in _lots(members, split).items():
        groups = results.group(lot)
        for start in range(0, len(groups), MOST_LINES):
            part = [m for group in groups[start : start + MOST_LINES] for m in group.members]
            more = f" ({start // MOST_LINES + 1})" if len(groups) > MOST_LINES else ""
            yield f"{where}{more}".strip(), part


def _lots(members: Sequence[CellResult], names: Sequence[str]) -> dict[str, list[CellResult]]:
    """The cells by the words of some of their settings."""
    lots: dict[str, list[CellResult]] = {}
    for item in members:
        where = settings_words({name: getattr(item.cell.request, name) for name in names})
        lots.setdefault(where, []).append(item)
    return lots


def _are_crowded(results: Results, lots: Mapping[str, Sequence[CellResult]]) -> bool:
    """Whether a drawing of a lot would have lines that cannot be told apart."""
    for lot in lots.values():
        groups = results.group(lot)
        repeats = Counter(group.members[0].cell.request.variant for group in groups)
        if len(groups) > MOST_LINES or (len(repeats) > 1 and max(repeats.values()) > MOST_REPEATS):
            return True
    return False


def _draw_activations(place: int, title: str, how: Drawings) -> Picture:
    """The figure that no run is needed for."""
    from resdiag.plots.activations import activation_moments, activation_values, draw

    kind, name = ACTIVATION_PLOT, f"{place:02d}-{ACTIVATION_PLOT.name}"
    moments = activation_moments()
    rows: list[list[Entry]] = [
        [label, *(number(value) for value in found.values())] for label, found in moments.items()
    ]
    picture = Picture(
        number=place, name=name, title=title or kind.title, question=kind.question,
        reading=kind.reading, svg=b"",
        csv=activation_values().to_csv(index=False, float_format="%.6g", lineterminator="\n"),
        table=Table(
            caption=f"{title or kind.title}: output for standard normal input",
            header=["activation", *next(iter(moments.values()))], rows=rows, numeric=(1, 2, 3),
        ),
    )  # fmt: skip
    return _with_files(picture, draw(), how) if how.include(name) else picture


def _with_files(picture: Picture, drawing: "Figure", how: Drawings) -> Picture:
    from resdiag.plots.figurefile import render

    pdf = render(drawing, "pdf", letters=True) if how.pdf else b""
    return replace(picture, svg=render(drawing, "svg", letters=True), pdf=pdf)


def draw_runs(
    kinds: Sequence[str], runs: "Sequence[Run]", how: Drawings = EVERYTHING
) -> Iterator[Picture]:
    """Runs side by side in each of some kinds of plots; what cannot be drawn says why.

    Args:
        kinds: Names in `resdiag.plots.kinds.KINDS`.
        runs: At least one.
        how: Which kinds are drawn.
    """
    for place, name in enumerate(kinds, start=1):
        kind = KINDS[name]
        blank = Picture(
            number=place, name=f"{place:02d}-{name}", title=kind.title, question=kind.question,
            reading=kind.reading, depth=max(run.config.depth for run in runs),
        )  # fmt: skip
        yield _draw(blank, kind, runs, how if how.include(name) else None)


def _draw(blank: Picture, kind: PlotKind, runs: "Sequence[Run]", how: Drawings | None) -> Picture:
    """A picture with its data, and with its drawing if that is wanted."""
    from resdiag.plots.drawing import draw_view
    from resdiag.plots.grouping import open_view

    try:
        view = open_view(kind, runs, step=None, theory=True)
        picture = replace(blank, svg=b"", csv=to_csv(view), table=to_table(view, blank.title))
        return _with_files(picture, draw_view(view), how) if how else picture
    except ResdiagError as error:
        return replace(blank, reason=error.message)


# -- the numbers of a figure -----------------------------------------------------------------------


def _columns(view: "View") -> tuple[bool, list[str]]:
    """Whether it is drawn over steps, and which metrics it draws."""
    record = view.records[0]
    table = record.curve if view.kind.axis == "step" else record.metrics
    return view.kind.axis == "step", [name for name in view.kind.needs if name in table]


def to_csv(view: "View") -> str:
    """The data of a figure: a row per line, seed, step and block, four digits."""
    over_time, names = _columns(view)
    parts = []
    for series in view.series:
        for record in series.records:
            table = record.curve if over_time else record.metrics
            keys = ["step"] if over_time else ["step", "block"]
            part = table[[*keys, *(name for name in names if name in table)]].copy()
            part.insert(0, "line", re.sub(r" \(\d+ seeds\)$", "", series.label))
            part.insert(1, "seed", record.run.config.seed)
            parts.append(part)
    text: str = pd.concat(parts).to_csv(index=False, float_format="%.4g", lineterminator="\n")
    return text


def to_table(view: "View", title: str) -> Table:
    """First, middle and last of each line, or first, least and last over steps."""
    over_time, names = _columns(view)
    rows: list[list[Entry]] = []
    for series in view.series:
        for name in names:
            ends = [_ends(record, name, over_time) for record in series.records]
            if any(not math.isnan(value) for triple in ends for value in triple):
                middle = (_median(column, name) for column in zip(*ends, strict=True))
                rows.append([series.label, name, *middle])
    blocks, steps = ("first block", "middle block", "last block"), ("first", "lowest", "last")
    header = ["line", "metric", *(steps if over_time else blocks)]
    when = "over steps" if over_time else "at the last finite step"
    return Table(
        caption=f"{title}: {when}, median over seeds", header=header, rows=rows, numeric=(2, 3, 4)
    )


def _ends(record: "Record", name: str, over_time: bool) -> tuple[float, float, float]:
    """First, least and last over steps; or first, middle and last block at one step."""
    if over_time:
        column = record.curve[name].to_numpy() if name in record.curve else np.empty(0)
        known = column[~np.isnan(column)].astype(np.float64)
    else:
        known = record.grid(name)[:, record.last_finite]
    if not len(known):
        return math.nan, math.nan, math.nan
    middle = known.min() if over_time else known[len(known) // 2]
    return float(known[0]), float(middle), float(known[-1])


def _median(values: Sequence[float], name: str) -> str:
    known = [value for value in values if not math.isnan(value)]
    return number(float(np.median(known)), name) if known else "-"
