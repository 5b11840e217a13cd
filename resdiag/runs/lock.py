"""One writer per run folder: a lock that names its owner and outlives no process."""

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from resdiag.errors import BusyError
from resdiag.runs.files import create_file, list_folder, remove_file

LEASE_S = 120.0
"""Seconds without a beat after which an owner may be taken for gone, if the asker waits for it."""
BEAT_S = 10.0
"""Seconds between beats: a network file system may show the last ones a minute late."""

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
    def take(cls, folder: Path, patience: float | None = None) -> "Lock":
        """Become the only writer of `folder`.

        Args:
            folder: What to lock.
            patience: Seconds to watch an owner that seems to live, on this host or another one;
                one that does not beat in this time has lost the folder and can commit no more.
                None takes no living owner's place.

        Raises:
            BusyError: A living process has it; the message names host, pid and age.
            StorageError: The lock cannot be written.
        """
        found = _locks(folder)
        silent = {path for path in found.values() if not _refuse_living(path, patience)}
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
            lock._settle(folder, silent)
        except BusyError:
            lock.release()
            raise
        return lock

    def _settle(self, folder: Path, silent: Collection[Path]) -> None:
        """Remove outnumbered locks; look once more, as a rival may have counted from others."""
        for path in _locks(folder).values():
            if path != self.path:
                if path not in silent:
                    _refuse_living(path)
                remove_file(path)

    def beat(self) -> None:
        """Renew the lock's heartbeat; a lock that was lost stays lost."""
        with contextlib.suppress(OSError):
            os.utime(self.path)

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


class Heartbeat:
    """Calls `beat` every few seconds from a thread while entered; a context manager.

    So that other processes can tell a lock's living owner from one that is gone.

    Args:
        beat: A lock's.
        every: Seconds.
    """

    def __init__(self, beat: Callable[[], None], every: float = BEAT_S) -> None:
        self._beat, self._every = beat, every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="resdiag-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._every):
            self._beat()


def _locks(folder: Path) -> dict[int, Path]:
    """Lock files by attempt number."""
    matches = [match for name in list_folder(folder) if (match := _NAME.fullmatch(name))]
    return {int(match[1]): folder / match[0] for match in matches}


@dataclass(frozen=True)
class Holder:
    """Who has a folder.

    Attributes:
        host: Its machine.
        pid: Its process.
        age: Seconds since it took the lock or last beat, by the clocks of both machines.
        alive: Whether it seems to live: beats, and is a process if it is of this machine.
    """

    host: str
    pid: int
    age: float
    alive: bool


def find_holder(folder: Path) -> Holder | None:
    """The owner of a folder's newest lock; None if it is not locked."""
    path = max(_locks(folder).items(), default=(0, None))[1]
    owner = path and _owner(path)
    if not path or not owner:
        return None
    host, pid, start = owner
    try:
        age = max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:  # released at this moment
        return None
    here = host != socket.gethostname() or _alive(pid, start)
    return Holder(host, pid, age, here and age < LEASE_S)


def _refuse_living(path: Path, patience: float | None = None) -> bool:
    """Raise unless the lock's owner is known to be dead, or silent for as long as `patience`.

    Returns:
        Whether the owner is dead; False if it was just silent.
    """
    owner = _owner(path)
    if owner is None:
        return True
    host, pid, start = owner
    here = host == socket.gethostname()
    if here and not _alive(pid, start):
        return True
    if patience is not None and _is_silent(path, patience, lambda: here and not _alive(pid, start)):
        return False
    try:
        age = max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:  # released at this moment
        return True
    raise BusyError(
        f"{path.parent} is being written by process {pid} on {host} since {age:.0f} s",
        f"wait for it; if it no longer exists, remove {path}",
    )


def _is_silent(path: Path, patience: float, is_dead: Callable[[], bool]) -> bool:
    """Watch a lock for beats; only this process's clock is used."""

    def last_beat() -> int | None:
        try:
            return path.stat().st_mtime_ns
        except OSError:
            return None

    first, deadline = last_beat(), time.monotonic() + patience
    while time.monotonic() < deadline:
        if last_beat() != first:
            return False
        if is_dead():
            return True
        time.sleep(min(1.0, patience / 10))
    return last_beat() == first


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
