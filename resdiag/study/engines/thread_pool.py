"""A process whose cells are threads: they share one device, and one of them works at a time.

A thread cannot be killed; to do so, kill the process. What belongs to a process, the
cells have in common: `training.fair_lock` keeps them apart there, and each has its own CUDA stream
and its own log.
"""

import gc
import io
import json
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from resdiag.study.engines.worker_process import Target, send_event, start_up
from resdiag.study.work import STOPPED
from resdiag.training.fair_lock import FairLock, LockHandle


class PerThreadStream(io.TextIOBase):
    """A standard stream that writes into the file of the thread that calls it.

    Args:
        default: Where threads write that have no file of their own.
    """

    def __init__(self, default: TextIO) -> None:
        super().__init__()
        self._default, self._own = default, threading.local()

    @contextmanager
    def to(self, file: TextIO) -> Iterator[None]:
        """While inside, this thread writes into `file`."""
        self._own.file = file
        try:
            yield
        finally:
            del self._own.file

    def write(self, text: str) -> int:
        """Write into the calling thread's file."""
        return self._file().write(text)

    def flush(self) -> None:
        """Flush the calling thread's file."""
        self._file().flush()

    def _file(self) -> TextIO:
        file: TextIO = getattr(self._own, "file", self._default)
        return file


class ThreadWorkerPool:
    """The main thread: it reads commands, and starts a thread for each cell.

    Args:
        target: Called by a cell's thread with its task and its `LockHandle`; returns an exit code.
        most: How many cells there may be at a time.
        output: What stands in for standard output and error.
    """

    def __init__(self, target: Target, most: int, output: PerThreadStream) -> None:
        self._target, self._output, self._lock = target, output, FairLock()
        self.handles: dict[str, LockHandle] = {}
        # PyTorch has 32 streams and reuses them in order: made once, no two threads share one
        cuda = torch.cuda.is_available()
        self._streams = [torch.cuda.Stream() if cuda else None for _ in range(most)]

    def run(self) -> None:
        """Serve until stdin ends, which is when the driver does; then nothing is left to do."""
        # cells change the filters while they train, and put them back in any order
        warnings.simplefilter("ignore")
        _send(ready=os.getpid())
        for line in sys.stdin.buffer:
            command = json.loads(line)
            if "start" in command:
                self._start(command)
            elif command["signal"] in self.handles:
                self.handles[command["signal"]].stop(command["number"])
        os._exit(0)

    def _start(self, command: dict[str, Any]) -> None:
        cell = command["start"]
        self.handles[cell] = LockHandle(self._lock)
        threading.Thread(target=self.serve, args=(command,), name=cell, daemon=True).start()
        _send(started=cell, pid=os.getpid())

    def serve(self, command: dict[str, Any]) -> None:
        """A cell's thread, up to the event of its end."""
        cell, stream, code = command["start"], self._streams.pop(), 1
        handle = self.handles[cell]
        try:
            with Path(command["log"]).open("a", buffering=1) as log, self._output.to(log):
                code = self._work(command["task"], handle, stream)
                if code not in (0, *STOPPED):
                    _check_device()
        except OSError:
            traceback.print_exc()
        with handle:  # frees the cell's network, and not while another thread captures a graph
            gc.collect()
        del self.handles[cell]
        self._streams.append(stream)
        _send(ended=cell, code=code)

    def _work(
        self, task: dict[str, Any], handle: LockHandle, stream: torch.cuda.Stream | None
    ) -> int:
        try:
            with torch.cuda.stream(stream):  # None does nothing
                return self._target(task, handle)
        except SystemExit as exit:
            return exit.code if isinstance(exit.code, int) else 1
        except BaseException:
            traceback.print_exc()
            return 1


def _check_device() -> None:
    """End the process if its device is unusable: then no cell can go on, whichever caused it."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        traceback.print_exc()
        os._exit(1)


def _send(**event: object) -> None:
    if not send_event(**event):  # the driver is gone
        os._exit(1)


if __name__ == "__main__":
    streams = PerThreadStream(sys.stderr)  # stdout is for events
    sys.stdout = sys.stderr = streams
    ThreadWorkerPool(start_up(sys.argv[1:]), int(sys.argv[3]), streams).run()
