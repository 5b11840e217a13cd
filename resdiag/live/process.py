"""The page of a training, served by a process of its own that reads what this one writes.

A thread beside the training would take turns with it for the interpreter, and matplotlib's settings
belong to the whole process.
"""

import atexit
import contextlib
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from resdiag.live.snapshot import Snapshot
from resdiag.runs.environment import environment
from resdiag.runs.folder import Run
from resdiag.runs.watched import write_run


class Page:
    """Writes a training to a temporary run folder, and serves it on 127.0.0.1 until it ends."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="resdiag-live-"))
        self._environment = environment("cpu", "")
        token = secrets.token_urlsafe(16)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.url = f"http://127.0.0.1:{listening.getsockname()[1]}/?token={token}"
            command = [sys.executable, "-m", "resdiag.live.server", str(listening.fileno())]
            self._server = subprocess.Popen(
                [*command, str(self._folder)],
                stdin=subprocess.PIPE,  # the server ends when this end of it closes
                pass_fds=[listening.fileno()],
                text=True,
            )
        assert self._server.stdin is not None
        # not an argument, which every user of the machine can read
        self._server.stdin.write(f"{token}\n")
        self._server.stdin.flush()
        atexit.register(self.close)
        print(f"resdiag: {self.url}", file=sys.stderr, flush=True)

    def show(self, snapshot: Snapshot, run: Run) -> None:
        """Write the run anew; the page notices."""
        running = replace(run, status=snapshot.status)
        write_run(running, self._folder / "run", environment=self._environment, overwrite=True)

    def close(self) -> None:
        """End the server and remove the folder; safe to call twice."""
        atexit.unregister(self.close)
        if self._server.stdin is not None:
            with contextlib.suppress(OSError):
                self._server.stdin.close()
        try:
            self._server.wait(timeout=10)
        except subprocess.TimeoutExpired:  # it draws
            self._server.kill()
            self._server.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
