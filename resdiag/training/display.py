"""What a person sees of a running training, on standard error: a bar, or a line now and then."""

import sys
import time
from dataclasses import dataclass
from typing import Protocol

from resdiag.terminal import can_redraw, open_console, shorten, width_of

LINE_EVERY_S = 10.0
_NARROW, _SHORT, _LONG = 80, 14, 28


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
        return self.fit(sys.maxsize)

    def fit(self, columns: int) -> str:
        """What has room in so many columns: the speed goes first, then the block, then the error.

        >>> at = Progress(done=1, loss=2.3, error=0.5, images_per_s=90, worst="block 3: dead")
        >>> at.fit(50)
        'loss 2.3  error 50%  90 images/s  block 3: dead'
        >>> at.fit(40), at.fit(20)
        ('loss 2.3  error 50%  block 3: dead', 'loss 2.3  error 50%')
        """
        loss, error = f"loss {self.loss:.3g}", f"error {self.error:.0%}"
        speed = f"{self.images_per_s:.0f} images/s"
        worst = [self.worst] if self.worst else []
        for parts in ([loss, error, speed, *worst], [loss, error, *worst], [loss, error], [loss]):
            if len(text := "  ".join(parts)) <= columns:
                return text
        return ""


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
        if time.monotonic() - self._last < LINE_EVERY_S and progress.done < self._steps:
            return
        self._last = time.monotonic()
        line = f"{self._title}  step {progress.done}/{self._steps}  {progress}"
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is left to end."""


class Bar:
    """A progress bar on a terminal: title, bar, step and time left, then what has room."""

    def __init__(self, title: str, steps: int, done: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self._console = open_console(sys.stderr)
        narrow = self._console.width < _NARROW
        title = shorten(title, _SHORT if narrow else _LONG)
        bar = _SHORT if narrow else 20
        # the step as M/N, the time as 0:00:00, and a blank between any two
        self._taken = len(title) + bar + 2 * len(str(steps)) + 1 + len("0:00:00") + 4
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=bar),
            MofNCompleteColumn(),
            Remaining(),
            TextColumn("{task.fields[progress]}"),
            console=self._console,
            transient=True,
        )
        self._task = self.bar.add_task(title, total=steps, completed=done, progress="")
        self.bar.start()

    def show(self, progress: Progress) -> None:
        """Move the bar; the terminal may have got another width."""
        self._console.width = width_of(sys.stderr)
        said = progress.fit(self._console.width - self._taken)
        self.bar.update(self._task, completed=progress.done, progress=said)

    def close(self) -> None:
        """Take the bar away."""
        self.bar.stop()


def open_display(title: str, steps: int, done: int, *, quiet: bool) -> Display:
    """The display that fits: none if quiet, a bar on a terminal, lines elsewhere."""
    if quiet:
        return Silent()
    return Bar(title, steps, done) if can_redraw(sys.stderr) else Lines(title, steps)
