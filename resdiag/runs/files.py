"""Files that are whole or absent: atomic writes, sealed JSON, and reads checked by hash."""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resdiag.errors import StorageError, UsageError


class Damaged(UsageError):
    """A file of a run folder is missing or not what was written."""

    def __init__(self, message: str) -> None:
        hint = "the command that made the run repairs it from the commit before"
        super().__init__(message, hint)


class System:
    """The operations on the disk; tests replace `system` to fail at each of them."""

    read = staticmethod(Path.read_bytes)
    open = staticmethod(os.open)
    write = staticmethod(os.write)
    fsync = staticmethod(os.fsync)
    rename = staticmethod(os.replace)
    unlink = staticmethod(os.unlink)
    mkdir = staticmethod(os.mkdir)


system = System()


def write_file(path: Path, data: bytes) -> str:
    """Write `data` so that `path` holds the old or the new content after any crash.

    Temporary file in the same folder, write, fsync, rename, fsync of the folder: the order that
    survives a power loss.

    Returns:
        SHA-256 of `data`.

    Raises:
        StorageError: The disk is full, read-only or failing; the temporary file is removed, or
            if that fails too, by the next commit.
    """
    # of this process: two drivers that write the same plan do not take each other's file away
    tmp = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}.tmp")
    try:
        _write_synced(tmp, data)
        try:
            system.rename(tmp, path)
        except BaseException:
            remove_file(tmp)
            raise
        sync_folder(path.parent)
        if path.stat().st_size != len(data):
            raise OSError(f"holds {path.stat().st_size} bytes after the rename")
    except OSError as error:
        raise _storage_error(path, error, f" ({len(data)} bytes)") from error
    return hashlib.sha256(data).hexdigest()


def _write_synced(path: Path, data: bytes, flags: int = os.O_TRUNC) -> None:
    """Create `path`, write all of `data` (a write may be partial) and wait for the disk."""
    handle = system.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[system.write(handle, view) :]
        system.fsync(handle)
    except BaseException:  # Ctrl-C too
        remove_file(path)
        raise
    finally:
        os.close(handle)


def create_file(path: Path, data: bytes) -> bool:
    """Create a file exclusively; False if it exists.

    Raises:
        StorageError: The disk is full, read-only or failing.
    """
    try:
        _write_synced(path, data, os.O_EXCL)
    except FileExistsError:
        return False
    except OSError as error:
        raise _storage_error(path, error) from error
    return True


def make_folder(path: Path) -> None:
    """Create a folder and its parents, durably.

    Raises:
        StorageError: It cannot be created.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        with contextlib.suppress(FileExistsError):
            system.mkdir(path)
        if not path.is_dir():
            raise NotADirectoryError("a file is in the way")
        sync_folder(path.parent)
    except OSError as error:
        raise _storage_error(path, error) from error


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = system.open(path, os.O_RDONLY)
    try:
        system.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no fsync for folders
            raise
    finally:
        os.close(handle)


def remove_file(path: Path) -> None:
    """Remove a file that nothing refers to any more; one that cannot go now goes later."""
    with contextlib.suppress(OSError):
        system.unlink(path)


def list_folder(path: Path) -> list[str]:
    """Names in a folder, sorted; empty if it does not exist or is a link to elsewhere.

    Raises:
        StorageError: It cannot be read.
    """
    try:
        return [] if path.is_symlink() else sorted(entry.name for entry in path.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _storage_error(path, error) from error


_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def read_file(path: Path, sha256: str | None = None) -> bytes:
    """Read a file, checking its hash if one is given.

    Raises:
        Damaged: It is missing, or other bytes than were written.
        StorageError: It could not be read now, for a reason that may pass: no permission, a network
            that is away, no memory or file handle left. Nothing must be repaired for that.
    """
    try:
        data = system.read(path)
    except _MISSING as error:
        raise Damaged(f"cannot read {path}: {error.strerror or error}") from error
    except OSError as error:
        hint = "nothing was changed; mend what keeps it from being read, then try again"
        raise StorageError(f"cannot read {path}: {error.strerror or error}", hint) from error
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise Damaged(f"{path} is damaged: its SHA-256 is not the committed one")
    return data


def to_json(document: object) -> bytes:
    """JSON for people and programs: indented, sorted; NaN and Infinity as Python writes them."""
    return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"


def from_json(data: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object read from `path`.

    Raises:
        Damaged: It is not one.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged: not JSON ({type(error).__name__})") from error
    if not isinstance(document, dict):
        raise Damaged(f"{path} is damaged: not a JSON object")
    return document


def hash_json(document: object, before: str = "") -> str:
    """SHA-256 of `before` and of canonical JSON: equal documents have equal hashes."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{before}{text}".encode()).hexdigest()


def seal(document: Mapping[str, Any]) -> bytes:
    """JSON that carries the SHA-256 of itself."""
    return to_json({**document, "sha256": hashlib.sha256(to_json(document)).hexdigest()})


def unseal(data: bytes, path: Path) -> dict[str, Any]:
    """The document of `seal`.

    Raises:
        Damaged: A byte has changed.
    """
    document = from_json(data, path)
    document.pop("sha256", None)
    try:
        whole = seal(document) == data
    except RecursionError:
        whole = False
    if not whole:
        raise Damaged(f"{path} is damaged: it does not match its own SHA-256")
    return document


def _storage_error(path: Path, error: OSError, what: str = "") -> StorageError:
    """One line that names the path and the system's reason."""
    hint = "make room or repair the disk, then give the same command again: it resumes"
    return StorageError(f"cannot write {path}{what}: {error.strerror or error}", hint)
