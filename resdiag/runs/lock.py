"""One writer per run folder: a lock that names its owner and outlives no process."""

import json
import os
import re
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from resdiag.errors import BusyError
from resdiag.runs.files import create_file, list_folder, remove_file

_NAME = re.compile(r"lock-(\d{1,9})\.json")
_START = 19  # index of the start time in `_stat`
_GRACE = 1.0  # seconds a lock may stay empty: its owner has created it and is about to write


@dataclass(frozen=True)
class Lock:
    """The right to write into a folder, held as `lock-<attempt>.json`.

    A stale lock is not deleted but outnumbered, and creating the next number is exclusive: of
    two processes that find it stale at the same instant one wins, and an owner whose lock was
    removed while it slept finds out at its next commit.
    """

    path: Path
    owner: bytes

    @classmethod
    def take(cls, folder: Path) -> "Lock":
        """Become the only writer of `folder`.

        Raises:
            BusyError: A living process has it; the message names host, pid and age.
            StorageError: The lock cannot be written.
        """
        found = _locks(folder)
        for path in found.values():
            _refuse_living(path)
        pid = os.getpid()
        owner = {
            "host": socket.gethostname(),
            "pid": pid,
            "start": _stat(pid)[_START],
            "token": secrets.token_hex(8),
        }
        number = max(found, default=0) + 1
        lock = cls(folder / f"lock-{number}.json", json.dumps(owner).encode())
        if not create_file(lock.path, lock.owner):
            raise BusyError(f"{folder} was taken by another process at this moment")
        try:
            lock._settle(folder)
        except BusyError:
            lock.release()
            raise
        return lock

    def _settle(self, folder: Path) -> None:
        """Remove outnumbered locks; look once more, as a rival may have counted from others."""
        for path in _locks(folder).values():
            if path != self.path:
                _refuse_living(path)
                remove_file(path)

    def check(self) -> None:
        """Refuse to go on if the lock was removed or taken over.

        Raises:
            BusyError: This process must not write into the folder any more.
        """
        newest = max(_locks(self.path.parent).items(), default=(0, None))[1]
        if newest != self.path or not self._held():
            raise BusyError(f"{self.path.parent} was taken over from this process")

    def release(self) -> None:
        """Give the folder back; twice is fine."""
        if self._held():
            remove_file(self.path)

    def _held(self) -> bool:
        """Whether the lock file is there and this process wrote it."""
        try:
            return self.path.read_bytes() == self.owner
        except OSError:
            return False


def _locks(folder: Path) -> dict[int, Path]:
    """Lock files by attempt number."""
    matches = [match for name in list_folder(folder) if (match := _NAME.fullmatch(name))]
    return {int(match[1]): folder / match[0] for match in matches}


def _refuse_living(path: Path) -> None:
    """Raise unless the lock's owner is known to be dead."""
    owner = _owner(path)
    if owner is None:
        return
    host, pid, start = owner
    if host == socket.gethostname() and not _alive(pid, start):
        return
    try:
        age = max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:  # released at this moment
        return
    raise BusyError(
        f"{path.parent} is being written by process {pid} on {host} since {age:.0f} s",
        f"wait for it; if it no longer exists, remove {path}",
    )


def _owner(path: Path) -> tuple[str, int, str] | None:
    """Host, pid and start of a lock; None if it is gone, or its owner died while writing it."""
    deadline = time.monotonic() + _GRACE
    while True:
        try:
            document = json.loads(path.read_bytes())
            return str(document["host"]), int(document["pid"]), str(document["start"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            if time.monotonic() > deadline:
                return None
            time.sleep(_GRACE / 20)


def _alive(pid: int, start: str) -> bool:
    """Whether the process that took the lock runs: same pid and, where known, same start."""
    if not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's, but there
    state, *_, began = _stat(pid)[: _START + 1]
    if state in ("Z", "X"):  # killed, and its parent has not noticed yet
        return False
    return not start or not began or began == start


def _stat(pid: int) -> list[str]:
    """Fields 3 to 22 of /proc/<pid>/stat: state ... start in ticks; blank without /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return [""] * (_START + 1)
    return text.rpartition(")")[2].split()  # the name in () may hold spaces
