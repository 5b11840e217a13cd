"""Bias shift: are the activations centred, by block, and does the head's mean drift over steps."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resdiag.plots import canvas
from resdiag.plots.findings import for_words, largest, when_words
from resdiag.plots.view import Trace, View

_PANELS = tuple(
    canvas.Panel(f"{site}_{name}", f"{site}: {words}", "")
    for name, words in (("mean", "mean"), ("bias", "bias shift B2"))
    for site in ("output", "branch")
)
_HEADS = (
    ("head_mean", "B1, the mean, of the pooled features"),
    ("head_bias", "B2 of the pooled features"),
)
_WORDS = (
    "B1: mean over channels. B2: root mean square of the channel means over that of the spread."
)
_CENTRED = 0.5
"""B2 up to which the mean is called small."""


def draw(view: View) -> Figure:
    """Signed mean with its 10-90 % band and B2 of output and branch; mean and B2 at the head."""
    traces = _ends(view.history()) if view.single else view.traces(view.moments()[-1])
    panels, sentences = canvas.choose_panels(view, traces, _PANELS)
    heads = [entry for entry in _HEADS if _has_values(view, entry[0])]
    rows = len({panel.metric.rpartition("_")[2] for panel in panels})
    quantiles = ["Bands of the mean: 10 to 90 % quantiles of the channel means, last finite step."]
    figure, body = canvas.open_sheet(
        view, _statement(view, traces), height=0.4 + 1.95 * rows + 1.6 * bool(heads),
        shown=view.steps_shown(traces), symbols="c",
        notes=[_WORDS, *(quantiles if _shows_quantiles(traces) else []), *sentences],
    )  # fmt: skip
    grid = body.add_gridspec(rows + bool(heads), 2)
    columns = []
    for column, site in enumerate(("output", "branch")):
        here = [panel for panel in panels if panel.metric.startswith(site)]
        columns.append([body.add_subplot(grid[row, column]) for row in range(len(here))])
        for axes, panel in zip(columns[-1], here, strict=True):
            draw_one = _draw_mean if panel.metric.endswith("mean") else _draw_bias
            draw_one(axes, view, traces, site)
    canvas.share_blocks(columns)
    for place, (name, title) in enumerate(heads):
        _draw_head(body.add_subplot(grid[rows, place]), view, name, title)
    canvas.legend(body)
    return figure


def _has_values(view: View, column: str) -> bool:
    """Whether a column of the curve has anything to draw."""
    return any(len(canvas.curve_points(record, column)[0]) for record in view.records)


def _shows_quantiles(traces: Sequence[Trace]) -> bool:
    """Not where bands are those over seeds."""
    return all(len(trace.records) == 1 for trace in traces)


def _statement(view: View, traces: Sequence[Trace]) -> str:
    """Where the mean is largest against the spread around it."""
    told = [(trace, place) for trace in traces if (place := largest(trace, "output_bias"))]
    if view.single:
        told = [pair for pair in told if pair[0].is_finite][-1:] or told[:1]
    if not told:
        return "The bias shift is not finite"
    trace, (block, value) = max(told, key=lambda pair: pair[1][1])
    who = "" if len(view.series) == 1 else for_words(trace.label)
    size = canvas.size_words(value)
    word = "stay centred: mean at most" if value < _CENTRED else "are off centre: mean"
    where = trace.records[0].block_words(block)
    when = when_words([trace]).removeprefix(", at")
    return f"Activations {word} {size} times the spread ({where}{who}{when and ','}{when})"


def _ends(traces: Sequence[Trace]) -> list[Trace]:
    """The first line and the last that is finite, and the very last: bands stay apart."""
    return [traces[0], *traces[-2:]] if len(traces) > 3 else list(traces)


def _draw_mean(axes: Axes, view: View, traces: Sequence[Trace], site: str) -> None:
    """Signed mean; the band is that of the last finite line, or of every line of a comparison."""
    canvas.trace_blocks(axes, view, traces, f"{site}_mean")
    finite = [t for t in traces if np.isfinite(t.values(f"{site}_mean")).any()]
    banded = [trace for trace in finite if trace.is_finite] or finite
    banded = banded[-1:] if view.single else banded[:4]
    for trace in banded if _shows_quantiles(traces) else ():
        low, high = (np.median(trace.values(f"{site}_mean_q{q}"), axis=0) for q in (10, 90))
        x = trace.records[0].positions(view.normalised)
        known = np.isfinite(low) & np.isfinite(high)
        axes.fill_between(x, low, high, where=known, color=trace.look.colour, alpha=0.16, lw=0)
    canvas.head_panel(axes, f"{site}: mean and band of channels", r"mean$_c\,\mu_c$", stages=True)
    canvas.finish_blocks(axes, view)
    _compress(axes)
    canvas.guide(axes, 0.0, "")


def _draw_bias(axes: Axes, view: View, traces: Sequence[Trace], site: str) -> None:
    canvas.trace_blocks(axes, view, traces, f"{site}_bias")
    canvas.finish_blocks(axes, view, floor=0.0)
    y, words = canvas.plotted(axes), ""
    if y.size and y.max() > 0.7:
        canvas.guide(axes, 1.0, "")
        words = " (dotted: 1)"
    formula = r"rms$_c\,\mu_c$ / rms$_c\,\sigma_c$"
    canvas.head_panel(axes, f"{site}: bias shift B2{words}", formula, stages=True)


def _draw_head(axes: Axes, view: View, column: str, title: str) -> None:
    # a single run's line needs no name: the title has it
    look = canvas.ONE_RUN if view.single else None
    canvas.trace_steps(axes, view, column, look=look, label="_{}" if view.single else "")
    canvas.head_panel(axes, title, "B1" if column == "head_mean" else "B2")
    canvas.finish_steps(axes, view)
    _compress(axes)


def _compress(axes: Axes) -> None:
    """A symmetric log axis where a linear one would hide most values."""
    y = canvas.plotted(axes)
    if not canvas.huge(y):
        return
    size = np.log10(np.abs(y[y != 0]))
    low = int(np.floor(max(size.min(), size.max() - 12)))
    high = int(np.ceil(size.max()))
    axes.set_yscale("symlog", linthresh=10.0**low)
    every = max(1, (high - low) // 3)
    powers = [10.0**power for power in range(low + every, high + 1, every)]
    signs = [sign for sign in (-1, 1) if (sign * y > 0).any()]
    axes.set_yticks(sorted([0.0, *(sign * power for sign in signs for power in powers)]))
    axes.minorticks_off()
    # room for marks on the top edge
    top = 10.0 ** (high + 0.35 * (high - low))
    axes.set_ylim(-(10.0 ** (high + 0.5)) if -1 in signs else -(10.0**low), top)
