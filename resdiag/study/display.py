"""What the driver of a study shows on standard error: a live table, or a line now and then."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from resdiag.study.engines.job import Job
from resdiag.study.ledger import read_ledger
from resdiag.study.live import draw_study, sum_up

_LINE_EVERY_S = 30.0


@contextlib.contextmanager
def watching(job: Job, *, quiet: bool) -> Iterator[Job]:
    """A job that shows its progress while entered: nothing if quiet, a table on a terminal."""
    if quiet:
        yield job
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True)
        with Live(console=console, auto_refresh=False, transient=True) as live:

            def draw() -> None:
                live.update(draw_study(job.study, job.runs, console.height), refresh=True)

            yield replace(job, look=draw, say=lambda line: console.print(line, markup=False))
    else:
        yield replace(job, look=_lines(job))


def _lines(job: Job) -> Callable[[], None]:
    """A line every half minute, for logs."""
    last = -math.inf

    def look() -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_EVERY_S:
            last = time.monotonic()
            job.say(sum_up(job.study, read_ledger(job.study, job.runs)))

    return look
