"""What is shown of a study that runs: a live table of its cells, or a line now and then."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from resdiag.errors import ResdiagError
from resdiag.runs.commit import COMMIT, Commit
from resdiag.study.estimate import Estimate, estimate
from resdiag.study.ledger import ENDED, Entry, count_states, read_ledger
from resdiag.study.study import Study
from resdiag.terminal import PIPED, STYLES, can_redraw, open_console
from resdiag.training.display import LINE_EVERY_S

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from resdiag.study.engines.job import Job

_LINE_EVERY_S = 30.0
BARS = "▁▂▃▄▅▆▇█"
BROKEN = "×"
_UNKNOWN = "·"
_WIDEST = 27  # half the blocks of 110 layers, a third of 80 columns
_ORDER = ("running", "failed", "stale", "diverged", "done", "missing")
_SPAN = len("  10.0")
_STRIP = "gradient norm by block, and its span in decades"
_DISPENSABLE = ("error", "loss", "left")


@contextlib.contextmanager
def showing_progress(job: "Job", *, quiet: bool) -> "Iterator[Job]":
    """A job that shows its progress while entered: nothing if quiet, a table on a terminal."""
    if quiet:
        yield job
    elif can_redraw(sys.stderr):
        from rich.live import Live

        console = open_console(sys.stderr)
        with Live(console=console, auto_refresh=False, transient=True) as live:

            def draw() -> None:
                entries = read_ledger(job.study, job.runs)
                live.update(
                    draw_study(job.study, entries, console.height, console.width), refresh=True
                )

            say = partial(console.print, markup=False)
            yield replace(job, look=at_most_every(1.0, draw), say=say)
    else:

        def tell() -> None:
            job.say(sum_up(job.study, read_ledger(job.study, job.runs)))

        yield replace(job, look=at_most_every(LINE_EVERY_S, tell))


def at_most_every(seconds: float, show: Callable[[], None]) -> Callable[[], None]:
    """What calls `show` if its last call is so long ago."""
    last = -math.inf

    def look() -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            show()

    return look


def draw_study(study: Study, entries: Sequence[Entry], height: int, width: int = PIPED) -> "Group":
    """One frame: what is asked, where it stands, and as many cells as `height` lines hold.

    Where the columns do not fit into `width`, the error is left out first, then the loss, then the
    time left.
    """
    from rich.console import Group
    from rich.text import Text

    shown = sorted(entries, key=lambda entry: _ORDER.index(entry.state))[: max(3, height - 7)]
    hidden = len(entries) - len(shown)
    parts = [Text(study.file.question, style="bold"), Text(sum_up(study, entries))]
    more = [Text(f"... and {hidden} more cells", style="dim")] if hidden else []
    return Group(*parts, draw_table(shown, width), *more)


def draw_table(entries: Sequence[Entry], width: int) -> "Table":
    """The cells of a study; columns that have no room are left out."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    rows = list(map(_cells, entries))
    names, room = _choose_columns(rows, width)
    table = Table(box=SIMPLE_HEAD, expand=False, show_edge=False, pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    table.add_column(_STRIP, max_width=room, overflow="fold")
    for entry, row in zip(entries, rows, strict=True):
        styles = {"state": STYLES[entry.state]}
        last = entry.message if entry.state == "failed" else _strip_of(entry, room)
        table.add_row(*(Text(row[name], styles.get(name, "")) for name in names), Text(last))
    return table


def _cells(entry: Entry) -> dict[str, str]:
    """The cells of a row by the names of their columns, but for the last."""
    progress = entry.progress if entry.step else {}
    left = progress.get("eta_s") if entry.state == "running" else None
    return {
        "cell": entry.id,
        "state": entry.state,
        "steps": f"{entry.step}/{entry.steps or '?'}" if entry.step else "",
        "loss": _number(progress.get("loss"), ".3g"),
        "error": _number(progress.get("error"), ".0%"),
        "left": describe_time(left) if isinstance(left, int | float) else "",
    }


def _choose_columns(rows: Sequence[dict[str, str]], width: int) -> tuple[list[str], int]:
    """The names of the columns for which there is room beside the last, and the room for that."""
    names = list(rows[0]) if rows else ["cell", "state", "steps"]
    needed = {name: max([len(name), *(len(row[name]) for row in rows)]) + 2 for name in names}
    for name in _DISPENSABLE:
        if sum(needed[name] for name in names) + _WIDEST + _SPAN > width and name in names:
            names.remove(name)
    return names, max(_SPAN + 2, width - sum(needed[name] for name in names))


def sum_up(study: Study, entries: Sequence[Entry]) -> str:
    """One line: cells by state, and what is left."""
    counts = ", ".join(f"{number} {state}" for state, number in count_states(entries).items())
    line = f"{study.name}: {len(entries)} cells: {counts}"
    if all(entry.state in ENDED for entry in entries):
        return line
    left = estimate(study.cells, entries)
    return f"{line}; left: {describe(left)}"


def describe(left: Estimate) -> str:
    """An estimate in words, with where it is from.

    >>> describe(Estimate(7300.0, 2.5e6, "one core of a 2025 server", 0))
    'about 2.0 h in one slot, 2.5 MB (one core of a 2025 server)'
    """
    if left.seconds is None or left.bytes is None:
        return f"unknown: {left.unknown} cells with data whose size is not known here"
    words = f"about {describe_time(left.seconds)} in one slot, {_describe_bytes(left.bytes)}"
    more = f", without {left.unknown} cells of unknown size" if left.unknown else ""
    return f"{words} ({left.basis}{more})"


def _describe_bytes(count: float) -> str:
    """A size with its unit.

    >>> _describe_bytes(11.9e6), _describe_bytes(2.16e9)
    ('11.9 MB', '2.2 GB')
    """
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def describe_time(seconds: float) -> str:
    """A duration with two digits.

    >>> describe_time(42), describe_time(300), describe_time(7300), describe_time(200_000)
    ('42 s', '5.0 min', '2.0 h', '2.3 d')
    """
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.{0 if unit == 1 else 1}f} {name}"
    return f"{seconds / 86_400:.1f} d"


