"""Lines, and a metric against the block: one line per trace, theory, stage boundaries.

Finite values are drawn as they are, non-finite ones and zeros as marks on the edge of the axis.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from resdiag.plots.scale import finish_scale, whole_ticks
from resdiag.plots.style import GREY, NONFINITE, PALE, THEORY, ZERO, Look
from resdiag.plots.view import Bools, Floats, Record, Trace, View
from resdiag.theory.prediction import Prediction, predict_run

_THIN_MARKERS = "PX*"  # a white edge would eat them
_CROWDED = 500  # points from which a pale line covers what it should accompany


def draw_line(
    axes: Axes, x: Floats, values: Floats, broken: Bools, look: Look, label: str, *,
    log: bool = False, rank: int = 0, light: bool = False,
) -> None:  # fmt: skip
    """Draw rows of `values` (row, x) as one line: their median, with a band from least to most.

    Non-finite values become triangles near the top edge, zeros on a log axis near the bottom edge.

    Args:
        axes: Where.
        x: Positions.
        values: One row per run.
        broken: Where `values` is non-finite rather than missing.
        look: Colour, marker, line style.
        label: For the legend.
        log: Whether the axis is, or will be, logarithmic.
        rank: Number of the line in its panel; marks of different lines do not hide each other.
        light: Thin, pale and not in the legend, for what the others are compared with.
    """
    drawn = np.where(np.isfinite(values) & ((values > 0) | (not log)), values, np.nan)
    middle, low, high = _spread(drawn)
    thin = look.marker in _THIN_MARKERS
    width, alpha = (0.7, 0.55) if light else (1.3 if len(x) <= 200 else 0.8, 1.0)
    crowded = light and len(x) > _CROWDED
    if crowded:  # a cloud that lines can be seen through
        width, alpha = 0.4, 0.2
    axes.plot(
        x, middle, color=look.colour, ls=look.line, lw=width, alpha=alpha,
        label=f"_{label}" if light else label,
        marker=look.marker, ms=(2.4 if light else 3.4) + thin, mec=look.colour if thin else "white",
        mew=0.3,
        markevery=[] if crowded else _places(x, rank),
    )  # fmt: skip
    if len(values) > 1:
        axes.fill_between(x, low, high, color=look.colour, alpha=0.18, lw=0)
    _mark_edge(axes, x, np.any(broken, axis=0), look, rank, top=True)
    if log:
        _mark_edge(axes, x, np.any(values == 0, axis=0), look, rank, top=False)


def _spread(drawn: Floats) -> tuple[Floats, Floats, Floats]:
    """Median, least and most over the rows; NaN, without a warning, where a column has none."""
    known = ~np.isnan(drawn).all(axis=0)
    middle, low, high = (np.full(drawn.shape[1], np.nan) for _ in range(3))
    middle[known] = np.nanmedian(drawn[:, known], axis=0)
    low[known] = np.nanmin(drawn[:, known], axis=0)
    high[known] = np.nanmax(drawn[:, known], axis=0)
    return middle, low, high


def _places(x: Floats, rank: int) -> list[int]:
    """Which points get a marker: about 12, evenly along the axis, not the same for each line."""
    if len(x) <= 12:
        return list(range(len(x)))
    gap = (x[-1] - x[0]) / 12
    wanted = x[0] + gap * (np.arange(12) + 0.5 + 0.25 * (rank % 4 - 1.5))
    return sorted({int(place) for place in np.searchsorted(x, wanted)})


def _mark_edge(axes: Axes, x: Floats, where: Bools, look: Look, rank: int, *, top: bool) -> None:
    """Triangles at the edge of the axis, in the colour of the line."""
    if not where.any():
        return
    shift = 0.035 + 0.05 * (rank % 5)
    marks = x[where]
    axes.plot(
        marks, np.full(len(marks), 1 - shift if top else shift), ls="none",
        marker="^" if top else "v", ms=4, mfc=look.colour, mec="black" if top else "white",
        mew=0.4, transform=axes.get_xaxis_transform(), clip_on=False, zorder=5,
        label=NONFINITE if top else ZERO, markevery=(0, max(1, len(marks) // 12)),
        gid=NONFINITE if top else ZERO,
    )  # fmt: skip


def head_panel(axes: Axes, title: str, formula: str = "", *, stages: bool = False) -> None:
    """Title on the left, formula on the y axis."""
    axes.set_title(title, loc="left", pad=13 if stages else 5)
    axes.set_ylabel(formula)
    axes.tick_params(labelsize=7)


def note_panel(axes: Axes, text: str, *, y: float = 0.5) -> None:
    """A sentence inside a panel, for what an empty-looking panel means."""
    axes.text(
        0.5, y, text, transform=axes.transAxes, ha="center", va="center", size=7, color=GREY,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
    )  # fmt: skip


def guide(axes: Axes, y: float, text: str) -> None:
    """A horizontal reference with its name at the right end."""
    axes.axhline(y, color="0.25", lw=0.7, ls=(0, (1, 1.5)), zorder=1)
    axes.annotate(
        text, (1, y), xycoords=axes.get_yaxis_transform(), xytext=(-2, 1.5),
        textcoords="offset points", ha="right", va="bottom", size=7, color="0.25", zorder=1.2,
    )  # fmt: skip


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
    """Draw what theory predicts at initialisation for networks drawn at their first step."""
    initial = [trace for trace in traces if not any(trace.places)]
    records = [record for trace in initial for record in trace.records]
    # one run per network, the first one
    networks = {(r.run.config.model, r.run.config.depth): r for r in reversed(records)}
    for record in networks.values() if view.theory else ():
        values = predicted(record, metric)
        if values is not None:
            axes.plot(
                record.positions(view.normalised), values, color="0.58", lw=0.9, ls=(0, (4, 2)),
                label=THEORY, zorder=3,  # on top: where it agrees it would not be seen below
            )  # fmt: skip


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


def predicted(record: Record, metric: str) -> Floats | None:
    """The prediction of `metric` at initialisation by block, or None where there is none.

    Only E[H] and E[H^2] behind the stem are taken from the run, at its first step. The gradient at
    the outputs is predicted up to its level, which is the measured one at the last block.
    """
    theory = prediction(record)
    if theory is None or len(theory.second_moment) != record.n_blocks:
        return None
    if metric == "grad_output":
        level = record.grid(metric)[-1, 0]
        growth = np.append(theory.grad_growth[1:], 1.0)
        back = np.exp(np.cumsum(np.log(growth)[::-1])[::-1] / 2)
        values = level * back
        return values if np.isfinite(values).all() else None
    return theory.series(metric)


def prediction(record: Record) -> Prediction | None:
    """The prediction for a run's network; None where theory has nothing, or the run not step 0."""
    if record.steps[0] != 0:
        return None
    s0, m0 = (float(record.grid(f"input_{name}")[0, 0]) for name in ("second_moment", "mean"))
    return predict_run(record.run.config, record.run.blocks, s0=s0, m0=m0)
