"""The axis of blocks: names or numbers on its ticks, stages above it, the stem in front."""

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import FuncFormatter

from resdiag.plots.scale import finish_scale, whole_ticks
from resdiag.plots.style import PALE, WIDTH, ZERO
from resdiag.plots.view import Record, View

_LETTER = 0.058  # inches per letter of 7 pt DejaVu Sans on average
_LINE = 0.135  # inches per line of it
_FRAME = 0.62  # inches beside a panel for labels
_UPRIGHT = 3  # letters of names that need not be turned


def finish_blocks(
    axes: Axes, view: View, *, log: bool = False, stem: bool = False, floor: float | None = None,
    also: Sequence[float] = (),
) -> None:  # fmt: skip
    """Stage boundaries, the axis of blocks, and a scale that survives any range.

    Args:
        axes: A panel with its lines.
        view: What is drawn.
        log: Whether the y axis is logarithmic.
        stem: Whether the stem stands in front as block -1.
        floor: A value that the y axis reaches.
        also: More such values.
    """
    _draw_stages(axes, view)
    axes.set_xlabel("depth (share of the blocks)" if view.normalised else "block")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g}" if at >= 0 else ""))
    if not view.normalised:
        count = view.records[0].n_blocks
        _name_blocks(axes, view)
        axes.set_xlim((-1.5 if stem else -0.5) - 0.01 * count, count - 0.5 + 0.01 * count)
        if stem:
            axes.axvspan(-2.5, -0.5, color="0.95", lw=0, zorder=0)
            # the name stands above the marks of zeros
            low = 0.26 * any(line.get_gid() == ZERO for line in axes.lines)
            axes.annotate(
                "stem", (-1, low), xycoords=axes.get_xaxis_transform(), xytext=(0, 3), size=7,
                textcoords="offset points", rotation=90, ha="center", va="bottom", color="0.45",
            )  # fmt: skip
    finish_scale(axes, log=log, floor=floor, also=also)


def block_words(shared: str) -> str:
    """The label of an axis of blocks whose names all begin with `shared`."""
    return f"block of {shared}" if shared else "block"


def _name_blocks(axes: Axes, view: View) -> None:
    """The modules on the ticks where all runs have the same ones, else numbers."""
    shared, names = view.records[0].names
    if not names or any(record.names != (shared, names) for record in view.records):
        whole_ticks(axes)
        return
    letters = max(map(len, names))
    turned = letters > _UPRIGHT and letters * len(names) * _LETTER > 0.8 * panel_width(axes)
    most = most_labels(axes) if turned else int(panel_width(axes) / (_LETTER * (letters + 2)))
    places = range(0, len(names), max(1, -(-len(names) // max(1, most))))
    axes.set_xticks(places, [names[place] for place in places], rotation=90 if turned else 0)
    axes.set_xlabel(block_words(shared))


def panel_width(axes: Axes) -> float:
    """The width of a panel in inches, before the layout is known."""
    return WIDTH * _share(axes, along_y=False) - _FRAME


def most_labels(axes: Axes, *, along_y: bool = False) -> int:
    """How many lines of text fit beside each other along an axis."""
    if not along_y:
        return max(1, int(panel_width(axes) / _LINE))
    page, part = axes.get_figure(root=True), axes.get_figure()
    height = page.get_figheight() if page is not None else 1.0
    height *= part.bbox_relative.height if isinstance(part, SubFigure) else 1.0
    return max(1, int((height * _share(axes, along_y=True) - 0.5) / _LINE))


def _share(axes: Axes, *, along_y: bool) -> float:
    """The share of the figure that the panel's cell of the grid has along a direction."""
    spec = axes.get_subplotspec()
    if spec is None:
        return 1.0
    grid = spec.get_gridspec()
    ratios = grid.get_height_ratios() if along_y else grid.get_width_ratios()
    span = spec.rowspan if along_y else spec.colspan
    equal = np.ones(grid.nrows if along_y else grid.ncols)
    weights = equal if ratios is None else np.asarray(ratios, dtype=np.float64)
    return float(weights[span.start : span.stop].sum() / weights.sum())


def share_blocks(columns: Sequence[Sequence[Axes]]) -> None:
    """Panels above each other share the axis of blocks: its labels stand below the lowest only."""
    for column in columns:
        for axes in column[:-1]:
            axes.sharex(column[-1])
            axes.tick_params(labelbottom=False)
            axes.set_xlabel("")


def _draw_stages(axes: Axes, view: View) -> None:
    """Light lines where a stage begins, with names above; none where the runs disagree."""
    places = {tuple(_edges(record, view.normalised)) for record in view.records}
    edges = places.pop()
    if places or len(edges) < 3:
        axes.set_title(axes.get_title(loc="left"), loc="left", pad=5)
        return
    for edge in edges[1:-1]:
        axes.axvline(edge, color=PALE, lw=0.8, zorder=0.5)
    inches = panel_width(axes) / (edges[-1] - edges[0])
    spans = list(itertools.pairwise(edges))
    narrow = any((right - left) * inches < _LETTER * len("stage 10") for left, right in spans)
    end = -np.inf
    for number, (left, right) in enumerate(spans):
        text = f"stage {number}" if not narrow or number == 0 else str(number)
        half = _LETTER * (len(text) + 0.5) / inches / 2
        middle = max((left + right) / 2, edges[0] + half)
        if middle - half < end:
            continue  # it would overprint the one before
        end = middle + half
        axes.text(
            middle, 1.01, text, transform=axes.get_xaxis_transform(), ha="center", va="bottom",
            size=7, color="0.45",
        )  # fmt: skip


def _edges(record: Record, normalised: bool) -> list[float]:
    """Where stages begin and end on the axis, rounded so that equal places compare equal."""
    bounds = [0, *record.boundaries, record.n_blocks]
    return [round(b / record.n_blocks, 6) if normalised else b - 0.5 for b in bounds]
