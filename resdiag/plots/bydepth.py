"""Error by depth: does a deeper network of the same variant learn better or worse."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from resdiag.plots.lazy import canvas, np, pd, sns
from resdiag.plots.plotkind import PlotKind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from resdiag.plots.style import Look
    from resdiag.plots.view import Record, Series, View

_PANELS = (("test_error", "test error"), ("train_error", "training error of the last epoch"))


def draw(view: View) -> Figure:
    """Last test and training error against depth: median over seeds, bars from least to most."""
    figure, body = canvas.open_sheet(
        view, f"Error by depth: {canvas.subject(view)}", height=3.0, shown="last evaluated step"
    )
    names = list(dict.fromkeys(map(_name, view.series)))
    looks = _looks(view, names)
    panels = body.subplots(1, 2, sharey=True)
    for axes, (column, title) in zip(panels, _PANELS, strict=True):
        _draw_errors(axes, view, column, looks)
        _mark_broken(axes, view, looks)
        axes.set(xlabel="depth", xticks=sorted({_depth(record) for record in view.records}))
        canvas.head_panel(axes, title, "share of the samples")
        canvas.finish_scale(axes, log=False, floor=0.0)
    canvas.legend(body, extra=[
        canvas.Line2D([], [], color=look.colour, ls=look.line, marker=look.marker, label=name)
        for name, look in looks.items()
    ])  # fmt: skip
    return figure


def _draw_errors(axes: Axes, view: View, column: str, looks: dict[str, Look]) -> None:
    rows = [
        (_name(series), _depth(record), _last(record, column))
        for series in view.series
        for record in series.records
    ]
    frame = pd.DataFrame(rows, columns=["line", "depth", "error"]).dropna()
    if frame.empty:
        return
    sns.lineplot(
        frame, x="depth", y="error", hue="line", style="line", hue_order=list(looks),
        style_order=list(looks), palette={name: look.colour for name, look in looks.items()},
        markers={name: look.marker for name, look in looks.items()},
        dashes={n: "" if isinstance(k.line, str) else k.line[1] for n, k in looks.items()},
        estimator="median", errorbar=("pi", 100), err_style="bars", markersize=5,
        markeredgewidth=0, legend=False, ax=axes,
    )  # fmt: skip


def _mark_broken(axes: Axes, view: View, looks: dict[str, Look]) -> None:
    """A triangle on the top edge for a run that became non-finite."""
    for series in view.series:
        look = looks[_name(series)]
        broken = [_depth(r) for r in series.records if canvas.first_breakdown(r) is not None]
        if broken:
            axes.plot(
                broken, np.full(len(broken), 0.95), ls="none", marker="^", ms=5, mew=0.4,
                mfc=look.colour, mec="black", transform=axes.get_xaxis_transform(),
                label=canvas.NONFINITE, gid=canvas.NONFINITE,
            )  # fmt: skip


def _last(record: Record, column: str) -> float:
    known = record.curve[column].to_numpy(dtype=np.float64)
    known = known[np.isfinite(known)]
    return float(known[-1]) if len(known) else float("nan")


def _depth(record: Record) -> int:
    """Weighted layers; blocks of another model."""
    return int(record.run.config.depth) or record.n_blocks


def _name(series: Series) -> str:
    """The words of a line without depth and seeds: what is compared along the depth."""
    words = re.sub(r"\bdepth \d+|\(\d+ seeds\)|#\d+", "", series.label)
    return " ".join(words.split()) or canvas.variant_words(series.records[0].run.config.model)


def _looks(view: View, names: list[str]) -> dict[str, Look]:
    """The look of the variant; lines of one variant differ in their dashes."""
    variants = {_name(series): series.records[0].run.config.model for series in view.series}
    models = [variants[name] for name in names]
    ranks = [models[:place].count(model) for place, model in enumerate(models)]
    return dict(zip(names, canvas.variant_looks(models, ranks), strict=True))


KIND = PlotKind(
    name="depth",
    title="Error by depth",
    question="Does a deeper network of the same variant learn better or worse?",
    reading=(
        "a variant with a falling line gains from depth, one with a rising line degrades. If the "
        "training error rises too, the optimisation fails, not the generalisation. Markers are "
        "medians over seeds, bars show the range."
    ),
    needs=("test_error", "train_error"),
    draw=draw,
    axis="step",
    compares=True,
)
