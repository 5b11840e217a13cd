"""The activations themselves: the paper's Figure 2, with what it is drawn for, the mean output."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from resdiag.plots.lazy import np, pd
from resdiag.plots.plotkind import PlotKind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from resdiag.plots.view import View

_NAMES: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {"relu": ("ReLU", "original", "--"), "elu": ("ELU", "elu", "-")}
)
"""Label, variant that has the colour, dashes."""
_LIMIT, _POINTS = 4.0, 161


def activation_values() -> pd.DataFrame:
    """Both functions and their slopes at 161 points of [-4, 4]: columns x, relu, elu, *_slope."""
    x = np.linspace(-_LIMIT, _LIMIT, _POINTS)
    low = np.minimum(x, 0)
    columns: dict[str, NDArray[np.float64]] = {
        "x": x,
        "relu": np.maximum(x, 0),
        "elu": np.maximum(x, 0) + np.expm1(low),
        "relu_slope": (x > 0).astype(np.float64),
        "elu_slope": np.where(x > 0, 1.0, np.exp(low)),
    }
    return pd.DataFrame(columns)


def activation_moments() -> dict[str, dict[str, float]]:
    """Mean, second moment and mean squared slope of each, for standard normal input.

    >>> {name: round(found["mean"], 3) for name, found in activation_moments().items()}
    {'relu': 0.399, 'elu': 0.161}
    """
    from resdiag.theory.moments import ACTIVATIONS

    return {
        name: {
            "mean": float(ACTIVATIONS[name].mean(1.0)),
            "second moment": float(ACTIVATIONS[name].second_moment(1.0)),
            "mean squared slope": float(ACTIVATIONS[name].slope_sq(1.0)),
        }
        for name in _NAMES
    }


def draw_activations(view: View | None = None) -> Figure:
    """Both functions with their mean output, and both slopes, side by side."""
    from matplotlib.figure import Figure

    from resdiag.plots.sheet import freeze_layout
    from resdiag.plots.style import WIDTH, look

    values, moments = activation_values(), activation_moments()
    with look():
        figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
        figure.set_label(ACTIVATION_PLOT.title)
        left, right = figure.subplots(1, 2)
        _draw(left, values, "", "f(x), and its mean for standard normal input")
        _draw(right, values, "_slope", "slope f'(x)")
        for above, (name, (label, variant, dashes)) in zip((1, -1), _NAMES.items(), strict=True):
            mean, colour = moments[name]["mean"], _colour(variant)
            left.axhline(mean, color=colour, lw=0.8, ls=dashes, zorder=1)
            left.annotate(
                f"mean of {label}: {mean:.2f}", (_LIMIT, mean), xytext=(0, 2 * above),
                textcoords="offset points", size=7, color=colour, ha="right",
                va="bottom" if above > 0 else "top",
            )  # fmt: skip
        left.legend(loc="upper left")
        freeze_layout(figure)
    return figure


def _colour(variant: str) -> str:
    from resdiag.plots.style import VARIANT_LOOKS

    return VARIANT_LOOKS[variant].colour


def _draw(axes: Axes, values: pd.DataFrame, ending: str, title: str) -> None:
    for name, (label, variant, dashes) in _NAMES.items():
        column = values[f"{name}{ending}"]
        axes.plot(values["x"], column, color=_colour(variant), ls=dashes, lw=1.5, label=label)
    axes.set_title(title, loc="left")
    axes.set_xlabel("x")


ACTIVATION_PLOT = PlotKind(
    name="activations",
    title="ReLU and ELU",
    question="How do the two activations shift the mean of their output?",
    reading=(
        "ReLU is never negative, so its mean output is far from 0; ELU's negative values, down to "
        "-1, pull it towards 0. Horizontal lines: the mean output for standard normal input. "
        "Neither slope exceeds 1: no activation makes a gradient explode by itself."
    ),
    needs=(),
    draw=draw_activations,
)
"""A plot that no run is needed for; a study file may name it, `resdiag plot` not."""
