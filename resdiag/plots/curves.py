"""Training curves: loss, error, learning rate and gradient norm over steps."""

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resdiag.diagnose.rundata import count_classes
from resdiag.plots import canvas
from resdiag.plots.view import Record, View

_CROWDED = 500  # steps from which the noise of single batches covers the lines
_BATCH = canvas.ONE_RUN
_TRAIN = canvas.Look(_BATCH.colour, "s", (0, (5, 1.5)))
_TEST = canvas.Look("#D55E00", "X")
"""Looks of the lines of a single run."""


def draw(view: View) -> Figure:
    """Loss with ln K, error in training and test, learning rate, gradient norm."""
    steps = max(len(record.curve) for record in view.records)
    panels, sentences = _choose(view)
    rows = -(-len(panels) // 2)
    figure, body = canvas.open_sheet(
        view, _statement(view), height=0.4 + 2.05 * rows, symbols="L θ",
        shown=f"all {steps} steps", notes=[*sentences, *_breakdowns(view)],
    )  # fmt: skip
    grid, first = body.add_gridspec(rows, 2), len(panels) % 2  # of an odd number one is wide
    for place, draw_panel in enumerate(panels):
        row, column = divmod(place + first, 2)
        wide = bool(first) and place == 0
        axes = body.add_subplot(grid[0, :] if wide else grid[row, column])
        draw_panel(axes, view)
    canvas.legend(body)
    return figure


def _choose(view: View) -> tuple[list[Callable[[Axes, View], None]], list[str]]:
    """The panels with something to draw, and sentences in place of the others.

    Raises:
        UsageError: There is none.
    """
    known = {name for name in view.kind.needs if any(_has(r, name) for r in view.records)}
    panels: list[Callable[[Axes, View], None]] = []
    if known & {"loss", "test_loss"}:
        panels.append(_draw_loss)
    if known & {"error", "train_error", "test_error"}:
        panels.append(_draw_error)
    sentences = []
    rates = [_finite(record, "lr") for record in view.records]
    values = np.unique(np.concatenate(rates))
    if len(values) > 1 and any(len(np.unique(rate)) > 1 for rate in rates):
        panels.append(_draw_rate)
    elif len(values):
        listed = ", ".join(f"{value:g}" for value in values)
        sentences.append(f"Learning rate: {listed} at every step.")
    if "grad_norm" in known:
        panels.append(_draw_norm)
    if not panels:
        canvas.refuse(view, "no loss, error or gradient norm is known; monitor.step(loss) tells it")
    if not known & {"loss", "test_loss"}:
        sentences.append("Loss: not known; monitor.step(loss) tells it.")
    return panels, sentences


def _has(record: Record, column: str) -> bool:
    """Whether a column has a value to draw, finite or not."""
    values = record.curve[column].to_numpy(dtype=np.float64)
    return bool(np.isfinite(values).any() or np.isinf(values).any())


def _statement(view: View) -> str:
    """What becomes of the loss."""
    broken = [step for step in map(canvas.first_breakdown, view.records) if step is not None]
    if broken and view.single:
        return f"Training breaks: the first non-finite value comes at step {broken[0]}"
    if broken:
        first = min(broken)
        return f"{len(broken)} of {len(view.records)} runs break, the first at step {first}"
    ends = [(_end(record, 0), _end(record, -1)) for record in view.records]
    known = [pair for pair in ends if np.isfinite(pair).all()]
    if not known:
        return "The loss is not known"
    before, after = (float(np.median(side)) for side in zip(*known, strict=True))
    verb = "falls" if after < 0.97 * before else "rises" if after > 1.03 * before else "stays"
    size = canvas.size_words
    change = f"from {size(before)} to {size(after)}" if verb != "stays" else f"at {size(after)}"
    many = "" if view.single else f", median of {len(known)} runs"
    last = max(int(record.curve["step"].max()) for record in view.records) + 1
    return f"The loss {verb} {change} in {last} step{'s' * (last > 1)}{many}"


def _end(record: Record, place: int) -> float:
    """The loss at the beginning or at the end: the mean over a tenth of the steps."""
    losses = _finite(record, "loss")
    share = max(1, len(losses) // 10)
    if not len(losses):
        return float("nan")
    return float((losses[:share] if place == 0 else losses[-share:]).mean())


def _draw_rate(axes: Axes, view: View) -> None:
    _draw_plain(axes, view, "lr", "learning rate", "learning rate", log=False)


def _draw_norm(axes: Axes, view: View) -> None:
    title = f"gradient norm of all parameters{canvas.clipped_words(view)}"
    _draw_plain(axes, view, "grad_norm", title, r"$\|\partial L/\partial\theta\|$", log=True)


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
    known = any(count_classes(record.run) for record in view.records)
    canvas.head_panel(axes, f"loss{thick}", "cross-entropy (nat)" if known else "loss")
    canvas.finish_steps(axes, view, log=log)
    for classes in sorted({count_classes(record.run) or 0 for record in view.records} - {0}):
        level = float(np.log(classes))
        canvas.reach(axes, level * 0.9, level * 1.15)
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
