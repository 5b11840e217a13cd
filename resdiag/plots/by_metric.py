"""Any metric per block, built in or custom: by block, and block against step for one run.

The update ratio is the one of them that is a kind of plot of its own.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resdiag.plots import canvas
from resdiag.plots.findings import for_words, middle, when_words
from resdiag.plots.view import Record, Trace, View

_DECADES = 1.5
_FORMULAS = {"update_ratio": r"$\|\Delta\theta\|/\|\theta\|$"}
"""What an axis says; the metric's id if it is not here."""
_SYMBOLS = {"update_ratio": "θ Δθ"}
_USUAL = {"update_ratio": (1e-3, "1e-3")}
"""A value that is usual, and how it is written."""


def draw(view: View) -> Figure:
    """Lines by block, and a map of block and step for one run; lines at two moments for several."""
    metric = view.kind.needs[0]
    grids = [record.grid(metric) for record in view.records]
    lost = any(record.broken(metric).any() for record in view.records)
    known = np.concatenate([grid[np.isfinite(grid)] for grid in grids])
    if not lost and not known.any():
        canvas.refuse(view, f"{metric} is exactly 0 in every block" if known.size else "no value")
    single = view.single
    return _draw_single(view, single) if single else _draw_several(view)


def _draw_single(view: View, record: Record) -> Figure:
    metric, log = view.kind.needs[0], _spans_decades(view)
    traces = view.history()
    figure, body = canvas.open_sheet(
        view,
        _statement(view, traces),
        height=4.7,
        shown=view.steps_shown(traces),
        symbols=_SYMBOLS.get(metric, ""),
    )
    lines, heat = body.subplots(2, 1, height_ratios=[1, 1.1])
    _draw_lines(lines, view, traces, "by block", log=log)
    grid, broken = record.grid(metric), record.broken(metric)
    keys = canvas.draw_heat(heat, record, grid, broken, _FORMULAS.get(metric, metric), log=log)
    canvas.head_panel(heat, "every recorded step")
    canvas.legend(body, extra=keys)
    return figure


def _draw_several(view: View) -> Figure:
    log = _spans_decades(view)
    layers = [view.traces(moment) for moment in view.moments()]
    figure, body = canvas.open_sheet(
        view, _statement(view, layers[-1]), height=0.5 + 2.2 * len(layers),
        shown="; ".join(map(canvas.moment_words, layers)),
        symbols=_SYMBOLS.get(view.kind.needs[0], ""),
    )  # fmt: skip
    panels = body.subplots(len(layers), 1, squeeze=False)[:, 0]
    for axes, layer in zip(panels, layers, strict=True):
        _draw_lines(axes, view, layer, canvas.moment_words(layer), log=log)
    canvas.share_scale(panels)
    canvas.share_blocks([list(panels)])
    canvas.legend(body)
    return figure


def _draw_lines(axes: Axes, view: View, traces: list[Trace], title: str, *, log: bool) -> None:
    metric = view.kind.needs[0]
    usual = _USUAL.get(metric)
    note = f" (dotted: {usual[1]}, usual)" if usual else ""
    canvas.trace_blocks(axes, view, traces, metric, log=log)
    canvas.head_panel(axes, f"{title}{note}", _FORMULAS.get(metric, metric), stages=True)
    around = (usual[0] / 3, usual[0] * 3) if usual else ()
    canvas.finish_blocks(axes, view, log=log, also=around)
    if usual:
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


def _statement(view: View, traces: Sequence[Trace]) -> str:
    """The largest and the smallest value of the last line that is finite."""
    metric = view.kind.needs[0]
    whole = [trace for trace in traces if trace.is_finite] or list(traces)
    told = whole[-1:] if view.single else whole
    name = view.kind.title.removesuffix(" by block and step")
    found = []
    for trace in told:
        values = np.array([middle(list(column)) for column in trace.values(metric).T])
        if np.isfinite(values).any():
            ends = int(np.nanargmin(values)), int(np.nanargmax(values))
            found += [(float(values[block]), block, trace.label) for block in ends]
    if not found:
        return f"{name}: not finite in any block"
    (low, first, below), (high, last, above) = min(found), max(found)
    size = canvas.size_words
    if metric == "update_ratio":
        scale, unit = (1.0, "times their weights") if high > 1 else (100.0, "% of their weights")
        sizes = dict.fromkeys(size(scale * value) for value in (low, high))
        share = f"{' to '.join(sizes)} {unit}"
        return f"A step moves the blocks by {share}{when_words(told)}"
    if low == high:
        return f"{name}: {size(low)} in every block{when_words(told)}"
    who = ("", "") if len(view.series) == 1 else (for_words(below), for_words(above))
    record = told[0].records[0]
    blocks = (record.block_words(min(place, record.n_blocks - 1)) for place in (first, last))
    places = [f"{size(v)} in {b}{w}" for v, b, w in zip((low, high), blocks, who, strict=True)]
    return f"{name}: from {places[0]} to {places[1]}{when_words(told)}"
