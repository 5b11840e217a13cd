"""Where data lie on this computer, and a quick look at a path. No torch here."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from resdiag.errors import UsageError

TREE = "expected train/<class>/* and test/<class>/* with JPEG or PNG files"
"""The layout of `folder:PATH`, for the hint of an error."""


def data_roots(root: Path | None = None) -> list[Path]:
    """Folders to search for downloaded sets: `root` alone, or $RESDIAG_DATA, ./data, ~/data."""
    if root is not None:
        return [root.expanduser()]
    named = os.environ.get("RESDIAG_DATA")
    first = [Path(named).expanduser()] if named else []
    return [*first, Path("data"), _home() / "data"]


def find_folder(names: Iterable[str], root: Path | None) -> Path | None:
    """The first existing folder of these names, roots before names, or None."""
    names = list(names)
    candidates = (place / name for place in data_roots(root) for name in names)
    return next((path for path in candidates if path.is_dir()), None)


def cache_root() -> Path:
    """$RESDIAG_CACHE, or `resdiag` in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    named = os.environ.get("RESDIAG_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else _home() / ".cache") / "resdiag"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a container's user may have none
        return Path("/nonexistent")


def check_tree(spec: str, path: Path) -> None:
    """Refuse a path that is neither a folder with both splits nor a tar archive.

    Raises:
        UsageError: It is not, or a split holds no file.
    """
    if path.is_file():
        if not _is_archive(path):
            raise UsageError(f"{spec}: neither a folder nor a tar archive", TREE)
        return
    for split in ("train", "test"):
        folder = path / split
        if not folder.is_dir():
            raise UsageError(f"{spec}: has no folder {split}", TREE)
        if not any(names for _, _, names in os.walk(folder)):
            raise UsageError(f"{spec}: {split} holds no file", TREE)


def _is_archive(path: Path) -> bool:
    """Whether a file begins as a tar archive, packed or not; just one header is unpacked.

    Not `tarfile.is_tarfile`: that reads extended headers of any length that the file claims.
    """
    import bz2  # here: `--help` and most mistakes need no archive
    import gzip
    import lzma

    openers = (gzip.open, bz2.open, lzma.open, Path.open)
    return any(_begins_as_tar(path, opener) for opener in openers)


def _begins_as_tar(path: Path, opener: Callable[..., Any]) -> bool:
    import tarfile
    from lzma import LZMAError
    from zlib import error as ZlibError

    try:
        with opener(path, "rb") as file:
            tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except (tarfile.TarError, EOFError, ZlibError, LZMAError, OSError):
        return False
    return True
