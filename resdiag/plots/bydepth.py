"""Error by depth: does a deeper network of the same variant learn better or worse."""

import re

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resdiag.plots import canvas
from resdiag.plots.style import Look
from resdiag.plots.view import Record, Series, View

_PANELS = (("test_error", "test error"), ("train_error", "training error of the last epoch"))


def draw(view: View) -> Figure:
    """Last test and training error against depth: median over seeds, bars from least to most."""
    panels = [entry for entry in _PANELS if not _errors(view, entry[0]).empty or _broke(view)]
    if not panels:
        canvas.refuse(view, "no error was evaluated")
    figure, body = canvas.open_sheet(
        view, _statement(view), height=3.0, shown="last evaluated step"
    )
    names = list(dict.fromkeys(map(_name, view.series)))
    looks = _looks(view, names)
    places = body.subplots(1, len(panels), squeeze=False)[0]
    for axes, (column, title) in zip(places, panels, strict=True):
        _draw_errors(axes, view, column, looks)
        _mark_broken(axes, view, looks)
        axes.set(xlabel="depth", xticks=sorted({_depth(record) for record in view.records}))
        canvas.head_panel(axes, title, "share of the samples")
        canvas.finish_scale(axes, log=False, floor=0.0)
    canvas.share_scale(places)
    canvas.legend(body, extra=[
        canvas.Line2D([], [], color=look.colour, ls=look.line, marker=look.marker, label=name)
        for name, look in looks.items()
    ])  # fmt: skip
    return figure


def _draw_errors(axes: Axes, view: View, column: str, looks: dict[str, Look]) -> None:
    frame = _errors(view, column)
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


def _errors(view: View, column: str) -> pd.DataFrame:
    """The last known value of each run: line, depth, error."""
    rows = [
        (_name(series), _depth(record), _last(record, column))
        for series in view.series
        for record in series.records
    ]
    return pd.DataFrame(rows, columns=["line", "depth", "error"]).dropna()


def _broke(view: View) -> bool:
    return any(canvas.first_breakdown(record) is not None for record in view.records)


def _statement(view: View) -> str:
    """Whether depth helps: the median error at the least and at the greatest depth."""
    frame = _errors(view, "test_error")
    words = []
    for name, lines in frame.groupby("line", sort=False):
        medians = lines.groupby("depth")["error"].median()
        low, high = float(medians.iloc[0]), float(medians.iloc[-1])
        if len(medians) == 1:
            words.append(f"{name} {100 * low:.3g} %")
            continue
        if high == low:
            words.append(f"{name} {100 * low:.3g} % at every depth")
            continue
        verb = "rises" if high > low else "falls"
        first, last = (f"at depth {depth}" for depth in (medians.index[0], medians.index[-1]))
        words.append(f"{name} {verb} from {100 * low:.3g} % {first} to {100 * high:.3g} % {last}")
    if not words:
        return "No test error is known: every run became non-finite"
    return (
        f"Test error: {'; '.join(words)}"
        if len(words) <= 3
        else (
            f"Test error by depth of {len(words)} lines: {100 * frame['error'].min():.3g} to "
            f"{100 * frame['error'].max():.3g} %"
        )
    )


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
    looks = canvas.variant_looks([variants[name] for name in names])
    return dict(zip(names, looks, strict=True))
