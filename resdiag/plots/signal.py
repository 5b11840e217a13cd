"""Signal propagation plot: moments of output and branch by block (Brock et al. 2021)."""

from matplotlib.figure import Figure

from resdiag.plots import canvas
from resdiag.plots.findings import (
    end_ratios,
    extremes,
    for_words,
    growth_of,
    lost_words,
    middle,
    when_words,
)
from resdiag.plots.view import Trace, View

_PANELS = (
    canvas.Panel("output_second_moment", "output: mean square", r"$E[H^2]$"),
    canvas.Panel("branch_channel_var", "branch: channel variance", r"mean$_c\,\sigma_c^2$"),
    canvas.Panel("output_channel_mean_sq", "output: squared channel mean", r"mean$_c\,\mu_c^2$"),
    canvas.Panel("output_channel_var", "output: channel variance", r"mean$_c\,\sigma_c^2$"),
)


def draw(view: View) -> Figure:
    """Mean square, squared mean and variance of the output, variance of the branch."""
    traces = view.history(3) if view.single else view.traces("first")
    panels, sentences = canvas.choose_panels(view, traces, _PANELS)
    rows = -(-len(panels) // 2)
    figure, body = canvas.open_sheet(
        view, _statement(view, traces), height=0.4 + 2.1 * rows, notes=sentences,
        shown=view.steps_shown(traces), symbols="H E c",
    )  # fmt: skip
    places = body.subplots(rows, min(2, len(panels)), squeeze=False)
    drawn = dict(zip((panel.metric for panel in panels), places.flat, strict=False))
    for panel in panels:
        axes = drawn[panel.metric]
        canvas.trace_blocks(axes, view, traces, panel.metric, log=True)
        canvas.trace_theory(axes, view, traces, panel.metric)
        canvas.head_panel(axes, panel.title, panel.formula, stages=True)
        canvas.finish_blocks(axes, view, log=True)
    for axes in places.flat[len(panels) :]:
        axes.remove()
    # mean against variance: which one dominates
    pair = ("output_channel_mean_sq", "output_channel_var")
    canvas.share_scale([drawn[name] for name in pair if name in drawn])
    canvas.share_blocks([[a for a in column if a in drawn.values()] for column in places.T])
    canvas.legend(body)
    return figure


def _statement(view: View, traces: list[Trace]) -> str:
    """By what factor the signal grows from block to block."""
    told = traces[:1] if view.single else traces
    metric, when = "output_second_moment", when_words(traces[:1])
    found, where = extremes([(t.label, growth_of(t)) for t in told]), "in each block"
    if not found:  # stages of one block each: no block has another one in front of it
        found = extremes([(t.label, middle(end_ratios(t, metric))) for t in told])
        where = "from the first block to the last"
    if not found:
        return f"The signal {lost_words(told, metric)}{when}"
    if len(view.series) == 1:
        value = found[0][1]
        return f"The signal {canvas.change_words(value)} {where}, in mean square{when}"
    words = [f"{canvas.change_words(value)}{for_words(label)}" for label, value in found]
    where = f"{where[0].upper()}{where[1:]}"
    return f"{where}, the mean square of the signal {' and '.join(words)}{when}"
