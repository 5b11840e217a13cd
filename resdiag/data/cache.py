"""Decoded images kept between runs: files that can be mapped, checked by their SHA-256."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from resdiag.data.dataset import Source
from resdiag.data.places import cache_root

_FORMAT = 2  # of the cache and of what decoding yields; a new number makes every entry stale
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
_META = "meta.json"
_STALE = 3600.0  # seconds after which another writer's temporary file is taken to be abandoned


def cached(path: Path, files: Iterable[Path], build: Callable[[], Source]) -> Source:
    """The set at `path` from the cache, or built and put there.

    An entry is used only if path, sizes and times of the files are those it was made from and its
    arrays have the SHA-256 written beside them; anything else is built again and replaced. Where
    the cache cannot be written, the note of the result says so.

    Args:
        path: What the user named.
        files: The files that are read.
        build: Reads them.
    """
    path = path.resolve()
    key = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    folder, origin = cache_root() / key, _fingerprint(path, files)
    found = _load(folder, origin)
    if found is not None:
        return found
    source = build()
    try:
        _save(source, folder, origin)
    except OSError as error:
        note = f"{source.note} (not cached: {folder}: {error.strerror or error})"
        return replace(source, note=note)
    return source


def _fingerprint(path: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256(f"{_FORMAT}\n".encode() + os.fsencode(path))
    for file in files:
        status = file.stat()
        digest.update(os.fsencode(file) + f"\n{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _load(folder: Path, origin: str) -> Source | None:
    """The entry, or None if it is missing, stale or damaged."""
    try:
        meta = json.loads((folder / _META).read_bytes())
        if meta.pop("origin") != origin:
            return None
        check = meta.pop("check")
        # mapped copy-on-write: loads at once, and torch accepts it as writable memory
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False)
            for name in _ARRAYS
        }
        source = Source(**arrays, **{**meta, "classes": tuple(meta["classes"])})
        return source if _check(source) == check else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None


def _check(source: Source) -> str:
    text = json.dumps(_describe(source), sort_keys=True)
    return hashlib.sha256(f"{source.sha256}\n{text}".encode()).hexdigest()


def _describe(source: Source) -> dict[str, Any]:
    return {
        "name": source.name,
        "classes": list(source.classes),
        "note": source.note,
    }


def _save(source: Source, folder: Path, origin: str) -> None:
    """The description comes last; no fsync, since reading compares the hash."""
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    arrays: dict[str, NDArray[Any]] = {name: getattr(source, name) for name in _ARRAYS}
    for name, array in arrays.items():
        with _replacing(folder / f"{name}.npy") as file:
            np.save(file, array, allow_pickle=False)
    meta = {**_describe(source), "origin": origin, "check": _check(source)}
    with _replacing(folder / _META) as file:
        file.write(json.dumps(meta, indent=1).encode())


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when it is complete."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Delete what a killed writer left."""
    for leftover in folder.glob("*.tmp"):
        if time.time() - leftover.stat().st_mtime > _STALE:
            leftover.unlink(missing_ok=True)
