"""A process in which cells work, as the driver sees it; and what both kinds of it share.

`fork_server` forks a child for each cell, `thread_pool` starts a thread. Both read commands from
standard input and write events to standard output, one JSON object a line.
"""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1

Target = Callable[..., int]
"""Works on a task and returns an exit code; in a thread pool it is also given a `LockHandle`."""


class WorkerProcess:
    """Started at once, and ended by `close` or with this process.

    Args:
        module: What runs in it, of this package: "fork_server" or "thread_pool".
        words: Its arguments after this process's number.
        environment: Of the process, added to this one's.
        log: For what it prints itself.

    Attributes:
        is_thread_pool: Whether its cells are threads, so that a kill ends all of them.
    """

    def __init__(
        self, module: str, words: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self.log, self.is_thread_pool = log, module == "thread_pool"
        path = f"{__package__}.{module}"
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", path, str(os.getpid()), *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # the terminal's Ctrl-C is for the driver
                env={**os.environ, **environment},
            )
        assert self._process.stdin
        assert self._process.stdout
        self._in, self._out = self._process.stdin, self._process.stdout
        self._buffer = b""

    def fileno(self) -> int:
        """What becomes readable when there are events, for `select`."""
        return self._out.fileno()

    def start(self, cell: str, task: Mapping[str, Any], log: str, env: Mapping[str, str]) -> None:
        """Start a cell; the events `started` and `ended` follow.

        Args:
            cell: Its name in later commands and events.
            task: What the target is called with.
            log: File to which its output is appended.
            env: Variables to set in a forked child.
        """
        self._send(start=cell, task=task, log=log, env=env)

    def signal(self, cell: str, number: int) -> None:
        """Send a cell a signal; SIGKILL ends a thread pool as a whole, even if it does not read."""
        if self.is_thread_pool and number == signal.SIGKILL:
            self._process.kill()
        else:
            self._send(signal=cell, number=int(number))

    def _send(self, **command: object) -> None:
        """Send a command; if the process is gone, the next `events` returns None."""
        with contextlib.suppress(OSError):
            self._in.write(json.dumps(command).encode() + b"\n")
            self._in.flush()

    def events(self) -> list[dict[str, Any]] | None:
        """What has happened, once it is readable. None: the process is gone."""
        data = os.read(self._out.fileno(), 65536)
        if not data:
            self.close()
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(OSError):
            self._in.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._out.close()


# -- inside such a process -------------------------------------------------------------------------


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; end at once if it has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def start_up(words: Sequence[str]) -> Target:
    """Prepare this process: the target, imported with what its function `preload` imports.

    Args:
        words: The parent's process number and the target, "package.module:function".
    """
    parent, target = words[:2]
    die_with_parent(int(parent))
    if str(Path.cwd()) not in sys.path:  # `python -m` has "" there, which moves with the folder
        sys.path.insert(0, str(Path.cwd()))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the driver decides
    module_name, _, function = target.partition(":")
    module = importlib.import_module(module_name)
    getattr(module, "preload", lambda: None)()
    found: Target = getattr(module, function)
    return found


def send_event(**event: object) -> bool:
    """Tell the driver; False if it is gone."""
    try:
        os.write(1, json.dumps(event).encode() + b"\n")
    except OSError:
        return False
    return True
