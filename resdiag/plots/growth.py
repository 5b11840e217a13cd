"""Growth per block: the factor by which each block multiplies the signal and the gradient."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resdiag.plots import canvas
from resdiag.plots.findings import extremes, geometric_mean, when_words
from resdiag.plots.view import Floats, Record, Trace, View

_PANELS = (
    canvas.Panel("forward_growth", "forward", r"$E[H^2]\,/\,E[x^2]$"),
    canvas.Panel(
        "grad_growth", "backward", r"$\|\partial L/\partial x\|^2/\|\partial L/\partial H\|^2$"
    ),
)
_FEW_STAGES = 3  # of more, the numbers only fit
_WHAT = {"forward_growth": "signal", "grad_growth": "gradient"}


def draw(view: View) -> Figure:
    """Factor per block, and its geometric mean per stage, forward and backward."""
    traces = view.history(3) if view.single else view.traces("first")
    chosen, sentences = canvas.choose_panels(view, traces, _PANELS)
    figure, body = canvas.open_sheet(
        view, _statement(view, traces, chosen), height=0.3 + 2.3 * len(chosen),
        shown=view.steps_shown(traces), symbols="x H L E", notes=sentences,
    )  # fmt: skip
    ratios = [2.6, 1] if _has_means(traces, chosen) else [1]
    rows = body.subplots(len(chosen), len(ratios), width_ratios=ratios, squeeze=False)
    for panel, (left, *right) in zip(chosen, rows, strict=True):
        title = f"{panel.title} growth per block (dotted: 1, scale kept)"
        _draw_factors(left, view, traces, panel.metric, title, panel.formula)
        for axes in right:
            _draw_stage_means(axes, view, traces, panel.metric)
        canvas.share_scale((left, *right))
    canvas.share_blocks([list(rows[:, 0])])
    canvas.legend(body)
    return figure


def _has_means(traces: Sequence[Trace], panels: Sequence[canvas.Panel]) -> bool:
    """Whether any stage has several factors: a mean of one is the line beside it again."""
    return any(
        part.size > 1
        for panel in panels
        for trace in traces
        for part in _stage_factors(trace.records[0], trace.values(panel.metric))
    )


def _draw_factors(
    axes: Axes, view: View, traces: list[Trace], metric: str, title: str, formula: str
) -> None:
    canvas.trace_blocks(axes, view, traces, metric, log=True)
    canvas.trace_theory(axes, view, traces, metric)
    canvas.head_panel(axes, title, formula, stages=True)
    canvas.finish_blocks(axes, view, log=True)
    canvas.guide(axes, 1.0, "")


def _draw_stage_means(axes: Axes, view: View, traces: list[Trace], metric: str) -> None:
    """Geometric mean of the stage's factors per line, with their range over blocks and seeds."""
    factors = [_stage_factors(trace.records[0], trace.values(metric)) for trace in traces]
    count = max(map(len, factors))
    few = count <= _FEW_STAGES
    title = "geometric mean, range" if few else "mean and range by stage"
    canvas.head_panel(axes, title, stages=any(record.boundaries for record in view.records))
    axes.set_yscale("log")
    axes.grid(False, axis="x")
    finite = any(trace.is_finite for trace in traces)
    apart = min(0.5, 0.16 * (len(traces) - 1))
    for rank, (trace, stages) in enumerate(zip(traces, factors, strict=True)):
        if trace.is_finite or not finite:
            shift = apart * (rank / (len(traces) - 1) - 0.5) if rank or apart else 0.0
            _draw_means(axes, trace, stages, shift)
    axes.set_xticks(range(1, count + 1), [f"stage {n}" if few else str(n) for n in range(count)])
    axes.set(xlim=(0.45, count + 0.55), xlabel="", ylabel="")
    canvas.finish_scale(axes, log=True)
    canvas.guide(axes, 1.0, "")
    _write_means(axes, traces, [np.array([geometric_mean(p) for p in f]) for f in factors])


def _draw_means(axes: Axes, trace: Trace, stages: Sequence[Floats], shift: float) -> None:
    """One line's mark per stage at the geometric mean, and a bar from the least to the most."""
    drawn = [(at + shift, part) for at, part in enumerate(stages, start=1) if part.size]
    means = [geometric_mean(part) for _, part in drawn]
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
    return f"{value:.2f}" if 0.01 <= value < 1000 else canvas.size_words(value)


def _statement(view: View, traces: list[Trace], panels: list[canvas.Panel]) -> str:
    """By what factors a block multiplies signal and gradient, over all blocks as in verdicts."""
    parts = []
    for panel in panels:
        factors = [
            (trace.label, geometric_mean(trace.values(panel.metric)))
            for trace in (traces[:1] if view.single else traces)
        ]
        found = extremes(factors)
        words = [f"×{value:.3g}" for _, value in found]
        if words:
            parts.append(f"the {_WHAT[panel.metric]} {' to '.join(words[::-1])}")
    if not parts:
        return f"The growth per block is not finite{when_words(traces[:1])}"
    when = when_words(traces[:1]).removeprefix(", at")
    return f"Each block scales {' and '.join(parts)} (mean squares{when and ','}{when})"


def _stage_factors(record: Record, values: Floats) -> list[Floats]:
    """Per stage the positive finite values of its blocks and runs, without transition blocks."""
    stages = np.array([block.get("stage", 0) for block in record.run.blocks])
    kept = np.array([not block.get("transition", False) for block in record.run.blocks])
    parts = [values[:, (stages == stage) & kept] for stage in np.unique(stages)]
    return [part[np.isfinite(part) & (part > 0)] for part in parts]
