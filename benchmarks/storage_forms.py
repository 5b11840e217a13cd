"""What keeping a recorded step costs: resdiag's Parquet segments beside what people use.

`storage.py` measures whole runs; here are the forms alone.

The record of a ResNet-110: 54 blocks, every recorded metric, float32; values drift slowly and carry
5 % of noise, so that they compress as little as measured ones do. Slow forms are measured on fewer
steps. Bytes are those on disk after closing.
"""

import json
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resdiag.catalog.table import RECORDED
from resdiag.runs.segments import encode

BLOCKS = 54
SEGMENT = 512
Values = NDArray[np.float32]


def measure(steps: int) -> list[dict[str, Any]]:
    """A row per form: time per recorded step and per value, bytes per value, steps written."""
    forms: dict[str, tuple[int, Callable[[Path, Values], None]]] = {
        "resdiag (Parquet segments)": (steps, parquet),
        "raw float32, appended": (steps, raw),
        "SQLite, a row per value": (steps // 64, sqlite),
        "JSONL, a line per step": (steps // 16, jsonl),
        "W&B offline, log(dict), with its start": (steps // 16, wandb_offline),
        "TensorBoard, add_scalar": (steps // 256, tensorboard),
    }
    return [row(form, count, keep) for form, (count, keep) in forms.items()]


def row(form: str, steps: int, keep: Callable[[Path, Values], None]) -> dict[str, Any]:
    """Write the record of so many steps in one form."""
    values = draw(steps)
    folder = Path(tempfile.mkdtemp(prefix="storage-"))
    try:
        start, begun = time.perf_counter(), time.process_time()
        keep(folder, values)
        spent, busy = time.perf_counter() - start, time.process_time() - begun
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except ImportError as error:
        return {"form": form, "missing": str(error)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "form": form,
        "us_per_step": 1e6 * spent / steps,
        "cpu_us_per_step": 1e6 * busy / steps,
        "us_per_value": 1e6 * spent / values.size,
        "bytes_per_value": size / values.size,
        "steps": steps,
    }


def draw(steps: int) -> Values:
    """Values (steps, blocks, metrics)."""
    rng = np.random.default_rng(0)
    shape = (steps, BLOCKS, len(RECORDED))
    drift = np.cumsum(rng.normal(0, 0.01, shape), axis=0)
    return (np.exp(drift) * (1 + 0.05 * rng.normal(size=shape))).astype(np.float32)


def segments(values: Values) -> Iterator[tuple[int, dict[str, Any]]]:
    """First step and columns of each segment."""
    for start in range(0, len(values), SEGMENT):
        part = values[start : start + SEGMENT]
        columns: dict[str, Any] = {
            "step": np.repeat(np.arange(start, start + len(part), dtype=np.int32), BLOCKS),
            "block": np.tile(np.arange(BLOCKS, dtype=np.int16), len(part)),
        }
        flat = np.ascontiguousarray(part.reshape(-1, part.shape[-1]).T)
        yield start, columns | dict(zip(RECORDED, flat, strict=True))


def parquet(folder: Path, values: Values) -> None:
    """As a run folder keeps them: written, flushed, synced."""
    for start, columns in segments(values):
        with (folder / f"part-{start}.parquet").open("wb") as file:
            file.write(encode("metrics", columns, {"run": "bench"}))
            file.flush()
            os.fsync(file.fileno())


def raw(folder: Path, values: Values) -> None:
    """The floor: bytes as they are."""
    with (folder / "values.f32").open("ab") as file:
        for start in range(0, len(values), SEGMENT):
            file.write(values[start : start + SEGMENT].tobytes())


def sqlite(folder: Path, values: Values) -> None:
    """A table (step, block, metric, value), committed every 256 steps."""
    connection = sqlite3.connect(folder / "values.db")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE v (step INT, block INT, metric INT, value REAL)")
    for step, blocks in enumerate(values):
        rows = [
            (step, block, metric, float(value))
            for block, metrics in enumerate(blocks)
            for metric, value in enumerate(metrics)
        ]
        connection.executemany("INSERT INTO v VALUES (?, ?, ?, ?)", rows)
        if step % 256 == 255:
            connection.commit()
    connection.commit()
    connection.close()


def jsonl(folder: Path, values: Values) -> None:
    """A dictionary per step, six digits."""
    names = tags()
    with (folder / "values.jsonl").open("w", encoding="utf-8") as file:
        for step, blocks in enumerate(values):
            numbers = (float(f"{value:.6g}") for value in blocks.reshape(-1))
            file.write(json.dumps({"step": step, **dict(zip(names, numbers, strict=True))}) + "\n")


def wandb_offline(folder: Path, values: Values) -> None:
    """`wandb.log` of one dictionary per step, offline."""
    import wandb

    settings = wandb.Settings(silent=True, console="off")
    run = wandb.init(mode="offline", dir=str(folder), project="bench", settings=settings)
    names = tags()
    for blocks in values:
        run.log(dict(zip(names, blocks.reshape(-1).tolist(), strict=True)))
    run.finish()


def tensorboard(folder: Path, values: Values) -> None:
    """`add_scalar` per value."""
    from torch.utils.tensorboard import SummaryWriter

    names = tags()
    with SummaryWriter(str(folder)) as writer:
        for step, blocks in enumerate(values):
            for name, value in zip(names, blocks.reshape(-1).tolist(), strict=True):
                writer.add_scalar(name, value, step)


def tags() -> list[str]:
    """A tag per block and metric."""
    return [f"{name}/{block}" for block in range(BLOCKS) for name in RECORDED]
