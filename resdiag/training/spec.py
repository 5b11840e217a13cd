"""Checks of `--data` that need no torch, so that a wrong path is answered at once."""

import os
import tarfile
from pathlib import Path

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
    path = Path(name).expanduser()
    if not name or not path.exists():
        raise UsageError(f"{spec}: no such file or folder", _LAYOUT if kind == "folder" else "")
    if not os.access(path, os.R_OK):
        raise UsageError(f"{spec}: not readable by this user")
    if kind == "folder":
        _check_tree(spec, path)


def _check_tree(spec: str, path: Path) -> None:
    """A folder with both splits and something in them, or a file that is a tar archive."""
    if path.is_file():
        if not tarfile.is_tarfile(path):
            raise UsageError(f"{spec}: neither a folder nor a tar archive", _LAYOUT)
        return
    for split in ("train", "test"):
        folder = path / split
        if not folder.is_dir():
            raise UsageError(f"{spec}: has no folder {split}", _LAYOUT)
        if not any(names for _, _, names in os.walk(folder)):
            raise UsageError(f"{spec}: {split} holds no file", _LAYOUT)
