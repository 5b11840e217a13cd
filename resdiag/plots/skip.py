"""The skip path: what the activation after the addition does to it (P1 to P4)."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from resdiag.plots import canvas
from resdiag.plots.view import Trace, View

_PANELS = (
    ("perturbation", "P1 perturbation of the sum", r"$\|H-u\|/\|u\|$", 0.0),
    ("identity_defect", "P2 identity defect", r"$\|f(h)-h\|/\|h\|$", 0.0),
    ("identity_drift", "P4 identity drift", r"$\|f^{(n)}(h_1)-h_1\|/\|h_1\|$", 0.0),
    ("skip_gain_stage", "P3 skip gain, per stage", r"mean $\prod f'(u_k)$", 1.0),
    ("skip_gain", "P3 skip gain, whole network", r"mean $\prod f'(u_k)$", 1.0),
    ("branch_ratio", "branch to shortcut", r"$\|F\|/\|h\|$", None),
)
_COLLAPSED = 0.05


def draw(view: View) -> Figure:
    """P1, P2, P4, P3 per stage and through, branch ratio by block; skip gain over steps."""
    layers, shown = _layers(view)
    figure, body = canvas.open_sheet(
        view, f"Skip path by block: {canvas.subject(view)}", height=5.6, shown=shown
    )
    grid = body.add_gridspec(3, 3, height_ratios=[1, 1, 0.8])
    for place, panel in enumerate(_PANELS):
        _draw_panel(body.add_subplot(grid[place // 3, place % 3]), view, layers, panel)
    _draw_steps(body.add_subplot(grid[2, :]), view)
    canvas.legend(body, extra=_weights(layers) if len(layers) > 1 else ())
    return figure


def _layers(view: View) -> tuple[list[list[Trace]], str]:
    """The lines: all of one run, or those of the first and of the last step; and their steps."""
    if view.single:
        history = view.history(3)
        return [history], view.steps_shown(history)
    layers = [view.traces(moment) for moment in view.moments()]
    return layers, "; ".join(map(canvas.moment_words, layers))


def _draw_panel(
    axes: Axes, view: View, layers: list[list[Trace]], panel: tuple[str, str, str, float | None]
) -> None:
    metric, title, formula, neutral = panel
    log = neutral is None
    for layer in layers:
        light = len(layers) > 1 and layer is layers[0]
        canvas.trace_blocks(axes, view, layer, metric, log=log, light=light)
    canvas.trace_theory(axes, view, layers[0], metric)
    canvas.head_panel(axes, title, formula, stages=True)
    canvas.finish_blocks(axes, view, log=log, floor=None if log else 0.0)
    if neutral is not None:
        _explain_neutral(axes, view, neutral)


def _weights(layers: list[list[Trace]]) -> list[Line2D]:
    """Entries of the legend for thin and thick lines."""
    words = [canvas.moment_words(layer) for layer in layers]
    return [
        canvas.Line2D([], [], color="0.3", lw=0.7, alpha=0.6, label=f"thin: {words[0]}"),
        canvas.Line2D([], [], color="0.3", lw=1.6, label=f"thick: {words[1]}"),
    ]


def _explain_neutral(axes: Axes, view: View, neutral: float) -> None:
    """Say so where every value is exactly the one of a network with nothing after the addition."""
    y = canvas.plotted(axes)
    marked = any(line.get_gid() == canvas.NONFINITE for line in axes.lines)
    if y.size and (y == neutral).all() and not marked:
        axes.set_ylim(-0.05, 1.15)
        bare = all(b.get("after_add") == "none" for r in view.records for b in r.run.blocks)
        why = ":\nnothing follows\nthe addition" if bare else ""
        canvas.note_panel(axes, f"exactly {neutral:g} in every block{why}")
    elif neutral == 1 and y.size:
        axes.set_ylim(-0.04, max(1.06, axes.get_ylim()[1]))


def _draw_steps(axes: Axes, view: View) -> None:
    """Skip gain at the last block over steps, with the threshold of a collapse."""
    y = np.concatenate([record.grid("skip_gain")[-1] for record in view.records])
    positive = y[np.isfinite(y) & (y > 0)]
    log = bool(positive.size and positive.min() < 0.2)
    canvas.trace_block_steps(axes, view, "skip_gain", -1, log=log, silent=view.single is not None)
    canvas.head_panel(axes, "P3 skip gain at the last block over steps", "P3")
    canvas.finish_steps(axes, view, log=log)
    if log:
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, _COLLAPSED / 2), max(high, 1.3))
        canvas.guide(axes, _COLLAPSED, "0.05: collapsed")
    elif positive.size:
        axes.set_ylim(0, 1.15)
        if (positive == 1).all():
            canvas.note_panel(axes, "exactly 1 at every step")
