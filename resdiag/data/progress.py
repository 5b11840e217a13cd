"""A progress bar on standard error, for a person who waits."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

_Item = TypeVar("_Item")
_PATIENCE = 1.0  # seconds before the bar appears


def track(items: Iterable[_Item], what: str, total: int | None = None) -> Iterator[_Item]:
    """Yield the items; draw a bar on a terminal once this has taken a second.

    Args:
        items: What to go through.
        what: Text before the bar, e.g. "decoding".
        total: How many there are, where known.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(what, total=total)
    begin, started = time.monotonic(), False
    try:
        for item in items:
            yield item
            bar.advance(task)
            if not started and time.monotonic() - begin > _PATIENCE:
                bar.start()
                started = True
    finally:
        bar.stop()
