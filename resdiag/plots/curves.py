"""Training curves: loss, error, learning rate and gradient norm over steps."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resdiag.diagnose.rundata import count_classes
from resdiag.plots import canvas
from resdiag.plots.view import Record, View

_CROWDED = 500  # steps from which the noise of single batches covers the lines
_BATCH = canvas.Look("#0072B2", "o")
_TRAIN = canvas.Look("#0072B2", "s", (0, (5, 1.5)))
_TEST = canvas.Look("#D55E00", "X")
"""Looks of the lines of a single run."""


def draw(view: View) -> Figure:
    """Loss with ln K, error in training and test, learning rate, gradient norm."""
    steps = max(len(record.curve) for record in view.records)
    figure, body = canvas.open_sheet(
        view, f"Training curves: {canvas.subject(view)}", height=4.5,
        shown=f"all {steps} steps", notes=_breakdowns(view),
    )  # fmt: skip
    panels = body.subplots(2, 2)
    _draw_loss(panels[0, 0], view)
    _draw_error(panels[0, 1], view)
    _draw_plain(panels[1, 0], view, "lr", "learning rate", "lr", log=False)
    _draw_plain(
        panels[1, 1], view, "grad_norm", "gradient norm of all parameters",
        r"$\|\partial L/\partial\theta\|$", log=True,
    )  # fmt: skip
    canvas.legend(body)
    return figure


def _draw_loss(axes: Axes, view: View) -> None:
    losses = np.concatenate([_finite(r, c) for r in view.records for c in ("loss", "test_loss")])
    positive = losses[losses > 0]
    log = bool(positive.size and positive.max() > 30 * np.median(positive))
    log |= bool(positive.size and positive.max() > 20)
    window = _window(view)
    _trace(axes, view, "loss", _BATCH, "training batch", log=log, light=window > 1)
    if window > 1:
        _trace(axes, view, "loss", _TRAIN, f"mean of {window} batches", log=log, window=window)
    if view.single:
        _trace(axes, view, "test_loss", _TEST, "test", log=log)
    thick = f" (thin: batch, thick: mean of {window})" if window > 1 and not view.single else ""
    canvas.head_panel(axes, f"loss{thick}", "cross-entropy (nat)")
    canvas.finish_steps(axes, view, log=log)
    for classes in sorted({count_classes(record.run) or 0 for record in view.records} - {0}):
        level = float(np.log(classes))
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, level * 0.9), max(high, level * 1.15))
        canvas.guide(axes, level, f"ln {classes}: guessing")
    canvas.mark_breakdown(axes, view, words=True)


def _draw_error(axes: Axes, view: View) -> None:
    _trace(axes, view, "error", _BATCH, "training batch", light=True)
    if view.single:
        _trace(axes, view, "train_error", _TRAIN, "training, mean of the epoch")
    _trace(axes, view, "test_error", _TEST, "test")
    thin = "" if view.single else "thin: training batch, thick: test"
    canvas.head_panel(axes, f"error ({thin})" if thin else "error", "share of the samples")
    canvas.finish_steps(axes, view)
    axes.set_ylim(-0.03, 1.05)
    canvas.mark_breakdown(axes, view)


def _draw_plain(
    axes: Axes, view: View, column: str, title: str, formula: str, *, log: bool
) -> None:
    _trace(axes, view, column, _BATCH, "training batch", log=log)
    canvas.head_panel(axes, title, formula)
    canvas.finish_steps(axes, view, log=log)
    if column == "lr" and axes.lines:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
        if axes.get_ylim()[1] <= 0:
            canvas.finish_scale(axes, log=False)
    canvas.mark_breakdown(axes, view)


def _trace(
    axes: Axes, view: View, column: str, look: canvas.Look, label: str, *,
    log: bool = False, light: bool = False, window: int = 0,
) -> None:  # fmt: skip
    """Draw a column; a single run has a line of this look and name, several have their own."""
    canvas.trace_steps(
        axes, view, column, log=log, light=light, window=window,
        look=look if view.single else None, label=label if view.single else "{}",
    )  # fmt: skip


def _window(view: View) -> int:
    """Batches to average where there are too many to tell lines apart; 1 where there are not."""
    longest = max(len(record.curve) for record in view.records)
    return longest // 40 if longest > _CROWDED else 1


def _finite(record: Record, column: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    _, values, broken = canvas.curve_points(record, column)
    return values[~broken]


def _breakdowns(view: View) -> list[str]:
    """When which series broke, in words, if several are compared."""
    if view.single:
        return []
    words = []
    for series in view.series:
        steps = sorted({s for s in map(canvas.first_breakdown, series.records) if s is not None})
        if steps:
            words.append(f"{series.label} from step {', '.join(map(str, steps))}")
    return [f"Dotted vertical lines: non-finite: {'; '.join(words)}."] if words else []
