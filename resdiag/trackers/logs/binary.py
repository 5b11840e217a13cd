"""Logs that are binary: event files of TensorBoard, and the files of a W&B run."""

import importlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resdiag.errors import UsageError
from resdiag.trackers.logs.entries import Log
from resdiag.trackers.logs.text import numbers


def read_events(path: Path) -> Log:
    """The scalars of TensorBoard event files: those of a folder, or one file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    kept = {"scalars": 0, "tensors": 0, "images": 1, "audio": 1, "histograms": 1, "graph": 0}
    by_step: dict[int, dict[str, float]] = {}
    try:
        events = EventAccumulator(str(path), size_guidance=kept)
        events.Reload()
        tags: dict[str, Any] = events.Tags()
        for tag in tags["scalars"]:
            for event in events.Scalars(tag):
                by_step.setdefault(event.step, {})[tag] = float(event.value)
        for tag in tags["tensors"]:
            for event in events.Tensors(tag):
                value = tensor_util.make_ndarray(event.tensor_proto)
                if value.size == 1 and value.dtype.kind in "fiu":
                    by_step.setdefault(event.step, {})[tag] = float(value.reshape(()))
    except Exception as error:  # it raises what its parsers raise on a damaged file
        raise UsageError(f"{path} is not an event file: {type(error).__name__}") from error
    if not by_step:
        raise UsageError(f"{path} has no scalar: not an event file, or an empty one")
    entries = [{"step": float(step), **values} for step, values in sorted(by_step.items())]
    name = path.name if path.is_dir() else path.resolve().parent.name
    return Log(name=name or "training", format="tensorboard", path=path, entries=entries)


_BLOCK, _HEADER = 32768, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_wandb(path: Path) -> Log:
    """The history in `run-<id>.wandb`, which a W&B run writes on the disk."""
    # made for the protobuf that is installed: its classes are known at run time only
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    entries: list[dict[str, float]] = []
    name = path.stem
    try:
        for data in _records(path.read_bytes()):
            record = messages.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                name = record.run.display_name or name
            if kind == "history":
                entries.append(_entry(record.history))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # protobuf's class for a damaged message depends on its release
        raise UsageError(f"{path} is not a W&B run: {type(error).__name__}") from error
    if not entries:
        raise UsageError(f"{path} has no history: not a W&B run, or an empty one")
    return Log(name=name, format="wandb", path=path, entries=entries)


def _entry(history: Any) -> dict[str, float]:  # noqa: ANN401
    """The numbers of one call of `wandb.log`."""
    found: dict[str, float] = {}
    for item in history.item:
        key = "/".join(item.nested_key) or item.key
        found |= dict(numbers({key: json.loads(item.value_json)}))
    if history.HasField("step") and "_step" not in found:
        found["_step"] = float(history.step.num)
    return found


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, as far as they are whole.

    A header of 7 bytes, then blocks of 32 KiB with pieces: checksum (4 bytes), length (2), kind
    (1), content. A piece is a whole record, or the first, a middle or the last part of one.
    """
    if data[:4] != b":W&B":
        return
    at, parts = _HEADER, b""
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or len(piece) < length:
            return
        parts = piece if kind in (_FULL, _FIRST) else parts + piece
        if kind in (_FULL, _LAST):
            yield parts
