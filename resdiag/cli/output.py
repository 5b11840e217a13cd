"""How commands print."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], as_json: bool) -> None:
    """A table that fits the terminal; with `--json` a list of objects."""
    listed = [list(row) for row in rows]
    if as_json:
        print(json.dumps([dict(zip(header, row, strict=True)) for row in listed]))
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(*header, box=SIMPLE_HEAD, expand=False)
    for row in listed:
        table.add_row(*row)
    open_console().print(table, markup=False)


def open_console(width: int = 250) -> "Console":
    """Standard output for what is drawn; `width` columns where it is no terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = width
    return console


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
    from resdiag.terminal import LABEL, beside, has_colour, width_of_text

    lines = commands(list(texts), width_of_text() - LABEL)
    for line in beside(label, lines, colour=has_colour(sys.stdout)):
        print(line)


def say(line: str) -> None:
    """One line of progress or notice."""
    print(line, file=sys.stderr, flush=True)


def keep_quiet(line: str) -> None:
    """No line at all."""
