"""The look of every figure: sizes, colours, markers and line styles.

Colours are Okabe and Ito's (distinct for colour-blind readers) and never stand alone: each variant
has its marker and line style too, and the same look in every figure.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from cycler import cycler

WIDTH = 7.0
"""Width of every figure in inches: the text width of a page."""

PIXELS_PER_INCH = 150
"""Of pictures, and of what is a picture inside an SVG."""

GREY, PALE, ALARM, FAINT = "0.35", "0.82", "#D55E00", "#E0A27A"
"""Theory and notes; stage boundaries and missing cells; non-finite values; their hatching."""

NONFINITE, ZERO, THEORY = "non-finite", "zero", "theory (no fitted constant)"
BEYOND = "beyond the axis"
"""Labels that mean the same in every legend."""

MAGNITUDES = "cividis"
"""Colour map of heat maps: even in lightness, made for colour-blind readers."""

_BLACK, _ORANGE, _SKY, _GREEN, _YELLOW, _BLUE, _VERMILLION, _PURPLE = (
    mpl.colors.to_hex(colour) for colour in mpl.color_sequences["okabe_ito"]
)
_TAN = "#CA9161"  # seaborn's "colorblind" palette continues Okabe-Ito with it


@dataclass(frozen=True)
class Look:
    """How one line is drawn."""

    colour: str
    marker: str = "o"
    line: str | tuple[int, tuple[float, ...]] = "-"


ONE_RUN = Look(_BLUE)
"""Lines over steps of a single run, which no other line is compared with."""

_DASHED, _DOTTED, _DASHDOT = (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5))
_LINES: tuple[str | tuple[int, tuple[float, ...]], ...] = ("-", _DASHED, _DASHDOT, _DOTTED)
_MARKERS = "osDPXhd*p"

VARIANT_LOOKS = {
    "original": Look(_BLACK, "o", "-"),
    "elu_nobn": Look(_ORANGE, "s", _DASHED),
    "elu_pre": Look(_SKY, "D", _DASHDOT),
    "elu_after": Look(_GREEN, "P", _DASHED),
    "elu": Look(_VERMILLION, "X", "-"),
    "no_relu": Look(_BLUE, "h", _DASHDOT),
    "relu_pre": Look(_PURPLE, "d", _DASHED),
    "relu_nobn": Look(_TAN, "p", _DOTTED),
    "plain": Look("#777777", "*", _DOTTED),
}
"""The look of each variant, the same in every figure."""

_SPARE = (_BLUE, _VERMILLION, _GREEN, _PURPLE, _ORANGE, _SKY, _BLACK, _TAN)

_WHITEGRID: Any = {  # matplotlib types keys one by one
    "axes.axisbelow": True,
    "axes.facecolor": "white",
    "axes.grid": True,
    "figure.facecolor": "white",
    "grid.linestyle": "-",
    "lines.solid_capstyle": "round",
    "patch.edgecolor": "w",
    "patch.force_edgecolor": True,
    "text.color": ".15",
    "xtick.color": ".15",
    "xtick.direction": "out",
    "xtick.top": False,
    "ytick.color": ".15",
    "ytick.direction": "out",
    "ytick.right": False,
    **{f"axes.spines.{side}": True for side in ("bottom", "left", "right", "top")},
}
"""seaborn's theme "whitegrid", written out: seaborn imports scipy.stats, a second and a half."""

DENSER: Any = {
    "font.family": ["DejaVu Sans"],  # ships with matplotlib: the same figure on every machine
    "mathtext.fontset": "dejavusans",
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 7.5,
    "axes.labelcolor": "0.15",
    "axes.edgecolor": "0.45",
    "axes.linewidth": 0.6,
    "axes.prop_cycle": cycler(color=list(_SPARE)),
    "grid.color": "0.92",
    "grid.linewidth": 0.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.bottom": True,
    "ytick.left": True,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.4,
    "hatch.linewidth": 0.4,
    "figure.dpi": 100,
    "savefig.dpi": PIXELS_PER_INCH,
    "savefig.bbox": None,
    "svg.hashsalt": "resdiag",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "path.simplify": True,
}


def ink(colour: str) -> tuple[float, float, float]:
    """A colour dark enough for small text on white."""
    red, green, blue = mpl.colors.to_rgb(colour)
    return 0.6 * red, 0.6 * green, 0.6 * blue


def look() -> AbstractContextManager[None]:
    """The matplotlib settings under which figures are drawn and written: seaborn's, made denser."""
    return mpl.rc_context({**_WHITEGRID, **DENSER})


def step_looks(count: int) -> list[Look]:
    """Looks of `count` moments of one run: dark is early; markers and lines differ too."""
    ends = {1: (0.25,), 2: (0.1, 0.7)}.get(count) or [
        0.05 + 0.7 * i / (count - 1) for i in range(count)
    ]
    return _ordered("viridis", ends)


def depth_looks(count: int) -> list[Look]:
    """Looks of one variant at several depths: a palette even in lightness, light is shallow."""
    return _ordered("viridis", [0.7 - 0.65 * i / (count - 1) for i in range(count)])


def _ordered(palette: str, places: Sequence[float]) -> list[Look]:
    colours = [mpl.colors.to_hex(mpl.colormaps[palette](place)) for place in places]
    return [
        Look(colour, _MARKERS[i % len(_MARKERS)], _LINES[i % len(_LINES)])
        for i, colour in enumerate(colours)
    ]


def variant_looks(variants: Sequence[str]) -> list[Look]:
    """Looks of the variants of several lines; a variant that repeats has other line styles.

    A variant that is not in the table gets the next spare colour.
    """
    strange = [v for v in dict.fromkeys(variants) if v not in VARIANT_LOOKS]
    looks = []
    for number, variant in enumerate(variants):
        base = VARIANT_LOOKS.get(variant)
        if base is None:
            place = strange.index(variant)
            base = Look(_SPARE[place % len(_SPARE)], _MARKERS[place % len(_MARKERS)])
        style = _LINES.index(base.line) + variants[:number].count(variant)
        looks.append(Look(base.colour, base.marker, _LINES[style % len(_LINES)]))
    return looks
