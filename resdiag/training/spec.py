"""Checks of `--data` that need no torch, so that a wrong path is answered at once."""

import bz2
import gzip
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resdiag.errors import UsageError, unknown

SETS = ("auto", "cifar10", "cifar100", "digits", "fashion")
TREES = ("folder", "parquet")
_LAYOUT = "expected train/<class>/* and test/<class>/* with JPEG or PNG files"


def check_data(spec: str) -> None:
    """Refuse a data spec that cannot be opened, as far as a glance tells.

    Raises:
        UsageError: Unknown name, or a path that is missing, unreadable or empty.
    """
    kind, colon, name = spec.partition(":")
    if not colon and spec in SETS:
        return
    if kind not in TREES or not colon:
        raise unknown("data", spec, [*SETS, *(f"{tree}:PATH" for tree in TREES)])
    try:
        path = Path(name).expanduser()
        if not name or not path.exists():
            raise UsageError(f"{spec}: no such file or folder", _LAYOUT if kind == "folder" else "")
        if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
            raise UsageError(f"{spec}: not readable by this user")
        if kind == "folder":
            _check_tree(spec, path)
    except (OSError, RuntimeError, ValueError) as error:  # no permission, no home, a name too long
        raise UsageError(f"{spec}: cannot be read: {error}") from error


def _check_tree(spec: str, path: Path) -> None:
    """A folder with both splits and something in them, or a file that is a tar archive."""
    if path.is_file():
        if not _is_archive(path):
            raise UsageError(f"{spec}: neither a folder nor a tar archive", _LAYOUT)
        return
    for split in ("train", "test"):
        folder = path / split
        if not folder.is_dir():
            raise UsageError(f"{spec}: has no folder {split}", _LAYOUT)
        if not any(names for _, _, names in os.walk(folder)):
            raise UsageError(f"{spec}: {split} holds no file", _LAYOUT)


def _is_archive(path: Path) -> bool:
    """Whether a file begins as a tar archive, packed or not; just one header is unpacked.

    Not `tarfile.is_tarfile`: that reads extended headers of any length that the file claims.
    """
    openers = (gzip.open, bz2.open, lzma.open, Path.open)
    return any(_begins_as_tar(path, opener) for opener in openers)


def _begins_as_tar(path: Path, opener: Callable[..., Any]) -> bool:
    try:
        with opener(path, "rb") as file:
            tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError):
        return False
    return True
