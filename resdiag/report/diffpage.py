"""The page of `resdiag diff`: the answer, a map of the differences, the table of all metrics."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from resdiag.agreement.differences import Differences
from resdiag.agreement.result import Agreement, Row
from resdiag.report.parts import Bullets, Entry, Folded, Mark, Page, Part, Picture, Section, Table
from resdiag.report.render import to_html
from resdiag.report.words import number, tame
from resdiag.report.write import made_by
from resdiag.runs.files import make_folder, write_file
from resdiag.runs.folder import Run
from resdiag.runs.watched_config import WatchedConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from resdiag.plots.view import Record

_HEADER = ("metric", "direction", "largest difference", "at", "in a repeat", "first beyond")
_MOST_ROWS = 12
_SMALLEST = 1e-9  # float32 has no smaller relative difference but 0


def write_diff_page(found: Agreement, path: Path) -> None:
    """Write the page of a comparison as one HTML file.

    Raises:
        StorageError: The file cannot be written.
    """
    make_folder(path.parent)
    write_file(path, to_html(replace(diff_page(found), made=made_by())).encode())


def diff_page(found: Agreement) -> Page:
    """What the page of a comparison says."""
    table = _table("Metrics that differ most", found.shown_rows(_MOST_ROWS))
    everything = Folded("Every metric that was compared", [_table("All metrics", found.rows)])
    parts: list[Part] = [picture] if (picture := _picture(found)) else []
    settings: list[Part] = [
        Bullets([tame(f"{key}: {a} and {b}") for key, (a, b) in found.differs.items()])
    ]
    sections = [
        Section(id="where", title="Where they differ", parts=[*parts, table, everything]),
        Section(
            id="settings",
            title="Settings that differ",
            parts=settings if found.differs else [Bullets(["None."])],
        ),
    ]
    others = [text for label, text in found.lines() if label == "More"]
    return Page(
        name=tame(f"{Path(found.a).name} and {Path(found.b).name}", 160),
        about="two runs compared",
        question="Do the two runs agree?",
        headline=tame(found.answer),
        found=[tame(text) for text in (found.reading, *others) if text],
        sure=[tame(text) for text in (f"Allowed: {found.tolerance}.", *found.notes)],
        claim=(),
        sections=sections,
    )


def _table(caption: str, rows: "list[Row] | tuple[Row, ...]") -> Table:
    cells: list[list[Entry]] = []
    for row in rows:
        first = row.first
        beyond: Entry = Mark(_at(first.step, first.block), "bad") if first else "-"
        noise = "-" if row.noise is None else number(row.noise)
        where = _at(row.step, row.block)
        judged = row.direction if row.decides else f"{row.direction} (not judged)"
        cells.append([row.metric, judged, number(row.largest), where, noise, beyond])
    return Table(caption=caption, header=_HEADER, rows=cells, numeric=(2, 4))


def _at(step: int, block: int | None) -> str:
    return f"step {step}" + ("" if block is None else f", block {block}")


def _picture(found: Agreement) -> Picture | None:
    """The map of the first metric that parts, or of the one that differs most; None without one."""
    per_block = {name: table for name, table in found.tables.items() if table.place.per_block}
    judged = [row for row in found.rows if row.metric in per_block and row.decides]
    if not judged:
        return None
    first = found.first
    if first is not None and first.metric in per_block:
        metric = first.metric
    else:
        beyond = [row for row in judged if row.first is not None] or judged
        metric = max(beyond, key=lambda row: row.largest).metric
    drawing = _draw(per_block[metric], found)
    from resdiag.plots.figurefile import render

    return Picture(
        number=1,
        name="differences",
        title=f"Relative difference of {metric} by step and block",
        question="In which step and block do the runs differ?",
        reading="Darkest: equal. A column that turns bright from one block on begins there.",
        svg=render(drawing, "svg", letters=True),
    )


def _draw(table: Differences, found: Agreement) -> "Figure":
    """A heat map of relative differences, with a frame around the first one beyond."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    from resdiag.plots.heat import draw_heat
    from resdiag.plots.style import ALARM, WIDTH, look

    values = np.maximum(table.relative.T, _SMALLEST)
    broken = np.isinf(values)
    largest = float(np.max(values[np.isfinite(values)], initial=10 * _SMALLEST))
    with look():
        figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
        figure.set_label(f"Relative difference of {table.place.metric}")
        axes = figure.add_subplot()
        keys: list[Patch] = draw_heat(
            axes, _grid(table), values, broken, "relative difference",
            limits=(_SMALLEST, max(largest, 10 * _SMALLEST)),
        )  # fmt: skip
        row = next(row for row in found.rows if row.metric == table.place.metric)
        if row.first is not None and row.first.block is not None:
            column = int(np.searchsorted(table.steps, row.first.step))
            line = int(np.searchsorted(table.blocks, row.first.block))
            frame = Rectangle((column, line), 1, 1, fill=False, ec=ALARM, lw=1.8)
            frame.set_label("first beyond the tolerance")
            axes.add_patch(frame)
            keys.append(frame)
        if keys:
            figure.legend(handles=keys, loc="outside upper left", ncols=len(keys))
    return figure


def _grid(table: Differences) -> "Record":
    """The steps and blocks of a table, for the axes of a heat map."""
    import pandas as pd

    from resdiag.plots.view import Record

    count = len(table.blocks)
    frame = pd.DataFrame(
        {
            "step": np.repeat(table.steps, count),
            "block": np.tile(np.arange(count), len(table.steps)),
        }
    )
    run = Run(config=WatchedConfig(model="both"), blocks=[{} for _ in range(count)])
    return Record(run, frame, pd.DataFrame())
