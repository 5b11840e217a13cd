"""Few segments instead of many: small ones at a table's end are written again as one.

A run commits every hundred steps or so; after 64,000 steps its tables would lie in 640 files each,
most of them smaller than their own footers, and reading them would be opening them. A merged
segment is a new file under the name that the commit's own segment would have had, so no committed
file is touched, and the commit before still has all of its own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resdiag.runs.commit import Commit
from resdiag.runs.files import Damaged
from resdiag.runs.segments import decode

COUNT = 16
"""Segments that make up one."""

_SMALL = 1 << 20
"""Bytes from which a segment is left alone: each number is then rewritten once or twice at most."""


def merge(
    folder: Path, commit: Commit | None, table: str, columns: Mapping[str, Any]
) -> tuple[dict[str, Any], Sequence[str]]:
    """The rows to write for a commit, and the segments of the commit before that they contain.

    Args:
        folder: Of the run.
        commit: The last one.
        table: "metrics" or "curve".
        columns: Its new rows.
    """
    small = _small_ones(folder, commit, table)
    if commit is None or len(small) < COUNT - 1:
        return {**columns}, ()
    try:
        old = decode(table, [(folder / name, commit.read_file(folder, name)) for name in small])
    except Damaged:  # whoever reads the run is told; a training does not end for it
        return {**columns}, ()
    before = {name: old.column(name).to_numpy() for name in old.column_names}
    return _joined(before, columns), small


def _small_ones(folder: Path, commit: Commit | None, table: str) -> list[str]:
    """The last segments of a table that are all small."""
    small: list[str] = []
    for name in reversed(commit.parts(table) if commit else []):
        try:
            if (folder / name).stat().st_size >= _SMALL:
                break
        except OSError:
            break
        small.append(name)
    return small[::-1]


def _joined(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of both; a column that one of them lacks is NaN there."""
    names = dict.fromkeys([*before, *after])
    parts = (before, after)
    return {name: np.concatenate([_column(part, name) for part in parts]) for name in names}


def _column(part: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401
    return part[name] if name in part else np.full(len(part["step"]), np.nan)
