"""Growth per block: the factor by which each block multiplies the signal and the gradient."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resdiag.plots import canvas
from resdiag.plots.view import Floats, Record, Trace, View

_PANELS = (
    ("forward_growth", "forward", r"$E[H^2]\,/\,E[x^2]$"),
    ("grad_growth", "backward", r"$\|\partial L/\partial x\|^2/\|\partial L/\partial H\|^2$"),
)


def draw(view: View) -> Figure:
    """Factor per block, and its geometric mean per stage, forward and backward."""
    traces = view.history(3) if view.single else view.traces("first")
    figure, body = canvas.open_sheet(
        view, f"Growth per block, forward and backward: {canvas.subject(view)}", height=4.9,
        shown=view.steps_shown(traces),
    )  # fmt: skip
    panels = body.subplots(2, 2, width_ratios=[2.6, 1])
    for (metric, way, formula), (left, right) in zip(_PANELS, panels, strict=True):
        _draw_factors(
            left, view, traces, metric, f"{way} growth per block (dotted: 1, scale kept)", formula
        )
        _draw_stage_means(right, traces, metric)
        canvas.share_scale((left, right))
    canvas.legend(body)
    return figure


def _draw_factors(
    axes: Axes, view: View, traces: list[Trace], metric: str, title: str, formula: str
) -> None:
    canvas.trace_blocks(axes, view, traces, metric, log=True)
    canvas.trace_theory(axes, view, traces, metric)
    canvas.head_panel(axes, title, formula, stages=True)
    canvas.finish_blocks(axes, view, log=True)
    canvas.guide(axes, 1.0, "")


def _draw_stage_means(axes: Axes, traces: list[Trace], metric: str) -> None:
    """Geometric mean of the stage's factors per line, with their range over blocks and seeds."""
    canvas.head_panel(axes, "geometric mean, range", stages=True)
    factors = [_stage_factors(trace.records[0], trace.values(metric)) for trace in traces]
    axes.set_yscale("log")
    axes.grid(False, axis="x")
    apart = min(0.5, 0.16 * (len(traces) - 1))
    for rank, (trace, stages) in enumerate(zip(traces, factors, strict=True)):
        shift = apart * (rank / (len(traces) - 1) - 0.5) if rank or apart else 0.0
        _draw_means(axes, trace, stages, shift)
    count = max(map(len, factors))
    axes.set_xticks(range(1, count + 1), [f"stage {n}" for n in range(count)])
    axes.set(xlim=(0.45, count + 0.55), xlabel="", ylabel="")
    canvas.finish_scale(axes, log=True)
    canvas.guide(axes, 1.0, "")
    _write_means(axes, traces, [np.array([_geometric_mean(p) for p in f]) for f in factors])


def _draw_means(axes: Axes, trace: Trace, stages: Sequence[Floats], shift: float) -> None:
    """One line's mark per stage at the geometric mean, and a bar from the least to the most."""
    drawn = [(at + shift, part) for at, part in enumerate(stages, start=1) if part.size]
    means = [_geometric_mean(part) for _, part in drawn]
    axes.plot(
        [at for at, _ in drawn], means, ls="none", marker=trace.look.marker, ms=4.5, mew=0,
        color=trace.look.colour,
    )  # fmt: skip
    for at, part in drawn:
        axes.plot([at, at], [part.min(), part.max()], lw=0.9, color=trace.look.colour)


def _write_means(axes: Axes, traces: list[Trace], means: list[Floats]) -> None:
    """The numbers in rows under the panel's ticks, in the colours of their lines."""
    rows = [pair for pair in zip(traces, means, strict=True) if np.isfinite(pair[1]).any()]
    for rank, (trace, values) in enumerate(rows[:6]):
        for stage, value in enumerate(values, start=1):
            axes.annotate(
                _short(value), (stage, 0),
                xycoords=axes.get_xaxis_transform(), xytext=(0, -19 - 10 * rank),
                textcoords="offset points", ha="center", va="top", size=7,
                color=canvas.ink(trace.look.colour), weight="bold",
            )  # fmt: skip


def _short(value: float) -> str:
    if not np.isfinite(value):
        return "-"
    return f"{value:.2f}" if 0.01 <= value < 1000 else f"{value:.0e}"


def _geometric_mean(values: Floats) -> float:
    return float(np.exp(np.log(values).mean())) if values.size else float("nan")


def _stage_factors(record: Record, values: Floats) -> list[Floats]:
    """Per stage the positive finite values of its blocks and runs, without transition blocks."""
    stages = np.array([block.get("stage", 0) for block in record.run.blocks])
    kept = np.array([not block.get("transition", False) for block in record.run.blocks])
    parts = [values[:, (stages == stage) & kept] for stage in np.unique(stages)]
    return [part[np.isfinite(part) & (part > 0)] for part in parts]
