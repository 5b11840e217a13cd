"""Results of a study as files to commit: a JSON document and two packed tables."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resdiag.diagnose.finding import plain
from resdiag.errors import UsageError
from resdiag.report.results import CellResult, Results
from resdiag.runs.config import from_stored
from resdiag.runs.files import Damaged, from_json, make_folder, read_file, to_json, write_file
from resdiag.runs.watched_config import read_config
from resdiag.study.grid import Cell
from resdiag.study.spec import WORDS, check_document
from resdiag.study.study import Study, check_name
from resdiag.training.recipe import Request

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
RESULTS = "results.json"
TABLES = ("metrics", "curve")
_SHARED: Mapping[str, type] = {
    "environment": dict,
    "data": dict,
    "blocks": list,
    "unavailable": list,
}
_SAID = ("name", "step", "block", "summary", "why", "not_judged")
_PATH = re.compile(r"(?<![\w.])(?:/[^\s/:'\"]+)+/(?=[^\s/:'\"])")

_RENAMED = {"offender": "nonfinite"}
"""Plots whose names have changed since results that are committed were written."""


def write_results(results: Results, folder: Path) -> list[Path]:
    """Write results; what lies there is replaced.

    Args:
        results: Of any study, finished or not.
        folder: Where; created if it is not there.

    Returns:
        The files.

    Raises:
        StorageError: The folder cannot be written.
    """
    make_folder(folder)
    shared: dict[str, list[Any]] = {name: [] for name in _SHARED}
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "study": results.study.name,
        "document": portable(dict(results.study.document)),
        "cells": [_pack_cell(item, shared) for item in results.cells],
        "shared": shared,
        "sha256": {},
    }
    paths = []
    for table in TABLES:
        path = folder / f"{table}.parquet"
        runs = [item.run for item in results.cells]
        frames = [getattr(run, f"{table}_frame") if run else None for run in runs]
        document["sha256"][table] = write_file(path, pack(table, frames))
        paths.append(path)
    write_file(folder / RESULTS, to_json(plain(document)))
    return [folder / RESULTS, *paths]


def is_frozen(path: Path) -> bool:
    """Whether frozen results lie in a folder."""
    return (path / RESULTS).is_file()


def read_results(folder: Path) -> Results:
    """Read frozen results.

    Raises:
        Damaged: A file is missing or not what was written.
        UsageError: They are of another version.
    """
    path = folder / RESULTS
    document = from_json(read_file(path), path)
    if document.get("schema") != SCHEMA:
        raise UsageError(f"{path} is not of this resdiag: schema {document.get('schema')!r:.20}")
    try:
        hashes = document["sha256"]
        tables = {t: folder / f"{t}.parquet" for t in TABLES}
        frames = {
            t: unpack(file, read_file(file, hashes[t]), len(document["cells"]))
            for t, file in tables.items()
        }
        cells = [
            _unpack_cell(cell, document["shared"], frames["metrics"][i], frames["curve"][i])
            for i, cell in enumerate(document["cells"])
        ]
        name, said = str(document["study"]), from_stored(document["document"])
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise Damaged(f"{path} is damaged: {type(error).__name__} {error}") from error
    check_name(name, path)
    figures = [{**f, "plot": _RENAMED.get(f["plot"], f["plot"])} for f in said.get("figure", ())]
    file = check_document({**said, "figure": figures}, str(path))
    study = Study(name, said, file, tuple(item.cell for item in cells))
    return Results(study=study, cells=cells, source=str(folder))


def _pack_cell(item: CellResult, shared: dict[str, list[Any]]) -> dict[str, Any]:
    """A cell as plain data; what many cells share stands once in `shared`."""
    packed: dict[str, Any] = {
        "id": item.cell.id,
        "request": portable(asdict(item.cell.request)),
        "state": item.state,
        "message": _PATH.sub("", item.message),
        "outcomes": dict(item.outcomes),
        "thinned": item.thinned,
        "run": None,
    }
    if item.run:
        run = item.run
        verdict = {name: (run.written_verdict or {}).get(name) for name in _SAID}
        packed["run"] = {
            "config": portable(run.config.to_dict()),
            "status": run.status,
            "steps": run.steps,
            "point": run.point,
            "notes": list(run.notes),
            "verdict": verdict if run.written_verdict else None,
            **{name: _share(shared[name], getattr(run, name)) for name in _SHARED},
        }
    return packed


def _share(known: list[Any], value: object) -> int:
    """The place of a value in a list, to which it is added if it is new."""
    value = plain(value)
    if value not in known:
        known.append(value)
    return known.index(value)


def _unpack_cell(
    packed: Mapping[str, Any],
    shared: Mapping[str, Sequence[Any]],
    metrics: "pd.DataFrame",
    curve: "pd.DataFrame",
) -> CellResult:
    from resdiag.runs.folder import Run

    about, run = packed["run"], None
    request = Request(**from_stored(packed["request"]))
    request.check()
    if about is not None:
        run = Run(
            config=read_config(about["config"]),
            status=str(about["status"]),
            steps=int(about["steps"]),
            point=str(about["point"]),
            notes=tuple(map(str, about["notes"])),
            written_verdict=about["verdict"],
            metrics_frame=metrics,
            curve_frame=curve,
            **{name: kind(shared[name][about[name]]) for name, kind in _SHARED.items()},
        )
    return CellResult(
        cell=Cell(str(packed["id"]), request),
        state=str(packed["state"]),
        message=str(packed["message"]),
        run=run,
        outcomes={k: v if k in WORDS else _number(v) for k, v in packed["outcomes"].items()},
        thinned=int(packed["thinned"]),
    )


def _number(value: object) -> float:
    """A number that JSON may have had no word for."""
    return math.nan if value is None else float(str(value))


def portable(value: Any) -> Any:  # noqa: ANN401
    """Plain data with the last part of every path: where data lie is the machine's own affair.

    >>> portable({"data": ["folder:/data/cifar10-jpeg.tar.gz", "digits"]})
    {'data': ['folder:cifar10-jpeg.tar.gz', 'digits']}
    """
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if isinstance(value, str) and value.startswith(("folder:", "parquet:")):
        kind, _, path = value.partition(":")
        return f"{kind}:{Path(path).name}"
    return value


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
    floats = [name for name in names if name not in _WHOLE]
    kinds = [(name, pa.float64() if name in _WIDE else pa.float32()) for name in floats]
    schema = pa.schema([*((name, _WHOLE[name]) for name in keys), *kinds])
    parts = [_part(schema, i, frame) for i, frame in enumerate(frames) if frame is not None]
    sink = pa.BufferOutputStream()
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
    columns, whole = [], frame.assign(cell=cell).reindex(columns=schema.names)
    for field in schema:
        with np.errstate(over="ignore"):
            values = whole[field.name].to_numpy().astype(field.type.to_pandas_dtype())
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
        Damaged: Not a file written by `pack`.
    """
    try:
        # ParquetFile, not read_table: no paths, no partitions
        frame = pq.ParquetFile(pa.BufferReader(data)).read().to_pandas(ignore_metadata=True)
        groups = dict(iter(frame.groupby("cell", sort=False)))
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise Damaged(f"{path} is damaged: {type(error).__name__}") from error
    empty = frame.iloc[:0]
    return [groups.get(i, empty).drop(columns="cell").reset_index(drop=True) for i in range(cells)]
