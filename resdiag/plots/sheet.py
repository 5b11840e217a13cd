"""The page around the panels: statement on top, caption and reasons below, legend in between."""

import re
import textwrap
from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from resdiag.models.variants import variant_words
from resdiag.plots.figurefile import render
from resdiag.plots.grouping import hidden_differences
from resdiag.plots.lines import prediction
from resdiag.plots.style import BEYOND, GREY, NONFINITE, THEORY, WIDTH, ZERO
from resdiag.plots.view import View

_LINE = 0.135  # inches per line of small print
_TITLE, _SMALL = 10.0, 7.0
_MARGIN = 0.06  # inches
_WIDEST = 80  # letters of a title in one line


_SYMBOLS = {
    "x": "input of a block", "h": "shortcut", "F": "branch", "u": "sum u = h + F",
    "f": "what follows the addition", "H": "output of a block, H = f(u)", "L": "loss",
    "B": "batch size", "θ": "parameters", "Δθ": "their change in a step",
    "c": "a channel, with mean μ and standard deviation σ", "E": "mean over all values",
}  # fmt: skip


class SelfShowing(Figure):
    """A figure that a notebook shows as a picture, without pyplot and without a magic command."""

    def _repr_png_(self) -> bytes:
        """The picture, as `resdiag plot` writes it."""
        return render(self, "png")


def open_sheet(
    view: View, title: str, *, height: float, shown: str, notes: Sequence[str] = (),
    symbols: str = "",
) -> tuple[Figure, SubFigure]:  # fmt: skip
    """An empty figure with its words around a body.

    Args:
        view: What is drawn.
        title: Statement of what is shown.
        height: Of the body in inches.
        shown: The recorded steps shown, in words.
        notes: Small print under the caption.
        symbols: The symbols on the panels, with spaces between: they are explained.

    Returns:
        The figure and the part of it that takes the panels, `height` inches high.
    """
    heading = _balanced(title)
    about = _wrapped(_about(view, title, shown))
    caption = textwrap.wrap(f"Read: {view.kind.reading}", 126)
    notes = [
        *_symbols(symbols),
        *notes,
        *_bands(view),
        *_anchor(view),
        *_broken_ends(view),
        *_differences(view),
        *_reasons(view),
    ]
    small = [line for note in notes for line in textwrap.wrap(note, 126)]
    top = 0.18 * len(heading) + _LINE * len(about) + _MARGIN
    bottom = _LINE * (len(caption) + len(small)) + 2 * _MARGIN
    layout = ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.04, wspace=0.02, hspace=0.02)
    figure = SelfShowing(figsize=(WIDTH, top + height + bottom), layout=layout)
    who = subject(view)
    figure.set_label(title if who in title else f"{title}: {who}")
    parts = figure.subfigures(3, 1, squeeze=False, height_ratios=[top, height, bottom])
    head, body, foot = parts[:, 0]
    _write(head, [(line, _TITLE, "bold", "black", 0.18) for line in heading]
           + [(line, _SMALL, "normal", GREY, _LINE) for line in about], top)  # fmt: skip
    _write(foot, [(line, _SMALL, "normal", "0.1", _LINE) for line in caption]
           + [(line, _SMALL, "normal", GREY, _LINE) for line in small], bottom)  # fmt: skip
    return figure, body


def freeze_layout(figure: Figure) -> None:
    """Lay the panels out once and for all, at rounded places.

    The solver's last bits depend on the order of objects in memory; in an SVG they would end up in
    the names of clip paths, and two equal figures would differ.
    """
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")
    for part in figure.subfigs:
        part.bbox_relative.set_points(part.bbox_relative.get_points().round(6))
    for axes in [axes for part in figure.subfigs for axes in part.axes]:
        place = axes.get_position(original=True)
        axes.set_position(Bbox(place.get_points().round(6)))


def _write(
    part: SubFigure, lines: Sequence[tuple[str, float, str, str, float]], height: float
) -> None:
    """Lines of text from the top of a part of the figure that is `height` inches high."""
    y = height - _MARGIN
    for text, size, weight, colour, step in lines:
        # parse_math off: a run's label may hold a dollar sign
        part.text(
            0.012, y / height, text, size=size, weight=weight, color=colour, va="top",
            parse_math=False, in_layout=False,
        )  # fmt: skip
        y -= step


