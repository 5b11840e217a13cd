"""The progress bar of an examination, on standard error."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from resdiag.terminal import can_redraw, open_console


class Progress(Protocol):
    """Shows how far an examination is."""

    def begin(self, what: str) -> None:
        """An experiment begins."""

    def advance(self) -> None:
        """One pass is done."""


class Silent:
    """Shows nothing."""

    def begin(self, what: str) -> None:
        """Nothing."""

    def advance(self) -> None:
        """Nothing."""


class Bar:
    """A bar of passes; its length is the most that there can be.

    Args:
        most: Passes at most.
    """

    def __init__(self, most: int) -> None:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Rich

        self._rich = Rich(
            TextColumn("{task.description}"), BarColumn(bar_width=20),
            TextColumn("{task.completed} passes"), TimeElapsedColumn(),
            console=open_console(sys.stderr), transient=True,
        )  # fmt: skip
        self._task = self._rich.add_task("examine", total=most)
        self._rich.start()

    def begin(self, what: str) -> None:
        """Name the experiment."""
        self._rich.update(self._task, description=what)

    def advance(self) -> None:
        """Move the bar."""
        self._rich.advance(self._task)

    def close(self) -> None:
        """Take the bar away."""
        self._rich.stop()


@contextmanager
def open_progress(wanted: bool | None, steps: int) -> Iterator[Progress]:
    """A bar if it is wanted, or on a terminal if that is left open.

    Args:
        wanted: True, False or None.
        steps: Of one training on the batch.
    """
    if not (can_redraw(sys.stderr) if wanted is None else wanted):
        yield Silent()
        return
    bar = Bar(4 * steps + 200)
    try:
        yield bar
    finally:
        bar.close()
