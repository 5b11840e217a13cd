"""How commands print."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resdiag.terminal import (
    LABEL,
    STYLES,
    beside,
    has_colour,
    open_console,
    paint,
    width_of,
    width_of_text,
    wrap,
)

if TYPE_CHECKING:
    from rich.console import Console

_GAP = 2
_STATES = ("state", "status")


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], as_json: bool) -> None:
    """A table that fits the terminal; with `--json` a list of objects.

    No cell is cut and no word is broken. Where the columns would be too narrow for that, or for
    reading, every row is printed as a paragraph. States and verdicts have their colours.
    """
    listed = [list(row) for row in rows]
    if as_json:
        print(json.dumps([dict(zip(header, row, strict=True)) for row in listed]))
        return
    console = open_console(sys.stdout)
    widths = _fit(header, listed, console.width)
    if widths is None:
        _print_paragraphs(header, listed, console)
    else:
        _print_columns(header, listed, widths, console)


def _fit(
    header: Sequence[str], rows: Sequence[Sequence[str]], columns: int
) -> tuple[int, ...] | None:
    """Width of each column: as much as its cells need, the same for all that need more.

    None where words would have to be broken, or where paragraphs take fewer lines.
    """
    from rich.cells import cell_len

    cells = list(zip(header, *rows, strict=True))
    needed = [max(map(cell_len, column)) for column in cells]
    words = [max(cell_len(w) for cell in column for w in cell.split() or [""]) for column in cells]
    left = columns - _GAP * (len(header) - 1)
    if sum(words) > left:
        return None
    shared = max(range(left + 1), key=lambda cap: (_total(words, needed, cap) <= left, cap))
    widths = tuple(max(least, min(most, shared)) for least, most in zip(words, needed, strict=True))
    lines = [
        [len(wrap(cell, width)) for cell, width in zip(row, widths, strict=True)] for row in rows
    ]
    room = columns - _label(header)
    below = [[len(wrap(cell, room)) * bool(cell) for cell in row] for row in rows]
    return widths if sum(map(max, lines)) <= sum(map(sum, below)) else None


def _label(header: Sequence[str]) -> int:
    """Width of the names of columns in a paragraph, with the gaps around them."""
    return max(map(len, header)) + 2 * _GAP


def _total(words: Sequence[int], needed: Sequence[int], cap: int) -> int:
    return sum(max(least, min(most, cap)) for least, most in zip(words, needed, strict=True))


def _print_columns(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    widths: Sequence[int],
    console: "Console",
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=SIMPLE_HEAD, expand=False, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for name, width in zip(header, widths, strict=True):
        table.add_column(name, width=width, overflow="fold")
    for row in rows:
        table.add_row(*(Text(c, style_of(n, c)) for n, c in zip(header, row, strict=True)))
    console.print(table)


def _print_paragraphs(
    header: Sequence[str], rows: Sequence[Sequence[str]], console: "Console"
) -> None:
    """The first cell as a heading, the others below it with their names beside them."""
    from rich.text import Text

    width = _label(header)
    for row in rows:
        console.print(Text(row[0], style_of(header[0], row[0]) or "bold"), soft_wrap=True)
        for name, cell in list(zip(header, row, strict=True))[1:]:
            lines = wrap(cell, console.width - width) if cell else []
            for line in beside(name, lines, width - _GAP):
                shown = Text(f"{'':{_GAP}}{line}")
                shown.stylize("dim", 0, width)
                shown.stylize(style_of(name, cell), width)
                console.print(shown, soft_wrap=True)


def style_of(column: str, cell: str) -> str:
    """How rich writes a cell: states and verdicts by what they mean; "" for any other."""
    if column in _STATES:
        return STYLES.get(cell, "")
    if column == "verdict" and cell:
        from resdiag.diagnose.text import kind_of

        return STYLES.get(cell) or STYLES[kind_of(cell)]
    return ""


def coloured(text: str, style: str) -> str:
    """A text for standard output in one of `STYLES`, if there is colour."""
    return paint(text, style) if style in STYLES and has_colour(sys.stdout) else text


def print_files(files: Sequence[Path], as_json: bool, **about: str) -> None:
    """The files one a line; with `--json` one document, which says `about`, too."""
    if as_json:
        print(json.dumps({"schema": 1, **about, "files": [str(path) for path in files]}))
        return
    for path in files:
        print(path)


def print_entry(label: str, texts: Iterable[str]) -> None:
    """Sentences and commands with a label beside them, in the form of the verdict."""
    from resdiag.diagnose.text import commands

    lines = commands(list(texts), width_of_text() - LABEL)
    for line in beside(label, lines, colour=has_colour(sys.stdout)):
        print(line)


def say(line: str) -> None:
    """One line of progress or notice; on a terminal it is wrapped between words."""
    for part in wrap(line, width_of(sys.stderr, piped=sys.maxsize), "  "):
        print(part, file=sys.stderr, flush=True)


def say_loading(quiet: bool = False) -> None:
    """Say that PyTorch is imported, which takes seconds, unless it is there already."""
    if not quiet and "torch" not in sys.modules:
        say("loading PyTorch ...")


def keep_quiet(line: str) -> None:
    """No line at all."""
