"""Logs that are text: CSV tables, JSON lines, and the state of the Hugging Face Trainer."""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from resdiag.errors import UsageError
from resdiag.trackers.logs.entries import Log

_DELIMITERS = ",;\t"
_MOST_BYTES = 1 << 30


def read_csv(path: Path) -> Log:
    """A table with a header, separated by commas, semicolons or tabs; empty cells are no values."""
    text = _text(path)
    header = text.lstrip("\r\n").partition("\n")[0]
    delimiter = max(_DELIMITERS, key=header.count)
    unread: dict[str, int] = {}
    entries: list[dict[str, float]] = []
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        names = next((row for row in rows if any(cell.strip() for cell in row)), [])
        for row in rows:
            entry = {}
            for name, cell in zip(names, row, strict=False):
                value = _number(cell)
                if value is not None:
                    entry[name.strip()] = value
                elif cell.strip():
                    unread[name.strip()] = unread.get(name.strip(), 0) + 1
            entries.append(entry)
    except csv.Error as error:
        raise UsageError(f"{path} is not a CSV table: {error}") from error
    some = ", ".join(f"'{name[:40]}' ({count})" for name, count in list(unread.items())[:6])
    notes = (f"cells that are no numbers: {some}",) if unread else ()
    filled = [entry for entry in entries if entry]
    return Log(name=path.stem, format="csv", path=path, entries=filled, notes=notes)


def read_jsonl(path: Path) -> Log:
    """One JSON object per line, as `wandb` exports a history; or a list of such objects."""
    text = _text(path)
    if text.lstrip().startswith("["):
        lines = _parse(text, path, 1)
    else:
        rows = (line for line in text.splitlines())
        lines = [_parse(row, path, at) for at, row in enumerate(rows, start=1) if row.strip()]
    entries = []
    for at, line in enumerate(lines, start=1):
        if not isinstance(line, dict):
            raise UsageError(f"{path} is not a log: entry {at} is not an object of values by name")
        entries.append(dict(numbers(line)))
    return Log(name=path.stem, format="jsonl", path=path, entries=entries)


_OF_THE_WHOLE = ("train_runtime", "train_loss", "total_flos", "train_steps_per_second",
                 "train_samples_per_second")  # fmt: skip
"""What the Trainer's last entry says of the whole training."""


def read_trainer_state(path: Path) -> Log:
    """`trainer_state.json` of the Hugging Face Trainer, see `transformers.TrainerState`."""
    state = _parse(_text(path), path, 1)
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise UsageError(f"{path} is not a state of the Trainer: it has no list 'log_history'")
    entries = []
    for entry in history:
        dropped = _OF_THE_WHOLE if "train_runtime" in entry else ()
        entries.append({name: v for name, v in numbers(entry) if name not in dropped})
    done, planned = (_whole(state.get(key)) for key in ("global_step", "max_steps"))
    folder = path.resolve().parent
    name = folder.parent.name if folder.name.startswith("checkpoint-") else folder.name
    note = (
        "by default the Trainer replaces a loss that is not finite by a mean of the others "
        "(logging_nan_inf_filter): trust the gradient norm"
    )
    return Log(
        name=name or "training", format="trainer_state", path=path,
        entries=[entry for entry in entries if set(entry) - {"step", "epoch"}],
        updates_counted=True, planned=planned, done=done,
        mean_over=_whole(state.get("logging_steps")), notes=(note,),
    )  # fmt: skip


def numbers(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a JSON object by name; those of objects inside it as `outer/inner`.

    >>> dict(numbers({"loss": 1, "train": {"lr": 0.1}, "ok": True, "note": "x", "norm": "NaN"}))
    {'loss': 1.0, 'train/lr': 0.1, 'norm': nan}
    """
    for name, value in entry.items():
        if isinstance(value, Mapping) and not prefix:
            yield from numbers(value, f"{name}/")
        elif isinstance(value, str):
            if value.strip().lower().lstrip("+-") in ("nan", "inf", "infinity"):
                yield f"{prefix}{name}", float(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            try:
                yield f"{prefix}{name}", float(value)
            except OverflowError:  # a whole number beyond the floats
                yield f"{prefix}{name}", math.copysign(math.inf, value)


def _number(cell: str) -> float | None:
    try:
        return float(cell) if "_" not in cell else None
    except ValueError:
        return None


def _whole(value: object) -> int:
    """A count, 0 where it is not one."""
    return value if isinstance(value, int) and 0 < value < 2**31 else 0


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"{path} has more than {_MOST_BYTES >> 30} GiB: export fewer columns")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text: byte {error.start} is not UTF-8") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def _parse(text: str, path: Path, line: int) -> Any:  # noqa: ANN401
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path} is not JSON at line {line}: {reason}") from error
