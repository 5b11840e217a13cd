"""The scale of a y axis: it survives any range, marks on its edges, and having nothing to draw."""

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import (
    FuncFormatter,
    LogFormatterMathtext,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)

from resdiag.plots.style import GREY, NONFINITE, ZERO
from resdiag.plots.view import Floats

_HUGE = 1e3  # ratio above which a linear axis hides the small values


def whole_ticks(axes: Axes) -> None:
    """Ticks of x at whole numbers only."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))


def finish_scale(axes: Axes, *, log: bool, floor: float | None = None) -> None:
    """Set the scale of y, leaving room for marks; say so where nothing finite is left to draw."""
    y = plotted(axes)
    if y.size == 0:
        axes.set_ylim(0.1, 10) if log else axes.set_ylim(0, 1)
    if log:
        axes.set_yscale("log")
    if y.size == 0:
        axes.text(
            0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", va="center",
            color=GREY, size=7,
        )  # fmt: skip
        axes.set_yticks([], minor=False)
        axes.set_yticks([], minor=True)
        return
    _make_room(axes, y if floor is None else np.append(y, floor), log=log)


def plotted(axes: Axes) -> Floats:
    """The finite y values of the lines and bands drawn in data coordinates."""
    drawn = [
        np.asarray(line.get_ydata(), dtype=np.float64)
        for line in axes.lines
        if line.get_transform() == axes.transData
    ]
    bands = [path for band in axes.collections for path in band.get_paths()]
    drawn += [np.asarray(path.vertices, dtype=np.float64)[:, 1] for path in bands]
    y = np.concatenate(drawn) if drawn else np.empty(0)
    return y[np.isfinite(y)]


def _make_room(axes: Axes, y: Floats, *, log: bool) -> None:
    """Widen the range where marks stand on an edge, or where all values are equal."""
    gids = {line.get_gid() for line in axes.lines}
    above = 0.25 if NONFINITE in gids else 0.09
    below = 0.25 if ZERO in gids else 0.09
    low, high = float(y.min()), float(y.max())
    if log:
        a, b = np.log10(low), np.log10(high)
        span = max(b - a, 0.6)
        middle = (a + b) / 2
        a, b = min(a, middle - span / 2), max(b, middle + span / 2)
        axes.set_ylim(
            10 ** max(a - below * span - 0.04, -300), 10 ** min(b + above * span + 0.04, 300)
        )
        name_decades(axes)
        return
    # equal values: a range around them, not one that magnifies rounding
    span = max(high - low, 1e-3 * max(abs(high), abs(low))) or 1.0
    axes.set_ylim(low - below * span, high + above * span)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def name_decades(axes: Axes) -> None:
    """Ticks of a log axis: 1, 2, 5 as plain numbers within two decades, powers of ten beyond."""
    low, high = np.log10(axes.get_ylim())
    if high - low > 2:
        return
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def share_scale(panels: Iterable[Axes], *, most: float = np.inf) -> None:
    """Give panels of the same quantity the same range, if it is at most `most` times each one's.

    Beyond that the same range would flatten the lines of one panel.
    """
    chosen = [axes for axes in panels if plotted(axes).size]
    if not chosen:
        return
    limits = np.array([axes.get_ylim() for axes in chosen])
    logs = np.log10(limits) if chosen[0].get_yscale() == "log" else limits
    if logs[:, 1].max() - logs[:, 0].min() > most * np.diff(logs).min():
        return
    for axes in chosen:
        axes.set_ylim(limits[:, 0].min(), limits[:, 1].max())
        if axes.get_yscale() == "log":
            axes.yaxis.set_major_locator(LogLocator())
            axes.yaxis.set_major_formatter(LogFormatterMathtext())
            name_decades(axes)


def huge(values: Floats) -> bool:
    """Whether a linear axis would hide most of these values."""
    size = np.abs(values[np.isfinite(values) & (values != 0)])
    return bool(size.size and size.max() > _HUGE and size.max() > 30 * np.median(size))
