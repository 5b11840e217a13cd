"""Signal propagation plot: moments of output and branch by block (Brock et al. 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resdiag.plots.lazy import canvas
from resdiag.plots.plotkind import PlotKind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from resdiag.plots.view import View

_PANELS = (
    ("output_second_moment", "output: second moment", r"$E[H^2]$"),
    ("branch_channel_var", "branch: channel variance", r"mean$_c\,\sigma_c^2$"),
    ("output_channel_mean_sq", "output: squared channel mean", r"mean$_c\,\mu_c^2$"),
    ("output_channel_var", "output: channel variance", r"mean$_c\,\sigma_c^2$"),
)


def draw(view: View) -> Figure:
    """Second moment, squared mean and variance of the output, variance of the branch."""
    traces = view.history(3) if view.single else view.traces("first")
    figure, body = canvas.open_sheet(
        view, f"Signal propagation by block: {canvas.subject(view)}", height=4.6,
        shown=view.steps_shown(traces) if view.single else canvas.moment_words(traces),
    )  # fmt: skip
    panels = body.subplots(2, 2)
    for (metric, title, formula), axes in zip(_PANELS, panels.flat, strict=True):
        canvas.trace_blocks(axes, view, traces, metric, log=True)
        canvas.trace_theory(axes, view, [t for t in traces if not any(t.places)], metric)
        canvas.head_panel(axes, title, formula, stages=True)
        canvas.finish_blocks(axes, view, log=True)
    canvas.share_scale(panels[1])  # mean against variance: which one dominates
    canvas.legend(body)
    return figure


KIND = PlotKind(
    name="signal",
    title="Signal propagation by block",
    question="Does the signal keep its scale in the forward pass?",
    reading=(
        "on the log axis, a straight rising line is exponential growth. With BatchNorm on the "
        "branch, its variance starts at 1, and that of the output grows by a constant per block, "
        "reset at each stage. Squared mean above variance: the means dominate the signal."
    ),
    needs=(
        "output_second_moment",
        "output_channel_mean_sq",
        "output_channel_var",
        "branch_channel_var",
    ),
    draw=draw,
    theory_from="the output of the stem at step 0",
)