def _balanced(title: str) -> list[str]:
    """Lines of a title of about equal length, as few as there is room for."""
    rows = len(textwrap.wrap(title, _WIDEST))
    for width in range(len(title) // max(1, rows), _WIDEST + 1):
        if len(lines := textwrap.wrap(title, width)) <= rows:
            return lines
    return textwrap.wrap(title, _WIDEST)


def _wrapped(text: str) -> list[str]:
    """Lines of small print; a number stays with the word in front of it, or with what it counts."""
    bound = re.sub(r"(?<=[a-z]) (?=[0-9])|(?<=[0-9]) (?=recorded)", "\u00a0", text)
    return [line.replace("\u00a0", " ") for line in textwrap.wrap(bound, 126)]


def _symbols(names: str) -> list[str]:
    """What symbols mean, in one sentence."""
    told = [f"{name}: {_SYMBOLS[name]}" for name in names.split()]
    return [f"Symbols: {'; '.join(told)}."] if told else []


def _bands(view: View) -> list[str]:
    """What the bands are where runs differ in their seed."""
    if all(len(series.records) == 1 for series in view.series) or view.kind.axis == "runs":
        return []
    return ["Lines: median over the seeds; bands and bars: from the least to the most."]


def _about(view: View, title: str, shown: str) -> str:
    """Kind of plot, data, reading point, runs and steps."""
    known = [str(r.run.data.get("name", "?")) for r in view.records]
    data = f" · data: {_listed(known)}" if set(known) != {"?"} else ""  # a saved monitor has none
    point = _listed([r.run.point for r in view.records])
    runs = [record.run.label for record in view.records]
    names = ", ".join(runs) if len(runs) <= 4 else f"{len(runs)} runs"
    kind = "" if title.startswith(view.kind.title) else f"{view.kind.title} · "
    return f"{kind}{names}{data} · gradients read: {point} · {shown}"


def _listed(words: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(words))


def _anchor(view: View) -> list[str]:
    """What theory takes from the measurement: where it starts from, never a slope."""
    if not (view.theory and view.kind.theory_from and any(map(prediction, view.records))):
        return []
    return [f"Measured inputs of the theory: {view.kind.theory_from}."]


def _broken_ends(view: View) -> list[str]:
    """What lines and triangles are where runs that broke are compared."""
    if view.single or view.kind.axis != "block" or "last" not in view.moments():
        return []
    if all(trace.places == trace.ends for trace in view.traces("last")):
        return []
    return ["A run that became non-finite: the line is its last finite step, triangles the last."]


def _differences(view: View) -> list[str]:
    """A warning that a comparison is not of one thing only."""
    hidden = [key.replace("_", " ") for key in hidden_differences(view.series)]
    return [f"These runs also differ in: {', '.join(hidden)}."] if hidden else []


def _reasons(view: View) -> list[str]:
    """Why numbers that this plot needs are missing, once per reason."""
    reasons: dict[tuple[str, str], set[str]] = {}
    for record in view.records:
        for metric in view.kind.needs:
            for item in record.unavailable(metric):
                where = "" if item["blocks"] == "all" else f" ({_blocks(list(item['blocks']))})"
                key = (str(item["reason"]), where)
                reasons.setdefault(key, set()).add(str(item["metric"]))
    return [
        f"Not available: {', '.join(sorted(metrics))}{where}: {reason}"
        for (reason, where), metrics in reasons.items()
    ]


def _blocks(indices: Sequence[int]) -> str:
    shown = ", ".join(str(i) for i in indices[:6])
    return f"block {shown}" + (", ..." if len(indices) > 6 else "")


def subject(view: View) -> str:
    """The networks of a figure in a few words, for its title.

    "elu_pre (b), depth 20", "3 variants, depth 56", "elu (d), depths 20, 56, 110".
    """
    variants = list(dict.fromkeys(r.run.config.model for r in view.records))
    if not all(r.run.config.depth for r in view.records):  # not all of them are ours
        return ", ".join(variants) if len(variants) <= 3 else f"{len(variants)} models"
    depths = sorted({r.run.config.depth for r in view.records})
    who = variant_words(variants[0]) if len(variants) == 1 else f"{len(variants)} variants"
    many = "s" if len(depths) > 1 else ""
    return f"{who}, depth{many} {', '.join(map(str, depths))}"


def legend(body: SubFigure, *, extra: Sequence[Artist] = ()) -> None:
    """One legend above the panels for all their labels, each once."""
    handles: dict[str, Artist] = {}
    for axes in body.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    for handle in extra:
        handles.setdefault(str(handle.get_label()), handle)
    plain = [label for label in (NONFINITE, ZERO, BEYOND) if label in handles]
    handles |= {label: _plain_mark(label) for label in plain}
    if not handles:
        return
    labels = sorted(handles, key=lambda label: _LAST.index(label) if label in _LAST else -1)
    body.legend(
        [handles[label] for label in labels], labels, loc="outside upper left",
        ncols=_columns(labels), borderaxespad=0.2, columnspacing=1.4,
    )  # fmt: skip


_LAST = (THEORY, ZERO, BEYOND, NONFINITE)


def _columns(labels: Sequence[str]) -> int:
    """Columns of a legend with the fewest rows that fit; matplotlib fills it by columns."""
    for rows in range(1, len(labels)):
        columns = -(-len(labels) // rows)
        parts = [labels[i : i + rows] for i in range(0, len(labels), rows)]
        # 7 pt DejaVu Sans is 0.058 inch per letter on average; handle and gaps take the rest
        if sum(0.058 * max(map(len, part)) + 0.52 for part in parts) < WIDTH - 0.1:
            return columns
    return 1


def _plain_mark(label: str) -> Line2D:
    """A mark of no line's colour, for the legend."""
    return Line2D([], [], ls="none", marker="v" if label == ZERO else "^", ms=4, mew=0.4,
                  mfc="white" if label == BEYOND else "0.75", mec="black", label=label)  # fmt: skip
