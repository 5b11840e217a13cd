"""A process whose cells are threads: they share one device, and take turns at it.

It speaks the nursery's JSON lines, but for a signal that kills: a thread cannot be killed, so who
wants that kills the process. What belongs to a process, cells of a crew have in common: the turn
(`training.turns`) keeps them apart there, and each has its own CUDA stream and its own log.
"""

import gc
import io
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from resdiag.study.engines.nursery import Target, die_with_parent, find_target
from resdiag.study.work import STOPPED
from resdiag.training.turns import Ring, Seat


class Voices(io.TextIOBase):
    """A standard stream that each thread has for itself.

    Args:
        rest: Where threads write that have no file of their own.
    """

    def __init__(self, rest: TextIO) -> None:
        super().__init__()
        self._rest, self._own = rest, threading.local()

    @contextmanager
    def to(self, file: TextIO) -> Iterator[None]:
        """While inside, this thread writes into `file`."""
        self._own.file = file
        try:
            yield
        finally:
            del self._own.file

    def write(self, text: str) -> int:
        """Write where the calling thread does."""
        return self._file().write(text)

    def flush(self) -> None:
        """Flush what the calling thread has written."""
        self._file().flush()

    def _file(self) -> TextIO:
        file: TextIO = getattr(self._own, "file", self._rest)
        return file


class Crew:
    """The main thread: it obeys, and starts a thread for each cell.

    Args:
        target: What a cell's thread does with its task and its turn; its result is the exit code.
        seats: How many cells there may be at a time.
        voices: What stands in for standard output and error.
    """

    def __init__(self, target: Target, seats: int, voices: Voices) -> None:
        self._target, self._voices, self._ring = target, voices, Ring()
        self._seats: dict[str, Seat] = {}
        # PyTorch has 32 streams and hands them out in turn: made once, no two seats have the same
        cuda = torch.cuda.is_available()
        self._streams = [torch.cuda.Stream() if cuda else None for _ in range(seats)]

    def run(self) -> None:
        """Serve until stdin ends, which is when the driver does; then nothing is left to do."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the driver decides
        # cells change the filters while they train, and put them back in any order
        warnings.simplefilter("ignore")
        _tell(ready=os.getpid())
        for line in sys.stdin.buffer:
            command = json.loads(line)
            if "start" in command:
                self._start(command)
            elif command["signal"] in self._seats:
                self._seats[command["signal"]].stop(command["number"])
        os._exit(0)

    def _start(self, command: dict[str, Any]) -> None:
        cell, seat = command["start"], Seat(self._ring)
        self._seats[cell] = seat
        threading.Thread(target=self._serve, args=(command, seat), name=cell, daemon=True).start()
        _tell(started=cell, pid=os.getpid())

    def _serve(self, command: dict[str, Any], seat: Seat) -> None:
        """A cell's thread, from its beginning to the word of its end."""
        cell, stream, code = command["start"], self._streams.pop(), 1
        try:
            with Path(command["log"]).open("a", buffering=1) as log, self._voices.to(log):
                code = self._work(command["task"], seat, stream)
                if code not in (0, STOPPED):
                    _check_device()
        except OSError:
            traceback.print_exc()
        with seat:  # a network's memory goes with its cell, and not while another is captured
            gc.collect()
        del self._seats[cell]
        self._streams.append(stream)
        _tell(ended=cell, code=code)

    def _work(self, task: dict[str, Any], seat: Seat, stream: torch.cuda.Stream | None) -> int:
        try:
            with torch.cuda.stream(stream):  # None does nothing
                return self._target(task, seat)
        except SystemExit as exit:
            return exit.code if isinstance(exit.code, int) else 1
        except BaseException:
            traceback.print_exc()
            return 1


def _check_device() -> None:
    """End the process if its device does nothing any more: no cell could go on, whoever did it."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        traceback.print_exc()
        os._exit(1)


def _tell(**event: object) -> None:
    try:
        os.write(1, json.dumps(event).encode() + b"\n")
    except OSError:  # the driver is gone
        os._exit(1)


def main(words: list[str]) -> None:
    """`python -m resdiag.study.engines.crew PARENT TARGET SEATS`."""
    die_with_parent(int(words[0]))
    # stdout is for events; what has no cell goes to the crew's own log
    voices = Voices(sys.stderr)
    sys.stdout = sys.stderr = voices
    Crew(find_target(words[1]), int(words[2]), voices).run()


if __name__ == "__main__":
    sys.path[:0] = [str(Path.cwd())] if str(Path.cwd()) not in sys.path else []
    main(sys.argv[1:])
