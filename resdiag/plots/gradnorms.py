"""Gradient norms by block: where the gradient explodes or vanishes, and since when."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resdiag.plots.lazy import canvas, np
from resdiag.plots.plotkind import PlotKind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from resdiag.plots.view import Record, Trace, View

_TENSOR = r"$\sqrt{B}\,\|\partial L/\partial H\|$"
_PARAMETER = r"$\|\partial L/\partial\theta\|$"


def draw(view: View) -> Figure:
    """Gradient at the outputs and of the parameters by block; a map over steps for one run."""
    single = view.single
    return _draw_single(view, single) if single else _draw_several(view)


def _draw_single(view: View, record: Record) -> Figure:
    traces = view.history()
    figure, body = canvas.open_sheet(
        view,
        f"{_statement(record)}: {canvas.subject(view)}",
        height=5.0,
        shown=view.steps_shown(traces),
    )
    panels = body.subplot_mosaic([["tensor", "parameter"], ["map", "map"]], height_ratios=[1, 1.05])
    theory = traces[:1] if traces[0].places[0] == 0 else []
    _draw_pair(panels["tensor"], panels["parameter"], view, traces, theory)
    grid, broken = record.grid("grad_output"), record.broken("grad_output")
    canvas.draw_heat(panels["map"], record, grid, broken, _TENSOR)
    canvas.head_panel(panels["map"], "gradient at the block's output, every recorded step", "block")
    canvas.legend(body, extra=canvas.heat_keys(broken, np.isnan(grid) & ~broken))
    return figure


def _draw_several(view: View) -> Figure:
    moments = view.moments()
    figure, body = canvas.open_sheet(
        view, f"Gradient norms by block: {canvas.subject(view)}", height=0.5 + 2.25 * len(moments),
        shown="; ".join(canvas.moment_words(view.traces(moment)) for moment in moments),
    )  # fmt: skip
    panels = body.subplots(len(moments), 2, squeeze=False)
    for row, moment in zip(panels, moments, strict=True):
        traces = view.traces(moment)
        initial = [t for t in traces if not any(t.places)]
        _draw_pair(row[0], row[1], view, traces, initial, canvas.moment_words(traces))
    for column in panels.T:
        canvas.share_scale(column, most=4)
    canvas.legend(body)
    return figure


def _draw_pair(
    left: Axes, right: Axes, view: View, traces: list[Trace], initial: list[Trace], when: str = ""
) -> None:
    """Gradient at the outputs, with the stem's as block -1, and gradient of the parameters."""
    suffix = f", {when}" if when else ""
    canvas.trace_blocks(left, view, traces, "grad_output", log=True, stem="grad_input")
    canvas.trace_theory(left, view, initial, "grad_output")
    canvas.trace_blocks(right, view, traces, "grad_param", log=True)
    canvas.head_panel(left, f"at the outputs{suffix}", _TENSOR, stages=True)
    canvas.head_panel(right, f"of the parameters{suffix}", _PARAMETER, stages=True)
    canvas.finish_blocks(left, view, log=True, stem=True)
    canvas.finish_blocks(right, view, log=True)


def _statement(record: Record) -> str:
    """What happens to the gradient on its way back, in words."""
    norms = record.grid("grad_output")[:, 0]
    first = record.steps[0]
    if not np.isfinite(norms[[0, -1]]).all() or norms[-1] <= 0 or norms[0] <= 0:
        return f"The gradient at the outputs is not finite or zero at step {first}"
    ratio = norms[0] / norms[-1]
    verb = (
        f"grows ×{canvas.factor_words(ratio)}"
        if ratio >= 1
        else f"shrinks ×{canvas.factor_words(1 / ratio)}"
    )
    return f"The gradient {verb} from the last block back to block 0 at step {first}"


KIND = PlotKind(
    name="gradnorms",
    title="Gradient norms by block",
    question="Does the gradient explode or vanish in the backward pass, and from which step?",
    reading=(
        "on the log axis, a straight line that rises towards block 0 is an exploding gradient, one "
        "that falls a vanishing gradient. For the parameter gradient, the level matters as much as "
        "the slope: without normalisation it is flat over blocks, and grows with the depth."
    ),
    needs=("grad_output", "grad_input", "grad_param"),
    draw=draw,
    theory_from=(
        "the output of the stem at step 0, and the level of the gradient at the last block"
    ),
)
