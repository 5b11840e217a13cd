"""Tables of many runs as one small Parquet file: rounded, packed, checked when they are read."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resdiag.runs.files import Damaged

if TYPE_CHECKING:
    import pandas as pd

BITS = 12
"""Bits of a float's mantissa that are kept, the leading one not counted."""

_WHOLE = {"cell": pa.int32(), "step": pa.int32(), "block": pa.int16()}
_WIDE = ("loss", "grad_norm")  # these leave float32's range while a run explodes


def pack(table: str, frames: "Sequence[pd.DataFrame | None]") -> bytes:
    """One file with a column `cell` that says which frame a row is of.

    Args:
        table: "metrics" or "curve".
        frames: One per cell, in order; None for a cell without a run.
    """
    names = list(dict.fromkeys(str(n) for f in frames if f is not None for n in f.columns))
    keys = ["cell", "step", *(["block"] if table == "metrics" else [])]
    schema = pa.schema(
        [(name, _WHOLE[name]) for name in keys]
        + [
            (name, pa.float64() if name in _WIDE else pa.float32())
            for name in names
            if name not in _WHOLE
        ]
    )
    parts = [_part(schema, i, frame) for i, frame in enumerate(frames) if frame is not None]
    sink = pa.BufferOutputStream()
    floats = [field.name for field in schema if pa.types.is_floating(field.type)]
    pq.write_table(
        pa.concat_tables(parts) if parts else schema.empty_table(),
        sink,
        compression="zstd",
        compression_level=15,
        use_dictionary=False,
        column_encoding=dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
    )
    return bytes(sink.getvalue())


def _part(schema: pa.Schema, cell: int, frame: "pd.DataFrame") -> pa.Table:
    columns = []
    for field in schema:
        kind = field.type.to_pandas_dtype()
        if field.name == "cell":
            values = np.full(len(frame), cell)
        elif field.name in frame:
            values = frame[field.name].to_numpy()
        else:
            values = np.full(len(frame), np.nan)
        with np.errstate(over="ignore"):
            values = values.astype(kind)
        columns.append(pa.array(values if field.name in _WHOLE else round_bits(values)))
    return pa.Table.from_arrays(columns, schema=schema)


def round_bits(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Floats with the low bits of the mantissa cleared, to the nearest: what is left packs well.

    >>> round_bits(np.array([1.0, 1 / 3, np.inf], dtype=np.float32))
    array([1.      , 0.333313,      inf], dtype=float32)
    """
    single = values.dtype == np.float32
    dropped = (23 if single else 52) - BITS
    bits: NDArray[np.signedinteger] = np.ascontiguousarray(values).view(
        np.int32 if single else np.int64
    )
    nearest = np.right_shift(bits + (1 << (dropped - 1)), dropped)
    rounded = np.left_shift(nearest, dropped).view(values.dtype)
    whole = np.isfinite(values) & np.isfinite(rounded)
    kept: NDArray[np.floating] = np.where(whole, rounded, values)
    return kept


def unpack(path: Path, data: bytes, cells: int) -> "list[pd.DataFrame]":
    """The frames of `pack`, one per cell; empty ones for cells without rows.

    Raises:
        Damaged: It is no such file.
    """
    try:
        # ParquetFile, not read_table: no paths, no partitions
        frame = pq.ParquetFile(pa.BufferReader(data)).read().to_pandas(ignore_metadata=True)
        groups = dict(iter(frame.groupby("cell", sort=False)))
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise Damaged(f"{path} is damaged: {type(error).__name__}") from error
    empty = frame.iloc[:0]
    return [groups.get(i, empty).drop(columns="cell").reset_index(drop=True) for i in range(cells)]
