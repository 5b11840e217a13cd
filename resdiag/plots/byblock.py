"""A metric against the block: one line per trace, theory, stage boundaries."""

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from resdiag.plots.lines import draw_line
from resdiag.plots.overlay import predicted
from resdiag.plots.scale import finish_scale, whole_ticks
from resdiag.plots.style import PALE, THEORY
from resdiag.plots.view import Record, Trace, View


def trace_blocks(
    axes: Axes, view: View, traces: Sequence[Trace], metric: str, *,
    log: bool = False, light: bool = False, stem: str = "",
) -> None:  # fmt: skip
    """Draw `metric` against the block, one line per trace.

    Args:
        axes: Where.
        view: Says how blocks are placed.
        traces: The lines.
        metric: Id of a metric per block.
        log: Whether the axis is logarithmic.
        light: Thin and pale.
        stem: Metric whose value at block 0 is drawn as block -1, the output of the stem.
    """
    for rank, trace in enumerate(traces):
        x = trace.records[0].positions(view.normalised)
        values, broken = trace.values(metric), trace.broken(metric)
        if stem:
            width = x[1] - x[0] if len(x) > 1 else 1.0
            x = np.concatenate([[x[0] - width], x])
            values = np.hstack([trace.values(stem)[:, :1], values])
            broken = np.hstack([trace.broken(stem)[:, :1], broken])
        draw_line(axes, x, values, broken, trace.look, trace.label, log=log, rank=rank, light=light)


def trace_theory(axes: Axes, view: View, traces: Sequence[Trace], metric: str) -> None:
    """Draw what theory predicts at initialisation for the networks of `traces`, where it does."""
    if not view.theory:
        return
    for record in _distinct([record for trace in traces for record in trace.records]):
        values = predicted(record, metric)
        if values is not None:
            axes.plot(
                record.positions(view.normalised), values, color="0.58", lw=0.9, ls=(0, (4, 2)),
                label=THEORY, zorder=3,  # on top: where it agrees it would not be seen below
            )  # fmt: skip


def _distinct(records: Sequence[Record]) -> list[Record]:
    """One run per network."""
    return list({(r.run.config.model, r.run.config.depth): r for r in reversed(records)}.values())


def finish_blocks(
    axes: Axes, view: View, *, log: bool = False, stem: bool = False, floor: float | None = None
) -> None:
    """Stage boundaries, the axis of blocks, and a scale that survives any range."""
    _draw_stages(axes, view)
    axes.set_xlabel("depth (share of the blocks)" if view.normalised else "block")
    if not view.normalised:
        whole_ticks(axes)
        count = view.records[0].n_blocks
        axes.set_xlim((-1.5 if stem else -0.5) - 0.01 * count, count - 0.5 + 0.01 * count)
        if stem:
            axes.axvspan(-2.5, -0.5, color="0.95", lw=0, zorder=0)
            axes.annotate(
                "stem", (-1, 0), xycoords=axes.get_xaxis_transform(), xytext=(0, 3), size=7,
                textcoords="offset points", rotation=90, ha="center", va="bottom", color="0.45",
            )  # fmt: skip
    finish_scale(axes, log=log, floor=floor)


def _draw_stages(axes: Axes, view: View) -> None:
    """Light lines where a stage begins, with names above; none where the runs disagree."""
    places = {tuple(_edges(record, view.normalised)) for record in view.records}
    if len(places) != 1:
        return
    edges = places.pop()
    for edge in edges[1:-1]:
        axes.axvline(edge, color=PALE, lw=0.8, zorder=0.5)
    if len(edges) < 3:
        return
    for number, (left, right) in enumerate(itertools.pairwise(edges)):
        axes.text(
            (left + right) / 2, 1.01, f"stage {number}", transform=axes.get_xaxis_transform(),
            ha="center", va="bottom", size=7, color="0.45",
        )  # fmt: skip


def _edges(record: Record, normalised: bool) -> list[float]:
    """Where stages begin and end on the axis, rounded so that equal places compare equal."""
    bounds = [0, *record.boundaries, record.n_blocks]
    return [round(b / record.n_blocks, 6) if normalised else b - 0.5 for b in bounds]
