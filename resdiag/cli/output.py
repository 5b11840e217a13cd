"""How commands print."""

import json
import sys
from collections.abc import Iterable, Sequence


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], as_json: bool) -> None:
    """A table that fits the terminal; with `--json` a list of objects."""
    listed = [list(row) for row in rows]
    if as_json:
        print(json.dumps([dict(zip(header, row, strict=True)) for row in listed]))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(*header, box=SIMPLE_HEAD, expand=False)
    for row in listed:
        table.add_row(*row)
    if not console.is_terminal:
        console.width = 250
    console.print(table, markup=False)


def say(line: str) -> None:
    """One line of progress or notice."""
    print(line, file=sys.stderr, flush=True)


def keep_quiet(line: str) -> None:
    """No line at all."""
