"""Gradient norms by block: where the gradient explodes or vanishes, and since when."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resdiag.plots import canvas
from resdiag.plots.findings import (
    end_ratios,
    extremes,
    for_words,
    lost_words,
    middle,
    when_words,
)
from resdiag.plots.view import Record, Trace, View

_TENSOR = r"√B $\|\partial L/\partial H\|$"  # mathtext draws the bar of a root apart from it
_PARAMETER = r"$\|\partial L/\partial\theta\|$"


def draw(view: View) -> Figure:
    """Gradient at the outputs and of the parameters by block; a map over steps for one run."""
    single = view.single
    return _draw_single(view, single) if single else _draw_several(view)


def _draw_single(view: View, record: Record) -> Figure:
    traces = view.history()
    figure, body = canvas.open_sheet(
        view,
        _statement(traces[:1], many=False),
        height=5.0,
        shown=view.steps_shown(traces),
        symbols="L H B θ",
    )
    panels = body.subplot_mosaic([["tensor", "parameter"], ["map", "map"]], height_ratios=[1, 1.05])
    _draw_pair(panels["tensor"], panels["parameter"], view, traces)
    grid, broken = record.grid("grad_output"), record.broken("grad_output")
    keys = canvas.draw_heat(panels["map"], record, grid, broken, _TENSOR)
    canvas.head_panel(panels["map"], "gradient at the block's output, every recorded step")
    canvas.legend(body, extra=keys)
    return figure


def _draw_several(view: View) -> Figure:
    moments = view.moments()
    title = _statement(view.traces(moments[0]), many=len(view.series) > 1)
    figure, body = canvas.open_sheet(
        view, title, height=0.5 + 2.25 * len(moments),
        shown="; ".join(canvas.moment_words(view.traces(moment)) for moment in moments),
        symbols="L H B θ",
    )  # fmt: skip
    panels = body.subplots(len(moments), 2, squeeze=False)
    for row, moment in zip(panels, moments, strict=True):
        traces = view.traces(moment)
        _draw_pair(row[0], row[1], view, traces, f", {canvas.moment_words(traces)}")
    for column in panels.T:
        canvas.share_scale(column, most=4)
    canvas.share_blocks([list(column) for column in panels.T])
    canvas.legend(body)
    return figure


def _draw_pair(left: Axes, right: Axes, view: View, traces: list[Trace], when: str = "") -> None:
    """Gradient at the outputs, with the stem's as block -1, and gradient of the parameters."""
    canvas.trace_blocks(left, view, traces, "grad_output", log=True, stem="grad_input")
    canvas.trace_theory(left, view, traces, "grad_output")
    canvas.trace_blocks(right, view, traces, "grad_param", log=True)
    canvas.head_panel(left, f"at the outputs{when}", _TENSOR, stages=True)
    canvas.head_panel(
        right, f"of the parameters{when}{canvas.clipped_words(view)}", _PARAMETER, stages=True
    )
    canvas.finish_blocks(left, view, log=True, stem=True)
    canvas.finish_blocks(right, view, log=True)


def _statement(traces: list[Trace], *, many: bool) -> str:
    """What happens to the gradient on its way back, in words."""
    ratios = [(t.label, [1 / r for r in end_ratios(t, "grad_output")]) for t in traces]
    found = extremes([(label, middle(of_runs)) for label, of_runs in ratios])
    when = when_words(traces)
    if not found:
        return f"The gradient at the outputs {lost_words(traces, 'grad_output')}{when}"
    words = [f"{_change(value)}{for_words(label) if many else ''}" for label, value in found]
    if many:
        return f"On the way back to block 0, gradients {' and '.join(words)}{when}"
    return f"Gradients {words[0]} on the way back to block 0{when}"


def _change(ratio: float) -> str:
    if 0.95 <= ratio <= 1.05:
        return f"keep their size (×{ratio:.2f})"
    if 0.5 < ratio < 2:
        return f"{'grow' if ratio > 1 else 'shrink'} by {abs(100 * (ratio - 1)):.0f} %"
    if ratio > 1:
        return f"grow {canvas.times_words(ratio)}"
    return f"shrink {canvas.times_words(1 / ratio)}"
