"""Work in children of a process that has imported everything: cheap to start, and fresh.

The test's own process cannot fork them: once a backward pass has run in it, autograd refuses to run
in a forked child ("Unable to handle autograd's threading in combination with fork-based
multiprocessing"). So they come from the fork server of the study engine, which runs no operation.
"""

import os
import select
import tempfile
import time
from pathlib import Path

from resdiag.study.engines.worker_process import WorkerProcess

HERE = Path(__file__).resolve().parent


class Forks:
    """Starts functions of this module in forked children; the server starts with the first."""

    def __init__(self):
        self._server, self._pids, self._codes = None, {}, {}

    def start(self, function, arguments, log=os.devnull):
        """Call a function of this module in a child, whose output is appended to `log`; its pid."""
        if self._server is None:
            folder = Path(tempfile.mkdtemp())
            paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
            environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
            self._server = WorkerProcess(
                "fork_server", ["forking:call"], environment, folder / "fork_server.log"
            )
        task = {"function": function, "arguments": arguments}
        name = str(time.monotonic_ns())
        self._server.start(name, task, str(log))
        while name not in self._pids:
            self._listen(60)
        return self._pids[name]

    def wait(self, pid, seconds):
        """The child's exit code, or None if it is still running after `seconds`."""
        deadline = time.monotonic() + seconds
        while pid not in self._codes and time.monotonic() < deadline:
            self._listen(max(0, deadline - time.monotonic()))
        return self._codes.pop(pid, None)

    def close(self):
        if self._server is not None:
            self._server.close()
            self._server = None

    def _listen(self, seconds):
        if not select.select([self._server], [], [], seconds)[0]:
            return
        events = self._server.events()
        assert events is not None, "the fork server died"
        for event in events:
            if "started" in event:
                self._pids[event["started"]] = event["pid"]
            elif "ended" in event:
                self._codes[self._pids.pop(event["ended"])] = event["code"]


def call(task):
    return globals()[task["function"]](**task["arguments"])


def preload():
    from resdiag.study.work import preload

    preload()


def run_cell(root, asked):
    import torch
    from tiny_training import run_tiny_cell

    torch.set_num_threads(1)
    run_tiny_cell(Path(root), **asked)
    return 0


def run_command(words):
    import torch

    from resdiag.cli.main import app

    torch.set_num_threads(1)
    return app.run(words)
