"""Any metric per block, built in or custom: by block, and block against step for one run."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resdiag.plots.byblock import finish_blocks, trace_blocks
from resdiag.plots.heat import draw_heat, heat_keys
from resdiag.plots.lines import head_panel
from resdiag.plots.scale import share_scale
from resdiag.plots.sheet import legend, open_sheet, subject
from resdiag.plots.view import Record, Trace, View, moment_words

_DECADES = 1.5


def draw_column(view: View) -> Figure:
    """Lines by block, and a map of block and step for one run; lines at two moments for several."""
    single = view.single
    return _draw_single(view, single) if single else _draw_several(view)


def _draw_single(view: View, record: Record) -> Figure:
    metric, log = view.kind.needs[0], _spans_decades(view)
    traces = view.history()
    figure, body = open_sheet(
        view, f"{view.kind.title}: {subject(view)}", height=4.7, shown=view.steps_shown(traces)
    )
    lines, heat = body.subplots(2, 1, height_ratios=[1, 1.1])
    _draw_lines(lines, view, traces, "by block", log=log)
    grid, broken = record.grid(metric), record.broken(metric)
    draw_heat(heat, record, grid, broken, metric, log=log)
    head_panel(heat, "every recorded step", "block")
    legend(body, extra=heat_keys(broken, np.isnan(grid) & ~broken))
    return figure


def _draw_several(view: View) -> Figure:
    log = _spans_decades(view)
    layers = [view.traces(moment) for moment in view.moments()]
    figure, body = open_sheet(
        view, f"{view.kind.title.removesuffix(' and step')}: {subject(view)}",
        height=0.5 + 2.2 * len(layers), shown="; ".join(map(moment_words, layers)),
    )  # fmt: skip
    panels = body.subplots(len(layers), 1, squeeze=False)[:, 0]
    for axes, layer in zip(panels, layers, strict=True):
        _draw_lines(axes, view, layer, moment_words(layer), log=log)
    share_scale(panels)
    legend(body)
    return figure


def _draw_lines(axes: Axes, view: View, traces: list[Trace], title: str, *, log: bool) -> None:
    metric = view.kind.needs[0]
    trace_blocks(axes, view, traces, metric, log=log)
    head_panel(axes, title, metric, stages=True)
    finish_blocks(axes, view, log=log)


def _spans_decades(view: View) -> bool:
    """Whether values are positive and so far apart that a linear axis would hide most of them."""
    grids = [record.grid(view.kind.needs[0]) for record in view.records]
    values = np.concatenate([grid[np.isfinite(grid)] for grid in grids])
    if not values.size or values.min() < 0 or not (values > 0).any():
        return False
    positive = values[values > 0]
    return bool(np.log10(positive.max()) - np.log10(positive.min()) > _DECADES)
