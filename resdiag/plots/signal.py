"""Signal propagation plot: moments of output and branch by block (Brock et al. 2021)."""

from matplotlib.figure import Figure

from resdiag.plots.byblock import finish_blocks, trace_blocks, trace_theory
from resdiag.plots.lines import head_panel
from resdiag.plots.scale import share_scale
from resdiag.plots.sheet import legend, open_sheet, subject
from resdiag.plots.view import View, moment_words

_PANELS = (
    ("output_second_moment", "output: second moment", r"$E[H^2]$"),
    ("branch_channel_var", "branch: channel variance", r"mean$_c\,\sigma_c^2$"),
    ("output_channel_mean_sq", "output: squared channel mean", r"mean$_c\,\mu_c^2$"),
    ("output_channel_var", "output: channel variance", r"mean$_c\,\sigma_c^2$"),
)


def draw_signal(view: View) -> Figure:
    """Second moment, squared mean and variance of the output, variance of the branch."""
    traces = view.history(3) if view.single else view.traces("first")
    figure, body = open_sheet(
        view, f"Signal propagation by block: {subject(view)}", height=4.6,
        shown=view.steps_shown(traces) if view.single else moment_words(traces),
    )  # fmt: skip
    panels = body.subplots(2, 2)
    for (metric, title, formula), axes in zip(_PANELS, panels.flat, strict=True):
        trace_blocks(axes, view, traces, metric, log=True)
        trace_theory(axes, view, [t for t in traces if not any(t.places)], metric)
        head_panel(axes, title, formula, stages=True)
        finish_blocks(axes, view, log=True)
    share_scale(panels[1])  # mean against variance: which one dominates
    legend(body)
    return figure
