"""Update to weight ratio: how far a step moves the weights of each block."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resdiag.plots.byblock import finish_blocks, trace_blocks
from resdiag.plots.heat import draw_heat, heat_keys
from resdiag.plots.lines import guide, head_panel
from resdiag.plots.scale import share_scale
from resdiag.plots.sheet import legend, open_sheet, subject
from resdiag.plots.view import Record, Trace, View, moment_words

_RATIO = r"$\|\Delta\theta\|/\|\theta\|$"
_USUAL = 1e-3


def draw_updates(view: View) -> Figure:
    """Lines by block, and a map of block and step for one run; lines at two moments for several."""
    single = view.single
    return _draw_single(view, single) if single else _draw_several(view)


def _draw_single(view: View, record: Record) -> Figure:
    traces = view.history()
    figure, body = open_sheet(
        view, f"Update to weight ratio by block and step: {subject(view)}", height=4.7,
        shown=view.steps_shown(traces),
    )  # fmt: skip
    lines, heat = body.subplots(2, 1, height_ratios=[1, 1.1])
    _draw_lines(lines, view, traces, "by block")
    grid, broken = record.grid("update_ratio"), record.broken("update_ratio")
    draw_heat(heat, record, grid, broken, _RATIO)
    head_panel(heat, "every recorded step", "block")
    legend(body, extra=heat_keys(broken, np.isnan(grid) & ~broken))
    return figure


def _draw_several(view: View) -> Figure:
    layers = [view.traces(moment) for moment in view.moments()]
    figure, body = open_sheet(
        view, f"Update to weight ratio by block: {subject(view)}", height=0.5 + 2.2 * len(layers),
        shown="; ".join(map(moment_words, layers)),
    )  # fmt: skip
    panels = body.subplots(len(layers), 1, squeeze=False)[:, 0]
    for axes, layer in zip(panels, layers, strict=True):
        _draw_lines(axes, view, layer, moment_words(layer))
    share_scale(panels)
    legend(body)
    return figure


def _draw_lines(axes: Axes, view: View, traces: list[Trace], title: str) -> None:
    trace_blocks(axes, view, traces, "update_ratio", log=True)
    head_panel(axes, f"{title} (dotted: 1e-3, usual)", _RATIO, stages=True)
    finish_blocks(axes, view, log=True)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, _USUAL / 3), max(high, _USUAL * 3))
    guide(axes, _USUAL, "")
