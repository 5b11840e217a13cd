"""The plot of a sweep: each measure against depth or width, with the law that fits it."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from resdiag.plots.scale import finish_scale
from resdiag.plots.sheet import SelfShowing
from resdiag.plots.style import GREY, ONE_RUN
from resdiag.theory.scaling import Trend


def draw_sweep(
    points: Mapping[str, Sequence[tuple[float, float]]],
    trends: Mapping[str, Trend],
    *,
    titles: Sequence[str],
    about: Sequence[str],
    xlabel: str,
    title: str,
) -> Figure:
    """Draw a panel per measure.

    Args:
        points: By the name of the measure, size and value of each model.
        trends: The law of each, by the same names.
        titles: A statement above each panel.
        about: What each measure is.
        xlabel: What the sizes are.
        title: Above all panels.
    """
    figure = SelfShowing(figsize=(3.1 * len(points), 3.4), layout="constrained")
    figure.suptitle(title, fontsize=10, fontweight="bold")
    places = figure.subplots(1, len(points), squeeze=False)[0]
    for axes, name, head, what in zip(places, points, titles, about, strict=True):
        x, y = np.array(points[name], dtype=float).T
        axes.plot(x, y, "o", color=ONE_RUN.colour, ms=4, label="one model")
        trend = trends[name]
        if trend.kind != "unknown":
            fine = np.geomspace(x.min(), x.max(), 50)
            axes.plot(fine, [trend.at(size) for size in fine], "--", color=GREY, lw=1, label="fit")
        axes.set(xscale="log", xlabel=xlabel)
        sizes = sorted(set(x))
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.set_xticks([], minor=True)
        finish_scale(axes, log=True)
        axes.set_title("\n".join(textwrap.wrap(head, 38)), fontsize=8, loc="left")
        axes.set_ylabel("\n".join(textwrap.wrap(what, 40)), fontsize=7)
    places[0].legend(fontsize=7, frameon=False)
    return figure
