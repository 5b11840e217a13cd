"""What a person sees of a running training, on standard error: a bar, or a line now and then."""

import sys
import time
from dataclasses import dataclass
from typing import Protocol

_LINE_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a training is.

    Attributes:
        done: Steps done.
        loss: Loss of the last step.
        error: Error of the last batch, a fraction.
        images_per_s: Speed since the last report.
        worst: The block that changed most, in words; "" before anything is recorded.
    """

    done: int
    loss: float
    error: float
    images_per_s: float
    worst: str

    def __str__(self) -> str:
        text = f"loss {self.loss:.3g}  error {self.error:.0%}  {self.images_per_s:.0f} images/s"
        return f"{text}  {self.worst}" if self.worst else text


class Display(Protocol):
    """Shows a training's progress."""

    def show(self, progress: Progress) -> None:
        """Show new progress."""

    def close(self) -> None:
        """End the display."""


class Silent:
    """Shows nothing."""

    def show(self, progress: Progress) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Lines:
    """One plain line every ten seconds, for logs."""

    def __init__(self, title: str, steps: int) -> None:
        self._title, self._steps = title, steps
        self._last = time.monotonic()

    def show(self, progress: Progress) -> None:
        """Print a line if the last one is old enough, or if the training is over."""
        if time.monotonic() - self._last < _LINE_EVERY_S and progress.done < self._steps:
            return
        self._last = time.monotonic()
        line = f"{self._title}  step {progress.done}/{self._steps}  {progress}"
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is left to end."""


class Bar:
    """A progress bar on a terminal."""

    def __init__(self, title: str, steps: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            Remaining(),
            TextColumn("{task.fields[progress]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(title, total=steps, completed=done, progress="")
        self._bar.start()

    def show(self, progress: Progress) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=progress.done, progress=str(progress))

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()


def open_display(title: str, steps: int, done: int, *, quiet: bool) -> Display:
    """The display that fits: none if quiet, a bar on a terminal, lines elsewhere."""
    if quiet:
        return Silent()
    return Bar(title, steps, done) if sys.stderr.isatty() else Lines(title, steps)
