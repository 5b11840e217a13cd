"""The scale of a y axis: it survives any range, marks on its edges, and having nothing to draw."""

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from resdiag.plots.style import BEYOND, GREY, NONFINITE, ZERO
from resdiag.plots.view import Floats

_DENSE = 0.75  # decades of a log axis below which 1, 2, 5 would be one tick or two
_HUGE = 1e3  # ratio above which a linear axis hides the small values
_UNDER_MARKS = 0.8  # share of the axis below the marks on its upper edge
_LEAST_SPAN = 0.05  # of a linear axis, over its largest value: less would magnify rounding


def whole_ticks(axes: Axes) -> None:
    """Ticks of x at whole numbers only."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))


def finish_scale(
    axes: Axes, *, log: bool, floor: float | None = None, also: Sequence[float] = ()
) -> None:
    """Set the scale of y, leaving room for marks; say so where nothing finite is left to draw.

    Lines of a step that is not finite everywhere do not count, unless there is nothing else: what
    of them lies beyond the axis is marked on its edge.

    Args:
        axes: A panel with its lines.
        log: Whether the axis is logarithmic.
        floor: A value that the axis reaches.
        also: More such values.
    """
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
    _make_room(axes, np.concatenate([y, also, [] if floor is None else [floor]]), log=log)
    _mark_beyond(axes)


def plotted(axes: Axes) -> Floats:
    """The finite y values drawn in data coordinates that an axis is to follow."""
    for beyond in (False, True):  # lines of a broken step only where there is nothing else
        drawn = [
            np.asarray(line.get_ydata(), dtype=np.float64)
            for line in axes.lines
            if line.get_transform() == axes.transData and (beyond or line.get_gid() != BEYOND)
        ]
        bands = [
            path
            for band in axes.collections
            if beyond or band.get_gid() != BEYOND
            for path in band.get_paths()
        ]
        drawn += [np.asarray(path.vertices, dtype=np.float64)[:, 1] for path in bands]
        y = np.concatenate(drawn) if drawn else np.empty(0)
        if np.isfinite(y).any():
            break
    return y[np.isfinite(y)]


def _mark_beyond(axes: Axes) -> None:
    """Hollow triangles where the line of a broken step leaves the axis."""
    low, high = axes.get_ylim()
    for line in [line for line in axes.lines if line.get_gid() == BEYOND]:
        x, y = (np.asarray(data, dtype=np.float64) for data in line.get_data())
        for out, place, marker in ((y > high, 0.965, "^"), (y < low, 0.035, "v")):
            if out.any():
                mark = Line2D(
                    x[out], np.full(out.sum(), place), ls="none", marker=marker, ms=4, mew=0.7,
                    mfc="white", mec=line.get_color(), transform=axes.get_xaxis_transform(),
                    zorder=5, label=BEYOND, clip_on=False,
                )  # fmt: skip
                mark.set_markevery((0, max(1, int(out.sum()) // 12)))
                axes.add_line(mark)


def _make_room(axes: Axes, y: Floats, *, log: bool) -> None:
    """Widen the range where marks stand on an edge, or where all values are equal."""
    gids = {line.get_gid() for line in axes.lines}
    above = 0.25 if NONFINITE in gids else 0.09
    below = 0.25 if ZERO in gids else 0.09
    y = y[y > 0] if log else y
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
    size = max(abs(high), abs(low))
    span = max(high - low, _LEAST_SPAN * size) or 1.0
    middle = (low + high) / 2
    low, high = min(low, middle - span / 2), max(high, middle + span / 2)
    axes.set_ylim(low - below * span, high + above * span)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(number_label))


def reach(axes: Axes, low: float, high: float) -> None:
    """Widen the range of y to values that it must show, and name its ticks anew."""
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(bottom, low), max(top, high))
    if axes.get_yscale() == "log":
        name_decades(axes)


def number_label(value: float, _: object = None) -> str:
    r"""The label of a tick: a plain number, or one times a power of ten where that is shorter.

    >>> number_label(0.25), number_label(50000.0), number_label(5230500.0), number_label(1e-9)
    ('0.25', '50000', '$5.23\\times10^{6}$', '$10^{-9}$')
    """
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        return f"{value:.6g}"
    mantissa, power = f"{value:.2e}".split("e")
    times = {"1": "", "-1": "-"}.get(f"{float(mantissa):g}", f"{float(mantissa):g}\\times")
    return f"${times}10^{{{int(power)}}}$"


def name_decades(axes: Axes) -> None:
    """Ticks of a log axis in one notation: 1, 2, 5 within two decades, powers of ten beyond.

    Some more where they span less than a decade.

    Plain numbers from 1e-4 to 1e5, powers of ten on an axis that reaches further.
    """
    low, high = axes.get_ylim()
    plain = low >= 1e-4 and high <= 1e5
    decades = np.log10(high) - np.log10(low)
    narrow = decades <= 2
    subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if decades < _DENSE else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs if narrow else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(number_label if plain or narrow else _power))
    axes.yaxis.set_minor_locator(
        NullLocator() if narrow else LogLocator(subs=(2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0))
    )
    axes.yaxis.set_minor_formatter(NullFormatter())


def _power(value: float, _: object) -> str:
    return f"$10^{{{round(np.log10(value))}}}$" if value > 0 else ""


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
    low, high = logs[:, 0].min(), max(logs[:, 1].max(), _top_with_marks(chosen, logs[:, 0].min()))
    for axes in chosen:
        log = axes.get_yscale() == "log"
        axes.set_ylim(*((10**low, 10**high) if log else (low, high)))
        if log:
            name_decades(axes)


def _top_with_marks(panels: Sequence[Axes], low: float) -> float:
    """The upper end that panels beginning at `low` need for the marks on their upper edges."""
    if NONFINITE not in {line.get_gid() for axes in panels for line in axes.lines}:
        return -np.inf
    values = np.concatenate([plotted(axes) for axes in panels])
    log = panels[0].get_yscale() == "log"
    top = np.log10(values[values > 0].max()) if log else values.max()
    return float(low + (top - low) / _UNDER_MARKS)


def huge(values: Floats) -> bool:
    """Whether a linear axis would hide most of these values."""
    size = np.abs(values[np.isfinite(values) & (values != 0)])
    return bool(size.size and size.max() > _HUGE and size.max() > 30 * np.median(size))
