"""The skip path: what the activation after the addition does to it (P1 to P4)."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from resdiag.plots import canvas
from resdiag.plots.findings import extremes, for_words, largest, middle
from resdiag.plots.view import Record, Trace, View

_GAIN = r"mean $\prod f'(u_k)$"
_PANELS = (
    canvas.Panel("perturbation", "P1 perturbation of the sum", r"$\|H-u\|/\|u\|$", 0.0),
    canvas.Panel("identity_defect", "P2 identity defect", r"$\|f(h)-h\|/\|h\|$", 0.0),
    canvas.Panel("identity_drift", "P4 identity drift", r"$\|f^{(n)}(h_1)-h_1\|/\|h_1\|$", 0.0),
    canvas.Panel("skip_gain_stage", "P3 skip gain, per stage", _GAIN, 1.0),
    canvas.Panel("skip_gain", "P3 skip gain, whole network", _GAIN, 1.0),
    canvas.Panel("branch_ratio", "branch to shortcut", r"$\|F\|/\|h\|$"),
)
_EXPLAINED = {
    "perturbation": "P1: change of the sum by what follows it",
    "identity_defect": "P2: error of the block as an identity if its branch were 0",
    "identity_drift": "P4: the same after all blocks of the stage so far",
    "skip_gain": "P3: what is left of a gradient that came through shortcuts only",
}
_COLLAPSED = 0.05


def draw(view: View) -> Figure:
    """P1, P2, P4, P3 per stage and through, branch ratio by block; skip gain over steps."""
    layers, shown = _layers(view)
    traces = [trace for layer in layers for trace in layer]
    panels, sentences = canvas.choose_panels(view, traces, _PANELS)
    metrics = [panel.metric for panel in panels]
    over_steps = "skip_gain" in metrics and any(len(r.steps) > 1 for r in view.records)
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, body = canvas.open_sheet(
        view, _statement(view, layers[-1]), height=0.35 + 1.95 * rows + 1.5 * over_steps,
        shown=shown, notes=[*_explained(metrics), *sentences, *_restarts(view, metrics)],
        symbols="h F u f H",
    )  # fmt: skip
    grid = body.add_gridspec(
        rows + over_steps, columns, height_ratios=[1.0] * rows + [0.8] * over_steps
    )
    places = [body.add_subplot(grid[n // columns, n % columns]) for n in range(len(panels))]
    for axes, panel in zip(places, panels, strict=True):
        _draw_panel(axes, view, layers, panel)
    canvas.share_blocks([places[column::columns] for column in range(columns)])
    if over_steps:
        _draw_steps(body.add_subplot(grid[rows, :]), view)
    canvas.legend(body, extra=_weights(layers) if len(layers) > 1 else ())
    return figure


def _explained(metrics: Sequence[str]) -> list[str]:
    """What P1 to P4 are, of those that are drawn."""
    told = [words for name, words in _EXPLAINED.items() if any(m.startswith(name) for m in metrics)]
    return [f"{'; '.join(told)}."] if told else []


def _restarts(view: View, metrics: Sequence[str]) -> list[str]:
    """Where P3 begins anew, of the networks in which it does."""
    found = {tuple(map(r.block_words, _restarted(r))) for r in view.records} - {()}
    if not found or "skip_gain" not in metrics:
        return []
    where = "the projection at the beginning of a stage"
    if len(found) == 1:
        blocks = [block.removeprefix("block ") for block in found.pop()]
        many = "projections of blocks" if len(blocks) > 1 else "projection of block"
        where = f"the {many} {', '.join(blocks)}"
    return [
        f"P3 of the whole network begins anew behind {where}: no path without weights leads "
        "through a projection."
    ]


def _restarted(record: Record) -> list[int]:
    """The blocks at which a stage begins with a projection."""
    return [
        place
        for place in (0, *record.boundaries)
        if record.run.blocks[place].get("shortcut") == "projection"
    ]


def _statement(view: View, traces: Sequence[Trace]) -> str:
    """What is left of the skip path at the last block."""
    gains = [(t.label, middle([float(v) for v in t.values("skip_gain")[:, -1]])) for t in traces]
    found = extremes(gains[-1:] if view.single else gains)
    if not found:
        ratios = [largest(trace, "branch_ratio") for trace in traces]
        known = [ratio for ratio in ratios if ratio is not None]
        if not known:
            return "The skip path cannot be followed through this network"
        block, ratio = max(known, key=lambda pair: pair[1])
        where = traces[0].records[0].block_words(block)
        return f"Branches reach {canvas.times_words(ratio)} the size of their shortcut ({where})"
    if all(value == 1 for _, value in found):
        return "The skip path is open: shortcuts pass every gradient on unchanged"
    if len(view.series) > 1:
        words = [f"{100 * value:.3g} %{for_words(label)}" for label, value in found]
        return f"Of a gradient, shortcuts alone pass on to the last block: {', '.join(words)}"
    since = ""
    if view.single and (begun := _restarted(view.single)) and begun[-1]:
        since = f" from {view.single.block_words(begun[-1])}"
    return (
        f"Shortcuts alone pass {100 * found[0][1]:.3g} % of a gradient on{since} to the last block"
    )


def _layers(view: View) -> tuple[list[list[Trace]], str]:
    """The lines: all of one run, or those of the first and of the last step; and their steps."""
    if view.single:
        history = view.history(3)
        return [history], view.steps_shown(history)
    layers = [view.traces(moment) for moment in view.moments()]
    return layers, "; ".join(map(canvas.moment_words, layers))


def _draw_panel(axes: Axes, view: View, layers: list[list[Trace]], panel: canvas.Panel) -> None:
    metric, neutral = panel.metric, panel.neutral
    log = neutral is None
    for layer in layers:
        light = len(layers) > 1 and layer is layers[0]
        canvas.trace_blocks(axes, view, layer, metric, log=log, light=light)
    canvas.trace_theory(axes, view, layers[0], metric)
    canvas.head_panel(axes, panel.title, panel.formula, stages=True)
    canvas.finish_blocks(axes, view, log=log, floor=None if log else 0.0)
    y = canvas.plotted(axes)
    if neutral == 1 and y.size:
        axes.set_ylim(-0.04, max(1.06, axes.get_ylim()[1]))


def _weights(layers: list[list[Trace]]) -> list[Line2D]:
    """Entries of the legend for thin and thick lines."""
    words = [canvas.moment_words(layer) for layer in layers]
    return [
        canvas.Line2D([], [], color="0.3", lw=0.7, alpha=0.6, label=f"thin: {words[0]}"),
        canvas.Line2D([], [], color="0.3", lw=1.6, label=f"thick: {words[1]}"),
    ]


def _draw_steps(axes: Axes, view: View) -> None:
    """Skip gain at the last block over steps, with the threshold of a collapse."""
    y = np.concatenate([record.grid("skip_gain")[-1] for record in view.records])
    positive = y[np.isfinite(y) & (y > 0)]
    log = bool(positive.size and positive.min() < 0.2)
    canvas.trace_block_steps(axes, view, "skip_gain", -1, log=log, silent=view.single is not None)
    canvas.head_panel(axes, "P3 skip gain at the last block over steps", "P3")
    canvas.finish_steps(axes, view, log=log)
    if log:
        canvas.reach(axes, _COLLAPSED / 2, 1.3)
        canvas.guide(axes, _COLLAPSED, "0.05: collapsed")
    elif positive.size:
        axes.set_ylim(0, 1.15)
