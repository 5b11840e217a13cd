"""Signal propagation plot: moments of output and branch by block (Brock et al. 2021)."""

from matplotlib.figure import Figure

from resdiag.plots import canvas
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
        shown=view.steps_shown(traces),
    )  # fmt: skip
    panels = body.subplots(2, 2)
    for (metric, title, formula), axes in zip(_PANELS, panels.flat, strict=True):
        canvas.trace_blocks(axes, view, traces, metric, log=True)
        canvas.trace_theory(axes, view, traces, metric)
        canvas.head_panel(axes, title, formula, stages=True)
        canvas.finish_blocks(axes, view, log=True)
    canvas.share_scale(panels[1])  # mean against variance: which one dominates
    canvas.legend(body)
    return figure
