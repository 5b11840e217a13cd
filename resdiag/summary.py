"""Summaries that print as a table of text, and show as a table of HTML in a notebook."""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NUMBERS = {
    "grad_output": "gradient",
    "output_second_moment": "E[H^2]",
    "branch_ratio": "|F|/|h|",
    "output_bias": "bias shift",
    "update_ratio": "update",
}
"""The metrics of a block that a summary shows, with their headings."""

_NUMBER = re.compile(r"|-|-?(inf|nan|\d+(\.\d+)?(e[+-]?\d+)?)")
_MOST_ROWS = 40
_ENDS = 16  # rows that are kept at both ends of a longer table
_STYLE = "text-align:left;padding:.15em .7em;white-space:nowrap;font-variant-numeric:tabular-nums"


@dataclass(frozen=True)
class Summary:
    """A title, a table and lines below it; `str()` is text, a notebook shows HTML.

    Attributes:
        title: What it is about, one line.
        header: Headings of the columns.
        rows: Cells; of a long table the middle is left out when it is shown.
        notes: Lines below the table.

    >>> print(Summary("Two blocks", ("block", "name"), [("0", "layer1.0"), ("1", "layer1.1")]))
    Two blocks
      block  name
          0  layer1.0
          1  layer1.1
    """

    title: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        cells = [self.header, *self._shown()] if self.rows else []
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        numeric = [_is_numeric(column) for column in zip(*self.rows, strict=True)]
        lines = [self.title]
        for row in cells:
            padded = [
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, numeric, strict=True)
            ]
            lines.append("  ".join(["", *padded]).rstrip())
        return "\n".join([*lines, *self.notes])

    def _repr_html_(self) -> str:
        """The same for a notebook, with every value escaped."""
        parts = [f"<p><b>{html.escape(self.title)}</b></p>"] if self.title else []
        if self.rows:
            parts.append(f"<table><thead>{_row('th', self.header)}</thead><tbody>")
            parts += [_row("td", cells) for cells in self._shown()]
            parts.append("</tbody></table>")
        parts += [f"<p style='margin:.2em 0'>{html.escape(note)}</p>" for note in self.notes]
        return "<div>" + "".join(parts) + "</div>"

    def _shown(self) -> list[Sequence[str]]:
        """The rows, or those at both ends around one that counts the others."""
        rows = list(self.rows)
        if len(rows) <= _MOST_ROWS:
            return rows
        left_out = f"... {len(rows) - 2 * _ENDS} more"
        gap = ["..."] + [left_out if i == 1 else "" for i in range(1, len(self.header))]
        return [*rows[:_ENDS], gap, *rows[-_ENDS:]]


class Unavailable(list[dict[str, Any]]):
    """Entries `{"metric", "blocks", "reason"}`; shown with one line per reason."""

    def __repr__(self) -> str:
        return "\n".join(by_reason(self)) or "nothing is unavailable"

    def _repr_html_(self) -> str:
        return Summary("Unavailable", notes=by_reason(self))._repr_html_()


def summarise_blocks(
    title: str,
    blocks: Iterable[Mapping[str, Any]],
    columns: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Summary:
    """Blocks, one a row, with what was recorded of them at the last step that has numbers.

    Args:
        title: One line.
        blocks: As `Block.to_dict` describes them.
        columns: Columns of the block table, derived ones included: "step", "block" and metrics.
        notes: Lines below.
    """
    described = list(blocks)
    numbers = _last_numbers(columns or {})
    if numbers:
        step, end = int(numbers["step"][0]), int(np.max((columns or {})["step"]))
        late = "" if step == end else ", the last at which all are finite"
        title = f"{title}; numbers of step {step}{late}"
    header = ["block", "name", "stage", "shortcut", "after add", "shape"]
    header += [NUMBERS[name] for name in numbers if name in NUMBERS]
    rows = []
    for block in described:
        row = [str(block["index"]), str(block.get("name") or "(model)"), str(block["stage"])]
        row += [str(block.get("shortcut", "")), str(block.get("after_add", ""))]
        row.append("x".join(map(str, block.get("shape", ()))))
        row += [
            number(_of_block(numbers, name, block["index"])) for name in numbers if name in NUMBERS
        ]
        rows.append(row)
    return Summary(title, header, rows, notes)


def number(value: float) -> str:
    """A number of three digits, "-" for NaN.

    >>> number(1234.5), number(0.5), number(float("nan")), number(float("inf"))
    ('1.23e+03', '0.5', '-', 'inf')
    """
    return "-" if math.isnan(value) else f"{value:.3g}"


def by_reason(missing: Iterable[Mapping[str, Any]]) -> list[str]:
    """What is unavailable, one line per reason with its metrics.

    >>> by_reason([{"metric": "lr", "reason": "no optimizer"},
    ...            {"metric": "momentum", "reason": "no optimizer"}])
    ['not recorded: lr, momentum (no optimizer)']
    """
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in missing:
        blocks = entry.get("blocks", "all")
        place = "" if blocks == "all" else f" of block{'s' * (len(blocks) > 1)} {_spans(blocks)}"
        reason = str(entry.get("reason", "no reason is known"))
        reasons.setdefault((place, reason), []).append(str(entry["metric"]))
    return [
        f"not recorded: {', '.join(metrics)}{place} ({reason})"
        for (place, reason), metrics in reasons.items()
    ]


def _spans(numbers: Iterable[int]) -> str:
    """Whole numbers with runs shortened: 0-3, 7."""
    spans: list[list[int]] = []
    for i in sorted(numbers):
        if spans and i == spans[-1][-1] + 1:
            spans[-1][1:] = [i]
        else:
            spans.append([i])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _last_numbers(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of the last step, of the metrics that have a number there."""
    steps = np.asarray(columns.get("step", ()))
    if not len(steps):
        return {}
    finite = np.ones(len(steps), dtype=bool)
    for name in NUMBERS:
        values = np.asarray(columns.get(name, ()), dtype=float)
        if len(values) == len(steps) and np.isfinite(values).any():
            finite &= np.isfinite(values)
    last = steps == steps[finite if finite.any() else slice(None)].max()
    found = {name: np.asarray(columns[name])[last] for name in ("step", "block")}
    for name in NUMBERS:
        values = np.asarray(columns.get(name, ()), dtype=float)
        if len(values) == len(last) and not np.isnan(values[last]).all():
            found[name] = values[last]
    return found


def _of_block(numbers: Mapping[str, Any], name: str, block: int) -> float:
    values = numbers[name][numbers["block"] == block]
    return float(values[0]) if len(values) else math.nan


def _is_numeric(column: Sequence[str]) -> bool:
    return all(map(_NUMBER.fullmatch, column))


def _row(kind: str, cells: Iterable[str]) -> str:
    inside = "".join(f"<{kind} style='{_STYLE}'>{html.escape(cell)}</{kind}>" for cell in cells)
    return f"<tr>{inside}</tr>"