def draw_strip(
    norms: Sequence[float], columns: int = _WIDEST + _SPAN, widest: int = _WIDEST
) -> str:
    """Norms by block as bars on a logarithmic scale from the smallest to the largest.

    Blocks beyond `widest`, or beyond what has room in so many columns, share a bar, which shows
    their largest; "×" is not finite, "·" unknown. Behind the bars stands their span in decades.

    >>> draw_strip([1.0, 10.0, 100.0, float("inf"), float("nan")])
    '▁▅█×·  2.0'
    """
    groups = _share(norms, min(widest, columns - _SPAN))
    logs = [math.log10(value) for value in groups if 0 < value < math.inf]
    low, high = min(logs, default=0.0), max(logs, default=0.0)
    bars = "".join(_bar(value, low, high) for value in groups)
    return f"{bars}  {high - low:.1f}" if logs else bars


def _bar(value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return _UNKNOWN
    if math.isinf(value):
        return BROKEN
    share = (math.log10(value) - low) / (high - low) if value > 0 and high > low else 0.0
    return BARS[min(7, math.floor(share * 7 + 0.5 + 1e-9))]


def _share(norms: Sequence[float], most: int) -> list[float]:
    """At most so many groups of neighbours, each its largest; a NaN only hides in company."""
    size = -(-len(norms) // most) if norms else 1
    groups = [norms[i : i + size] for i in range(0, len(norms), size)]
    return [max((v for v in group if not math.isnan(v)), default=math.nan) for group in groups]


def _strip_of(entry: Entry, columns: int) -> str:
    """The strip of the last recorded step that is committed and has a gradient."""
    if entry.run is None:
        return ""
    try:
        commit = Commit.read(entry.run / COMMIT)
        *_, part = commit.parts("metrics") or [""]
        norms = _last_norms(entry.run, part, commit.files[part]) if part else ()
        return draw_strip(norms, columns) if part else ""
    except (ResdiagError, OSError, ValueError, KeyError):  # replaced while we read: the next frame
        return ""


@lru_cache(maxsize=1024)
def _last_norms(run: Path, part: str, sha256: str) -> tuple[float, ...]:
    """Gradient norm at each block's output, from the last step of a segment that has any."""
    import pyarrow.parquet as pq

    columns = pq.read_table(run / part, columns=["step", "block", "grad_output"]).to_pydict()
    values = [math.nan if value is None else float(value) for value in columns["grad_output"]]
    rows = list(zip(columns["step"], columns["block"], values, strict=True))
    last = max((step for step, _, value in rows if not math.isnan(value)), default=-1)
    return tuple(value for step, _, value in sorted(rows, key=lambda r: r[1]) if step == last)


def _number(value: object, form: str) -> str:
    """A number of a progress file, where infinity is a word."""
    if isinstance(value, int | float) and math.isfinite(value):
        return format(value, form)
    return str(value) if value in ("inf", "-inf") else ""
