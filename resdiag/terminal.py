"""How wide what commands print is, and its colours: one rule, and one table of styles.

rich is imported with the first colour, so that plain text does not wait for it.
"""

import os
import sys
import textwrap
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {
    "fault": "bold red",
    "condition": "yellow",
    "undetermined": "cyan",
    "healthy": "bold green",
    "diverged": "magenta",
    "failed": "bold red",
    "stopped": "yellow",
    "stale": "yellow",
    "running": "cyan",
    "done": "green",
    "missing": "dim",
    "label": "bold",
    "note": "dim",
}
"""Style of a word by what it means: kinds of verdicts, states of runs and cells, parts of text.

Only the terminal's own sixteen colours, which people choose so that they can read them.
"""

PIPED, TEXT, LABEL = 120, 100, 10
"""Columns of a table in a pipe, of sentences at most, and of the labels beside those."""


def has_colour(stream: TextIO) -> bool:
    """Whether colour may be written to a stream: to a terminal that has any, and none forbade it.

    NO_COLOR (no-color.org) and TERM=dumb forbid it; FORCE_COLOR takes a pipe for a terminal.
    """
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "") in ("dumb", "unknown"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


def can_redraw(stream: TextIO) -> bool:
    """Whether a bar can be drawn on a stream: it is a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def width_of(stream: TextIO, *, piped: int = PIPED) -> int:
    """Columns of the terminal that a stream is, by COLUMNS first; `piped` where it is none."""
    if not stream.isatty():
        return piped
    given = os.environ.get("COLUMNS", "")
    try:
        return int(given) if given.isdigit() else os.get_terminal_size(stream.fileno()).columns
    except OSError:  # it says that it is a terminal, and the system does not know it
        return 80


def width_of_text() -> int:
    """Columns of sentences on standard output: the terminal's from 60 to 100, and 100 in a pipe."""
    return min(TEXT, max(60, width_of(sys.stdout, piped=TEXT)))


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of at most `width` columns, those behind the first indented; no word is broken.

    A word that is longer, such as a path, has a longer line of its own.
    """
    lines = textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return lines or [""]


def shorten(text: str, width: int) -> str:
    """A text of at most `width` columns, its middle left out if it is longer.

    >>> shorten("normalised_elu_sum d110", 14)
    'normalis...110'
    """
    kept = max(0, width - len("..."))
    return text if len(text) <= width else f"{text[: kept - kept // 3]}...{text[-(kept // 3) :]}"


def beside(
    label: str, lines: Sequence[str], width: int = LABEL, *, colour: bool = False
) -> list[str]:
    """Lines with a label in the first `width` columns.

    >>> beside("Why", ["because", "of that"])
    ['Why       because', '          of that']
    """
    shown = f"{label:{width}}"
    shown = paint(label, "label") + shown[len(label) :] if colour and label else shown
    first = [f"{shown}{line}".rstrip() for line in lines[:1]]
    return first + [f"{'':{width}}{line}".rstrip() for line in lines[1:]]


def paint(text: str, style: str) -> str:
    """A text in one of `STYLES`, by ANSI escape codes."""
    return _codes(style).replace("@", text)


@cache
def _codes(style: str) -> str:
    from rich.color import ColorSystem
    from rich.style import Style

    return Style.parse(STYLES[style]).render("@", color_system=ColorSystem.STANDARD)


def open_console(stream: TextIO, *, piped: int = PIPED) -> "Console":
    """What draws tables and progress on a stream, as wide and as colourful as the stream allows."""
    from rich.console import Console

    colours: Literal["auto"] | None = "auto" if has_colour(stream) else None
    console = Console(file=stream, highlight=False, color_system=colours)
    # rich asks standard input first, and takes 80 columns for a terminal without a cursor
    console.width = width_of(stream, piped=piped)
    return console
