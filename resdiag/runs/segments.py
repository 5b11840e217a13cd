"""Parquet segments: the two tables of a run, one file per commit, small ones merged later.

A run commits every hundred steps or so; after 64,000 steps its tables would lie in 640 files each,
most of them smaller than their own footers, and reading them would be opening them. So small
segments at a table's end are written again as one: a new file under the name that the commit's own
segment would have had, so that no committed file is touched, and the commit before still has all of
its own.
"""

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from resdiag.catalog.set_metrics import OF_BLOCKS, OF_STEPS
from resdiag.catalog.table import RECORDED, RECORDED_PER_STEP
from resdiag.errors import StorageError
from resdiag.runs.commit import Commit
from resdiag.runs.files import Damaged

METRICS = pa.schema(
    [("step", pa.int32()), ("block", pa.int16()), *((name, pa.float32()) for name in RECORDED)]
)
"""One row per recorded step and block."""

_WIDE = ("loss", "grad_norm")  # these leave float32's range while a run explodes
CURVE = pa.schema(
    [
        ("step", pa.int32()),
        *(
            (name, pa.float64() if name in _WIDE else pa.float32())
            for name in (
                "epoch", "loss", "error", "lr", "images_per_s",
                "train_loss", "train_error", "test_loss", "test_error",
                *(name for name in RECORDED_PER_STEP if name != "lr"),
            )
        ),
    ]
)  # fmt: skip
"""One row per optimizer step."""

OPTIONAL = {"metrics": OF_BLOCKS, "curve": OF_STEPS}
"""Columns of each table that a segment has only where something was measured."""

CUSTOM = "custom_metrics"
"""Key of a segment's metadata: the columns of custom metrics, separated by commas."""

COUNT = 16
"""Number of small segments that are merged into one."""

_SMALL = 1 << 20
"""Bytes from which a segment is left alone: each number is then rewritten once or twice at most."""

SCHEMAS = {"metrics": METRICS, "curve": CURVE}
"""The schema of each table by the name of its folder."""


def encode(table: str, columns: Mapping[str, Any], keys: Mapping[str, str]) -> bytes:
    """One Parquet file: zstd, byte stream split; the same columns give the same bytes.

    Args:
        table: "metrics" or "curve".
        columns: One array of shape (rows,) per column; floats left out are NaN.
        keys: What the rows belong to, kept in the file's metadata.

    Raises:
        ValueError: A column is unknown, or step or block is missing (a mistake of the caller).
    """
    schema = _schema(table, columns, keys.get(CUSTOM, "").split(","))
    stray = set(columns) - set(schema.names)
    if stray:
        raise ValueError(f"no such column in {table}: {', '.join(sorted(stray))}")
    rows = len(columns["step"])
    arrays = [_array(columns, field, rows) for field in schema]
    metadata = {key: value.encode(errors="backslashreplace") for key, value in keys.items()}
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_arrays(arrays, schema=schema.with_metadata(metadata)),
        sink,
        compression="zstd",
        use_dictionary=False,
        column_encoding={
            field.name: "BYTE_STREAM_SPLIT" for field in schema if pa.types.is_floating(field.type)
        },
    )
    return bytes(sink.getvalue())


def _schema(table: str, there: Container[str], custom: Iterable[str]) -> pa.Schema:
    """A table's columns, those optional ones that are there, and one per custom metric."""
    known = set(SCHEMAS[table].names)
    more = [name for name in OPTIONAL[table] if name in there]
    more += [name for name in custom if name and name not in known and table == "metrics"]
    return pa.schema([*SCHEMAS[table], *((name, pa.float32()) for name in more)])


def _array(columns: Mapping[str, Any], field: pa.Field, rows: int) -> pa.Array:
    """One column in its type; a value beyond float32 becomes infinite, which is how it looks."""
    if field.name not in columns and not pa.types.is_floating(field.type):
        raise ValueError(f"column '{field.name}' is missing")
    values = columns.get(field.name)
    with np.errstate(over="ignore"):
        array = np.full(rows, np.nan) if values is None else np.asarray(values)
        if array.shape != (rows,):
            raise ValueError(f"column '{field.name}' has shape {array.shape}, not ({rows},)")
        return pa.array(array.astype(field.type.to_pandas_dtype()))


def decode(
    table: str, parts: Sequence[tuple[Path, bytes]], names: Collection[str] | None = None
) -> pa.Table:
    """The rows of some segments; float columns that an older one lacks are NaN.

    Args:
        table: "metrics" or "curve".
        parts: Path and content of each.
        names: Columns to read besides `step` and `block`, those that there are; None for all.

    Raises:
        Damaged: A segment is not a Parquet file of this table.
    """
    files = [(path, _open(path, data)) for path, data in parts]
    custom = dict.fromkeys(name for _, file in files for name in _custom_names(file))
    there = {name for _, file in files for name in file.schema.names}
    schema = _schema(table, there, custom)
    if names is not None:
        schema = pa.schema([field for field in schema if field.name in {"step", "block", *names}])
    tables = [_decode_part(schema, path, file) for path, file in files]
    return pa.concat_tables(tables) if tables else schema.empty_table()


def _open(path: Path, data: bytes) -> pq.ParquetFile:
    try:
        # ParquetFile, not read_table: no pandas metadata, no paths, no partitions
        return pq.ParquetFile(pa.BufferReader(data))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _custom_names(file: pq.ParquetFile) -> list[str]:
    """The custom metrics that a segment says it has."""
    listed = (file.metadata.metadata or {}).get(CUSTOM.encode(), b"").decode("ascii", "replace")
    return [name for name in listed.split(",") if name in file.schema.names] if listed else []


def _decode_part(schema: pa.Schema, path: Path, file: pq.ParquetFile) -> pa.Table:
    """One segment, cut to its table's columns; nothing else in the file is interpreted."""
    try:
        there = set(file.schema.names)
        known = [name for name in schema.names if name in there]
        found = file.read(columns=known, use_threads=False)
        columns = [_decode_column(found, field) for field in schema]
        return pa.Table.from_arrays(columns, schema=schema)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> Damaged:
    return Damaged(f"{path} is damaged: not a segment ({type(error).__name__})")


def _decode_column(found: pa.Table, field: pa.Field) -> pa.Array:
    """One column in its type, without gaps."""
    if field.name not in found.column_names and pa.types.is_floating(field.type):
        return pa.array(np.full(found.num_rows, np.nan, field.type.to_pandas_dtype()))
    column = found.column(field.name)
    if column.type != field.type:
        column = column.cast(field.type)
    if column.null_count:
        raise ValueError("a value is missing")
    return column


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
    except (Damaged, StorageError):  # the reader of the run reports it; the training goes on
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
