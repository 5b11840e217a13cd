"""A process that has cells, from the driver's side: the nursery or a crew."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Host:
    """Started at once; it is told what to do and tells what has happened.

    Args:
        module: What runs in it, beside this module: "nursery" or "crew".
        words: What it is told after its parent's number.
        environment: Of the process, added to this one's.
        log: For what it prints itself.
    """

    def __init__(
        self, module: str, words: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self.log, self.is_crew = log, module == "crew"
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

    def send(self, command: Mapping[str, Any]) -> None:
        """Send a command; a process that is gone says so at the next `events`."""
        try:
            self._in.write(json.dumps(command).encode() + b"\n")
            self._in.flush()
        except OSError:
            return

    def signal(self, cell: str, number: int) -> None:
        """Send a cell a signal. A crew dies of SIGKILL as a whole, even if it does not listen."""
        if self.is_crew and number == signal.SIGKILL:
            self._process.kill()
        else:
            self.send({"signal": cell, "number": int(number)})

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
