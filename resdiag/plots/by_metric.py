"""Any metric per block, built in or custom: by block, and block against step for one run.

The update ratio is the one of them that has a name of its own as a kind of plot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from resdiag.plots.lazy import canvas, np
from resdiag.plots.plotkind import PlotKind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from resdiag.plots.view import Record, Trace, View

_DECADES = 1.5
_FORMULAS = {"update_ratio": r"$\|\Delta\theta\|/\|\theta\|$"}
"""What an axis says; the metric's id if it is not here."""
_USUAL = {"update_ratio": (1e-3, "1e-3")}
"""A value that is usual, and how it is written."""


def draw(view: View) -> Figure:
    """Lines by block, and a map of block and step for one run; lines at two moments for several."""
    single = view.single
    return _draw_single(view, single) if single else _draw_several(view)


def _draw_single(view: View, record: Record) -> Figure:
    metric, log = view.kind.needs[0], _spans_decades(view)
    traces = view.history()
    figure, body = canvas.open_sheet(
        view,
        f"{view.kind.title}: {canvas.subject(view)}",
        height=4.7,
        shown=view.steps_shown(traces),
    )
    lines, heat = body.subplots(2, 1, height_ratios=[1, 1.1])
    _draw_lines(lines, view, traces, "by block", log=log)
    grid, broken = record.grid(metric), record.broken(metric)
    canvas.draw_heat(heat, record, grid, broken, _FORMULAS.get(metric, metric), log=log)
    canvas.head_panel(heat, "every recorded step", "block")
    canvas.legend(body, extra=canvas.heat_keys(broken, np.isnan(grid) & ~broken))
    return figure


def _draw_several(view: View) -> Figure:
    log = _spans_decades(view)
    layers = [view.traces(moment) for moment in view.moments()]
    figure, body = canvas.open_sheet(
        view, f"{view.kind.title.removesuffix(' and step')}: {canvas.subject(view)}",
        height=0.5 + 2.2 * len(layers), shown="; ".join(map(canvas.moment_words, layers)),
    )  # fmt: skip
    panels = body.subplots(len(layers), 1, squeeze=False)[:, 0]
    for axes, layer in zip(panels, layers, strict=True):
        _draw_lines(axes, view, layer, canvas.moment_words(layer), log=log)
    canvas.share_scale(panels)
    canvas.legend(body)
    return figure


def _draw_lines(axes: Axes, view: View, traces: list[Trace], title: str, *, log: bool) -> None:
    metric = view.kind.needs[0]
    usual = _USUAL.get(metric)
    note = f" (dotted: {usual[1]}, usual)" if usual else ""
    canvas.trace_blocks(axes, view, traces, metric, log=log)
    canvas.head_panel(axes, f"{title}{note}", _FORMULAS.get(metric, metric), stages=True)
    canvas.finish_blocks(axes, view, log=log)
    if usual:
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, usual[0] / 3), max(high, usual[0] * 3))
        canvas.guide(axes, usual[0], "")


def _spans_decades(view: View) -> bool:
    """Whether values are positive and so far apart that a linear axis would hide most of them."""
    if view.kind.needs[0] in _USUAL:
        return True
    grids = [record.grid(view.kind.needs[0]) for record in view.records]
    values = np.concatenate([grid[np.isfinite(grid)] for grid in grids])
    if not values.size or values.min() < 0 or not (values > 0).any():
        return False
    positive = values[values > 0]
    return bool(np.log10(positive.max()) - np.log10(positive.min()) > _DECADES)


KIND = PlotKind(
    name="updates",
    title="Update to weight ratio by block and step",
    question="How far does a step move the weights of each block?",
    reading=(
        "about 1e-3 is usual; above 0.1 a step replaces the weights, far below 1e-4 a block "
        "hardly learns. Blocks whose ratios differ by decades train at different speeds."
    ),
    needs=("update_ratio",),
    draw=draw,
)
