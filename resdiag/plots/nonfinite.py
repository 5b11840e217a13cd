"""Where, when and in which direction the numbers of a run became non-finite."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resdiag.diagnose.nonfinite import FirstNonfinite
from resdiag.plots import canvas
from resdiag.plots.view import Floats, Record, View

_AROUND = 12
"""Recorded steps shown before and after the first non-finite value."""
_WAYS = (
    ("forward", "output_nonfinite", "output"),
    ("backward", "grad_nonfinite", "gradient at the output"),
)


def draw(view: View) -> Figure:
    """Maps of the non-finite fraction for one run; for several, when and where each broke."""
    single = view.single
    if single is None:
        return _draw_several(view)
    found = canvas.find_first_nonfinite(single.metrics)
    return _draw_broken(view, single, found) if found else _draw_healthy(view, single)


def _draw_broken(view: View, record: Record, found: FirstNonfinite) -> Figure:
    place = record.place(found.step)
    window = slice(max(0, place - _AROUND), place + _AROUND + 1)
    near = _cut(record, window)
    figure, body = canvas.open_sheet(
        view, _name(record, found), height=4.8,
        shown=f"steps {near.steps[0]} to {near.steps[-1]} around the first non-finite value",
    )  # fmt: skip
    panels = body.subplots(2, 1, sharex=True)
    keys = []
    for axes, (way, metric, what) in zip(panels, _WAYS, strict=True):
        values = near.grid(metric)
        keys += canvas.draw_heat(
            axes, near, values, np.zeros(values.shape, dtype=bool), "non-finite fraction",
            log=False, limits=(0.0, 1.0), palette="OrRd",
        )  # fmt: skip
        canvas.head_panel(axes, f"{way}: non-finite fraction of the {what}")
        if way == found.direction:
            _mark(axes, near, found, place - window.start)
    panels[0].set_xlabel("")
    canvas.legend(body, extra=keys)
    return figure


def _cut(record: Record, window: slice) -> Record:
    """The record with some of its steps."""
    kept = record.metrics["step"].isin(record.steps[window])
    return canvas.Record(record.run, record.metrics[kept], record.curve)


def _mark(axes: Axes, record: Record, found: FirstNonfinite, column: int) -> None:
    """A frame around the first non-finite cell and its name beside it."""
    cell = canvas.Rectangle(
        (column, found.block), 1, 1, fill=False, edgecolor=canvas.ALARM, lw=1.8, zorder=6,
        clip_on=False, label="first non-finite value",
    )  # fmt: skip
    axes.add_patch(cell)
    left = column + 0.5 > len(record.steps) / 2
    high = found.block > record.n_blocks / 2
    axes.annotate(
        f"step {found.step}, block {found.block}, {found.direction} ({found.site})",
        (column + (0 if left else 1), found.block + 0.5), size=7, color="black",
        xytext=(-14 if left else 14, -16 if high else 16), textcoords="offset points",
        ha="right" if left else "left", va="center", zorder=7,
        arrowprops={"arrowstyle": "-", "color": canvas.ALARM, "lw": 1},
        bbox={"facecolor": "white", "edgecolor": canvas.ALARM, "lw": 0.6, "pad": 2},
    )  # fmt: skip


def _draw_healthy(view: View, record: Record) -> Figure:
    """Nothing non-finite: the change of the gradient since the first step instead."""
    change = _change(record)
    finite = np.isfinite(change)
    size = float(np.abs(change[finite]).max()) if finite.any() else 1.0
    worst = np.unravel_index(np.argmax(np.where(finite, np.abs(change), -1)), change.shape)
    block, column = int(worst[0]), int(worst[1])
    title = "Everything is finite"
    if finite.any():
        factor = canvas.size_words(float(10 ** change[block, column]))
        where = f"{record.block_words(block)} at step {record.steps[column]}"
        title += f"; the gradient changes most in {where} (×{factor})"
    figure, body = canvas.open_sheet(
        view,
        title,
        height=2.9,
        shown=f"{len(record.steps)} recorded steps",
        symbols="L H",
    )
    axes = body.subplots()
    limit = max(size, 0.1)
    keys = canvas.draw_heat(
        axes, record, change, np.zeros(change.shape, dtype=bool),
        r"log$_{10}$ of $\|\partial L/\partial H\|$ over its first value", log=False,
        limits=(-limit, limit), palette="PuOr_r",
    )  # fmt: skip
    canvas.head_panel(axes, "gradient at the output, relative to the first recorded step")
    if finite.any():
        for colour, width, label in (("white", 3.0, "_"), ("black", 1.2, "largest change")):
            axes.add_patch(
                canvas.Rectangle(
                    (column, block), 1, 1, fill=False, ec=colour, lw=width, label=label, zorder=6,
                    clip_on=False,
                )
            )  # fmt: skip
    canvas.legend(body, extra=keys)
    return figure


def _change(record: Record) -> Floats:
    """log10 of the gradient at the outputs over its value at the first step."""
    grid = record.grid("grad_output")
    with np.errstate(all="ignore"):
        change: Floats = np.log10(grid / grid[:, :1])
    return np.where(np.isfinite(change), change, np.nan)


def _draw_several(view: View) -> Figure:
    """A row per run: the steps recorded, and where it broke."""
    records = view.records
    found = [canvas.find_first_nonfinite(record.metrics) for record in records]
    broken = sum(first is not None for first in found)
    title = f"{broken} of {len(records)} runs became non-finite"
    title = title if broken else f"All {len(records)} runs stay finite"
    figure, body = canvas.open_sheet(
        view, title,
        height=0.9 + 0.26 * len(records), shown="all recorded steps",
    )  # fmt: skip
    axes = body.subplots()
    looks = [series.look for series in view.series for _ in series.records]
    for row, (record, first) in enumerate(zip(records, found, strict=True)):
        stop = first.step if first else int(record.steps[-1])
        axes.plot(
            [record.steps[0], stop], [row, row], color=looks[row].colour, ls=looks[row].line, lw=2
        )
        text = f"step {stop}: finite to the end"
        if first:
            axes.plot(
                [stop], [row], marker="X", ms=8, mfc=canvas.ALARM, mec="black", mew=0.6, ls="none",
                label="first non-finite value",
            )  # fmt: skip
            where = f"block {first.block} (last: {record.n_blocks - 1})"
            text = f"step {stop}: {where}, {first.direction} ({first.site})"
        axes.annotate(
            text, (stop, row), xytext=(7, 0), textcoords="offset points", size=7, va="center",
            color="black" if first else canvas.GREY,
        )  # fmt: skip
    _finish_rows(axes, records)
    canvas.legend(body)
    return figure


def _finish_rows(axes: Axes, records: list[Record]) -> None:
    last = max(float(record.steps[-1]) for record in records)
    axes.set_xlim(-0.03 * max(last, 1), 1.55 * max(last, 1))  # room for the words
    axes.set_ylim(len(records) - 0.4, -0.6)
    axes.set_yticks(range(len(records)), [record.run.label for record in records])
    axes.set_xlabel("step")
    canvas.whole_ticks(axes)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= last])
    axes.grid(False, axis="y")
    axes.tick_params(labelsize=7)


def _name(record: Record, found: FirstNonfinite) -> str:
    return (
        f"The first non-finite value comes at step {found.step} in "
        f"{record.block_words(found.block)}, on the way {found.direction}"
    )
