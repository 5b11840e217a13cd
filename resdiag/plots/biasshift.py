"""Bias shift: are the activations centred, by block, and does the head's mean drift over steps."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resdiag.plots import canvas
from resdiag.plots.view import Trace, View


def draw(view: View) -> Figure:
    """Signed mean with its 10-90 % band and B2 of output and branch; mean and B2 at the head."""
    traces = _ends(view.history()) if view.single else view.traces(view.moments()[-1])
    figure, body = canvas.open_sheet(
        view, f"Bias shift by block and step: {canvas.subject(view)}", height=5.7,
        shown=view.steps_shown(traces),
        notes=["Bands (single run): 10 to 90 % quantiles of the channel means, last finite step."],
    )  # fmt: skip
    panels = body.subplots(3, 2)
    for column, site in enumerate(("output", "branch")):
        _draw_mean(panels[0, column], view, traces, site)
        _draw_bias(panels[1, column], view, traces, site)
    _draw_head(panels[2, 0], view, "head_mean", "mean of the pooled features")
    _draw_head(panels[2, 1], view, "head_bias", "B2 of the pooled features")
    canvas.legend(body)
    return figure


def _ends(traces: Sequence[Trace]) -> list[Trace]:
    """The first line and the last that is finite, and the very last: bands stay apart."""
    return [traces[0], *traces[-2:]] if len(traces) > 3 else list(traces)


def _draw_mean(axes: Axes, view: View, traces: Sequence[Trace], site: str) -> None:
    """Signed mean; the band is that of the last finite line, or of every line of a comparison."""
    canvas.trace_blocks(axes, view, traces, f"{site}_mean")
    finite = [t for t in traces if np.isfinite(t.values(f"{site}_mean")).any()]
    for trace in finite[-1:] if view.single else finite[:4]:
        low, high = (np.median(trace.values(f"{site}_mean_q{q}"), axis=0) for q in (10, 90))
        x = trace.records[0].positions(view.normalised)
        known = np.isfinite(low) & np.isfinite(high)
        axes.fill_between(x, low, high, where=known, color=trace.look.colour, alpha=0.16, lw=0)
    canvas.head_panel(axes, f"{site}: mean and band of channels", r"mean$_c\,\mu_c$", stages=True)
    canvas.finish_blocks(axes, view)
    _compress(axes)
    canvas.guide(axes, 0.0, "")


def _draw_bias(axes: Axes, view: View, traces: Sequence[Trace], site: str) -> None:
    canvas.trace_blocks(axes, view, traces, f"{site}_bias")
    canvas.finish_blocks(axes, view, floor=0.0)
    y, words = canvas.plotted(axes), ""
    if y.size and y.max() > 0.7:
        canvas.guide(axes, 1.0, "")
        words = " (dotted: 1)"
    formula = r"rms$_c\,\mu_c$ / rms$_c\,\sigma_c$"
    canvas.head_panel(axes, f"{site}: bias shift B2{words}", formula, stages=True)


def _draw_head(axes: Axes, view: View, column: str, title: str) -> None:
    # a single run's line needs no name: the title has it
    canvas.trace_steps(axes, view, column, label="_{}" if view.single else "")
    canvas.head_panel(axes, title, "B1" if column == "head_mean" else "B2")
    canvas.finish_steps(axes, view)
    _compress(axes)


def _compress(axes: Axes) -> None:
    """A symmetric log axis where a linear one would hide most values."""
    y = canvas.plotted(axes)
    if not canvas.huge(y):
        return
    size = np.log10(np.abs(y[y != 0]))
    low = int(np.floor(max(size.min(), size.max() - 12)))
    high = int(np.ceil(size.max()))
    axes.set_yscale("symlog", linthresh=10.0**low)
    every = max(1, (high - low) // 3)
    powers = [10.0**power for power in range(low + every, high + 1, every)]
    signs = [sign for sign in (-1, 1) if (sign * y > 0).any()]
    axes.set_yticks(sorted([0.0, *(sign * power for sign in signs for power in powers)]))
    axes.minorticks_off()
    # room for marks on the top edge
    top = 10.0 ** (high + 0.35 * (high - low))
    axes.set_ylim(-(10.0 ** (high + 0.5)) if -1 in signs else -(10.0**low), top)
