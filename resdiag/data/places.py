"""Where data lie on this computer, and a quick look at a path. No torch here."""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
        _check_archive(spec, path)
        return
    for split in ("train", "test"):
        folder = path / split
        if not folder.is_dir():
            raise UsageError(f"{spec}: has no folder {split}", TREE)
        if not any(names for _, _, names in os.walk(folder)):
            raise UsageError(f"{spec}: {split} holds no file", TREE)


def _check_archive(spec: str, path: Path) -> None:
    """Refuse a file that does not begin as a tar archive; just one header is unpacked.

    Not `tarfile.is_tarfile`: that reads extended headers of any length that the file claims.
    """
    import tarfile

    try:
        with open_archive(path) as file:
            tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except UsageError:
        raise UsageError(f"{spec}: neither a folder nor a tar archive", TREE) from None


@contextmanager
def open_archive(path: Path) -> Iterator[io.BufferedIOBase]:
    """The unpacked bytes of a tar archive: packed by gzip, bzip2 or xz, or not.

    Raises:
        UsageError: What is done with them finds that they are not an archive, or not a whole one.
    """
    import bz2  # here: `--help` and most mistakes need no archive
    import gzip
    import lzma
    import tarfile
    import zlib

    openers: dict[bytes, Callable[..., Any]] = {
        b"\x1f\x8b": gzip.open,
        b"BZh": bz2.open,
        b"\xfd7zXZ\0": lzma.open,
    }
    try:
        with path.open("rb") as file:
            start = file.read(6)
            file.seek(0)
            opener = next((openers[magic] for magic in openers if start.startswith(magic)), None)
            with opener(file) if opener else file as unpacked:
                yield unpacked
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise UsageError(f"{path}: not a complete tar archive: {error}", f"{TREE} in it") from error
