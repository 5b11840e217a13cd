"""Growth per block: the factor by which each block multiplies the signal and the gradient."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resdiag.plots.byblock import finish_blocks, trace_blocks, trace_theory
from resdiag.plots.lines import guide, head_panel
from resdiag.plots.scale import finish_scale, share_scale
from resdiag.plots.sheet import legend, open_sheet, subject
from resdiag.plots.style import ink
from resdiag.plots.view import Floats, Record, Trace, View, moment_words

_PANELS = (
    ("forward_growth", "forward", r"$E[H^2]\,/\,E[x^2]$"),
    ("grad_growth", "backward", r"$\|\partial L/\partial x\|^2/\|\partial L/\partial H\|^2$"),
)


def draw_growth(view: View) -> Figure:
    """Factor per block, and its geometric mean per stage, forward and backward."""
    traces = view.history(3) if view.single else view.traces("first")
    figure, body = open_sheet(
        view, f"Growth per block, forward and backward: {subject(view)}", height=4.9,
        shown=view.steps_shown(traces) if view.single else moment_words(traces),
    )  # fmt: skip
    panels = body.subplots(2, 2, width_ratios=[2.6, 1])
    for (metric, way, formula), (left, right) in zip(_PANELS, panels, strict=True):
        _draw_factors(
            left, view, traces, metric, f"{way} growth per block (dotted: 1, scale kept)", formula
        )
        _draw_stage_means(right, traces, metric)
        share_scale((left, right))
    legend(body)
    return figure


def _draw_factors(
    axes: Axes, view: View, traces: list[Trace], metric: str, title: str, formula: str
) -> None:
    trace_blocks(axes, view, traces, metric, log=True)
    trace_theory(axes, view, [t for t in traces if not any(t.places)], metric)
    head_panel(axes, title, formula, stages=True)
    finish_blocks(axes, view, log=True)
    guide(axes, 1.0, "")


def _draw_stage_means(axes: Axes, traces: list[Trace], metric: str) -> None:
    """Geometric mean over the stage's blocks, one mark per line, with its number if it fits."""
    head_panel(axes, "geometric mean", stages=True)
    means = [_stage_means(trace.records[0], trace.values(metric)) for trace in traces]
    for rank, (trace, values) in enumerate(zip(traces, means, strict=True)):
        shift = (rank - (len(traces) - 1) / 2) * min(0.18, 0.7 / len(traces))
        x = np.arange(1, len(values) + 1) + shift
        axes.plot(
            x, values, ls="none", marker=trace.look.marker, color=trace.look.colour, ms=5,
            mew=0
        )  # fmt: skip
    count = max(len(values) for values in means)
    axes.set_xticks(range(1, count + 1), [f"stage {n}" for n in range(count)])
    axes.set_xlim(0.45, count + 0.55)
    axes.grid(False, axis="x")
    finish_scale(axes, log=True)
    guide(axes, 1.0, "")
    _write_means(axes, traces, means)


def _write_means(axes: Axes, traces: list[Trace], means: list[Floats]) -> None:
    """The numbers in rows under the panel's ticks, in the colours of their lines."""
    rows = [pair for pair in zip(traces, means, strict=True) if np.isfinite(pair[1]).any()]
    for rank, (trace, values) in enumerate(rows[:6]):
        for stage, value in enumerate(values, start=1):
            axes.annotate(
                _short(value), (stage, 0),
                xycoords=axes.get_xaxis_transform(), xytext=(0, -19 - 10 * rank),
                textcoords="offset points", ha="center", va="top", size=7,
                color=ink(trace.look.colour), weight="bold",
            )  # fmt: skip


def _short(value: float) -> str:
    if not np.isfinite(value):
        return "-"
    return f"{value:.2f}" if 0.01 <= value < 1000 else f"{value:.0e}"


def _stage_means(record: Record, values: Floats) -> Floats:
    """Geometric mean per stage over blocks and runs, without the transition blocks."""
    stages = np.array([block.get("stage", 0) for block in record.run.blocks])
    kept = np.array([not block.get("transition", False) for block in record.run.blocks])
    out = []
    for stage in np.unique(stages):
        part = values[:, (stages == stage) & kept]
        part = part[np.isfinite(part) & (part > 0)]
        out.append(float(np.exp(np.log(part).mean())) if part.size else np.nan)
    return np.array(out)
