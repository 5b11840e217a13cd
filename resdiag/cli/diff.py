"""`resdiag diff`: two runs that should agree, and where they part first."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resdiag.cli.options import Json
from resdiag.cli.output import print_table, say
from resdiag.errors import UsageError

if TYPE_CHECKING:
    from resdiag.agreement.result import Agreement, Row

_MOST_ROWS = 12
_WIDEST = 100
_HEADER = ("metric", "direction", "largest", "at", "repeat", "first beyond")


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="Run folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Run folder that should agree with A.")],
    repeat: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="A2",
            help="Run that repeats A; its differences from A are the tolerance; repeatable.",
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Relative difference to allow; default: what rounding explains."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.html", help="Also write a page.")
    ] = None,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 if the runs part.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Find where two runs that should agree part for the first time.

    It names step, block, and direction of the pass. For the same code on two machines, eager and
    compiled, before and after a refactoring, or with two versions of a library.
    """
    if out is not None and out.suffix not in (".html", ".htm"):
        raise UsageError(f"--out {out} must end in .html", f"--out {out.with_suffix('.html')}")
    from resdiag.agreement.diff import diff as compare

    found = compare(a, b, repeat=repeat, tolerance=tolerance)
    if as_json:
        print(json.dumps({"schema": 1, **found.to_dict()}))
    else:
        _print(found)
    if out is not None:
        from resdiag.report.diffpage import write_diff_page

        write_diff_page(found, out)
        say(str(out))
    return int(exit_code and not found.agree)


def _print(found: "Agreement") -> None:
    print(found.render(min(shutil.get_terminal_size((_WIDEST, 24)).columns, _WIDEST)))
    rows = found.shown_rows(_MOST_ROWS)
    if rows:
        print_table(_HEADER, map(_cells, rows), as_json=False)
    beyond = sum(row.first is not None for row in found.rows)
    if beyond > len(rows):
        print(f"{beyond - len(rows)} more metrics differ by more than the tolerance: --json")


def _cells(row: "Row") -> tuple[str, ...]:
    noise = "" if row.noise is None else f"{row.noise:.1e}"
    first = "" if row.first is None else _at(row.first.step, row.first.block)
    return (
        row.metric, row.direction, f"{row.largest:.1e}", _at(row.step, row.block), noise, first,
    )  # fmt: skip


def _at(step: int, block: int | None) -> str:
    return f"step {step}" + ("" if block is None else f", block {block}")
