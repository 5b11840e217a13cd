"""Lines, and a metric against the block: one line per trace, theory, stage boundaries.

Finite values are drawn as they are, non-finite ones and zeros as marks on the edge of the axis.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from resdiag.plots.style import BEYOND, GREY, NONFINITE, THEORY, ZERO, Look
from resdiag.plots.view import Bools, Floats, Record, Trace, View
from resdiag.theory.prediction import Prediction, predict_run

_THIN_MARKERS = "PX*"  # a white edge would eat them
_CROWDED = 500  # points from which a pale line covers what it should accompany


def draw_line(
    axes: Axes, x: Floats, values: Floats, broken: Bools, look: Look, label: str, *,
    log: bool = False, rank: int = 0, light: bool = False, counts: bool = True,
    hollow: bool = False, marks: Sequence[int] | None = None,
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
        counts: Whether the scale of the axis follows this line.
        hollow: Whether its markers are hollow.
        marks: The points that get a marker; None chooses about twelve.
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
        marker=look.marker, ms=(2.4 if light else 3.4) + thin,
        mfc="white" if hollow else look.colour, mec=look.colour if thin or hollow else "white",
        mew=0.8 if hollow else 0.3, gid=None if counts else BEYOND,
        markevery=[] if crowded else _places(x, rank) if marks is None else list(marks),
    )  # fmt: skip
    if len(values) > 1:
        axes.fill_between(
            x, low, high, color=look.colour, alpha=0.18, lw=0, gid=None if counts else BEYOND
        )
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


def head_panel(axes: Axes, title: str, formula: str | None = None, *, stages: bool = False) -> None:
    """Title on the left, formula on the y axis; None leaves what is there."""
    axes.set_title(title, loc="left", pad=13 if stages else 5)
    if formula is not None:
        axes.set_ylabel(formula)
    axes.tick_params(labelsize=7)


def clipped_words(view: View) -> str:
    """What a panel of parameter gradients adds to its title where they were read after clipping."""
    return ", after clipping" if any(r.run.point == "post_clip" for r in view.records) else ""


def note_panel(axes: Axes, text: str, *, y: float = 0.5) -> None:
    """A sentence inside a panel, for what an empty-looking panel means."""
    axes.text(
        0.5, y, text, transform=axes.transAxes, ha="center", va="center", size=7, color=GREY,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
    )  # fmt: skip


def guide(axes: Axes, y: float, text: str) -> None:
    """A horizontal reference with its name at the right end, or in the middle if that is taken."""
    taken = bool(text) and not _is_free(axes, y, 0.7)
    at, side = (0.5, "center") if taken else (1.0, "right")
    axes.axhline(y, color="0.25", lw=0.7, ls=(0, (1, 1.5)), zorder=1)
    axes.annotate(
        text, (at, y), xycoords=axes.get_yaxis_transform(), xytext=(-2, 1.5),
        textcoords="offset points", ha=side, va="bottom", size=7, color="0.25", zorder=1.2,
    )  # fmt: skip


def _is_free(axes: Axes, y: float, left: float) -> bool:
    """Whether no point is drawn just above `y` in the right part of a panel."""
    lines = [line for line in axes.lines if line.get_transform() == axes.transData]
    points = [np.column_stack(line.get_data()).astype(np.float64) for line in lines]
    places = axes.transData.transform(np.concatenate([*points, [[np.nan, np.nan]]]))
    across, up = axes.transAxes.inverted().transform(places).T
    floor = axes.transAxes.inverted().transform(axes.transData.transform((0.0, y)))[1]
    with np.errstate(invalid="ignore"):
        return not ((across > left) & (up > floor) & (up < floor + 0.1)).any()


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
        for part, here in enumerate(_parts(trace.records[0], len(x))):
            draw_line(
                axes, x[here], values[:, here], broken[:, here], trace.look,
                f"{'_' * bool(part)}{trace.label}", log=log, rank=rank, light=light,
                counts=trace.is_finite, hollow=bool(part),
                marks=None if len(x) > 48 or not trace.records[0].parts else range(len(here)),
            )  # fmt: skip
    for place, name in enumerate(dict.fromkeys(traces[0].records[0].parts)):
        axes.plot(
            [], [], color="0.3", lw=0.8, marker="o", ms=3.8, mec="0.3", mew=0.8,
            mfc="white" if place else "0.3", label=name,
        )  # fmt: skip


def _parts(record: Record, count: int) -> list[NDArray[np.intp]]:
    """The points of each line: one for attention and one for MLPs, the stem in the first of them.

    One line of all points where the blocks are of one sort.
    """
    parts = record.parts
    if not parts:
        return [np.arange(count)]
    parts = [parts[0]] * (count - len(parts)) + parts
    return [np.flatnonzero([p == part for p in parts]) for part in dict.fromkeys(parts)]


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
