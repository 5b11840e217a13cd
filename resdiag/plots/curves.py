"""Training curves: loss, error, learning rate and gradient norm over steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resdiag.plots.lazy import canvas, np
from resdiag.plots.plotkind import PlotKind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from resdiag.plots.view import Record, View

_CROWDED = 500  # steps from which the noise of single batches covers the lines
_BATCH = ("#0072B2", "o")
_TRAIN = ("#0072B2", "s", (0, (5, 1.5)))
_TEST = ("#D55E00", "X")
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
    look, label = (canvas.Look(*_BATCH), "training batch") if view.single else (None, "")
    canvas.trace_steps(axes, view, "loss", log=log, look=look, label=label, light=window > 1)
    if window > 1:
        smooth = f"mean of {window} batches" if view.single else ""
        canvas.trace_running_mean(
            axes,
            view,
            "loss",
            window,
            log=log,
            look=canvas.Look(*_TRAIN) if view.single else None,
            label=smooth,
        )
    if view.single:
        canvas.trace_steps(axes, view, "test_loss", log=log, look=canvas.Look(*_TEST), label="test")
    thick = f" (thin: batch, thick: mean of {window})" if window > 1 and not view.single else ""
    canvas.head_panel(axes, f"loss{thick}", "cross-entropy (nat)")
    canvas.finish_steps(axes, view, log=log)
    for classes in sorted({count_classes(record) for record in view.records} - {0}):
        level = float(np.log(classes))
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, level * 0.9), max(high, level * 1.15))
        canvas.guide(axes, level, f"ln {classes}: guessing")
    canvas.mark_breakdown(axes, view, words=True)


def _draw_error(axes: Axes, view: View) -> None:
    if view.single:
        canvas.trace_steps(
            axes, view, "error", look=canvas.Look(*_BATCH), light=True, label="training batch"
        )
        canvas.trace_steps(
            axes,
            view,
            "train_error",
            look=canvas.Look(*_TRAIN),
            label="training, mean of the epoch",
        )
        canvas.trace_steps(axes, view, "test_error", look=canvas.Look(*_TEST), label="test")
    else:
        canvas.trace_steps(axes, view, "error", light=True)
        canvas.trace_steps(axes, view, "test_error")
    thin = "" if view.single else "thin: training batch, thick: test"
    canvas.head_panel(axes, f"error ({thin})" if thin else "error", "share of the samples")
    canvas.finish_steps(axes, view)
    axes.set_ylim(-0.03, 1.05)
    canvas.mark_breakdown(axes, view)


def _draw_plain(
    axes: Axes, view: View, column: str, title: str, formula: str, *, log: bool
) -> None:
    canvas.trace_steps(
        axes, view, column, log=log, look=canvas.Look(*_BATCH) if view.single else None,
        label="training batch" if view.single else "",
    )  # fmt: skip
    canvas.head_panel(axes, title, formula)
    canvas.finish_steps(axes, view, log=log)
    if column == "lr" and axes.lines:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
        canvas.finish_scale(axes, log=False) if axes.get_ylim()[1] <= 0 else None
    canvas.mark_breakdown(axes, view)


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


def count_classes(record: Record) -> int:
    """Number of classes of the run's data, 0 if it is not known."""
    classes = record.run.data.get("classes")
    if isinstance(classes, int):
        return classes
    if isinstance(classes, list | tuple):
        return len(classes)
    name = str(record.run.data.get("name", ""))
    if name.startswith("cifar100"):
        return 100
    return 10 if name.startswith(("cifar10", "digits", "fashion")) else 0


KIND = PlotKind(
    name="curves",
    title="Training curves",
    question="Does the network learn, stall or diverge?",
    reading=(
        "a loss of ln K is that of random guessing. If the loss jumps in the first steps and "
        "returns to ln K, the network has lost its features; the gradient norm shows whether the "
        "gradient is lost too."
    ),
    needs=("loss", "error", "lr", "grad_norm", "train_error", "test_error", "test_loss"),
    draw=draw,
    axis="step",
)
