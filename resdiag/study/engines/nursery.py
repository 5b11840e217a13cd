"""A process that has imported everything and forks a child for each cell: a start in no time.

It speaks JSON lines: commands on stdin, events on stdout. It runs no thread and no operation of
PyTorch before it forks, so that a child is as good as a fresh process. Nothing outlives its parent:
the kernel kills the nursery with the driver and the cells with the nursery (PR_SET_PDEATHSIG), and
where there is no such thing, the end of stdin tells the nursery, and a pipe the cells.
"""

import contextlib
import ctypes
import importlib
import json
import os
import selectors
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

_PR_SET_PDEATHSIG = 1

Target = Callable[..., int]
"""Called with a task, in a crew also with the cell's turn."""


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; end at once if it has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class Nursery:
    """The loop of the nursery's process.

    Args:
        target: What a child does with its task; its result is the exit code.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._children: dict[int, str] = {}
        self._buffer = b""
        self._wake, wake_end = os.pipe()
        # the children hold the reading end: when all of the nursery is gone, they read its end
        self._lifeline, self._life = os.pipe()
        for end in (self._wake, wake_end):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake_end)
        signal.signal(signal.SIGCHLD, _nothing)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the driver decides

    def run(self) -> None:
        """Serve until stdin ends, which is when the driver does."""
        selector = selectors.DefaultSelector()
        selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        selector.register(self._wake, selectors.EVENT_READ)
        self._tell(ready=os.getpid())
        serving = True
        while serving:
            for key, _ in selector.select():
                if key.fd == self._wake:
                    os.read(self._wake, 4096)
                else:
                    serving = self._read_commands()
            self._reap()
        self._kill_all()

    def _read_commands(self) -> bool:
        """Obey what has arrived; False at the end of stdin."""
        data = os.read(sys.stdin.fileno(), 65536)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            command = json.loads(line)
            if "start" in command:
                self._start(command)
            else:
                self._signal(command["signal"], command["number"])
        return bool(data)

    def _start(self, command: dict[str, Any]) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                self._become_child(parent, command)
                code = self._target(command["task"])
            except SystemExit as exit:
                code = exit.code if isinstance(exit.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        self._children[pid] = command["start"]
        self._tell(started=command["start"], pid=pid)

    def _become_child(self, parent: int, command: dict[str, Any]) -> None:
        """Leave everything of the nursery behind: its pipes, signals, group and environment."""
        os.setsid()
        die_with_parent(parent)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.close(self._life)
        silence = os.open(os.devnull, os.O_RDONLY)
        log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for end, place in ((silence, 0), (log, 1), (log, 2)):
            os.dup2(end, place)
        os.environ.update(command["env"])
        if sys.platform != "linux":
            threading.Thread(target=self._watch_parent, daemon=True).start()

    def _watch_parent(self) -> None:
        os.read(self._lifeline, 1)
        os._exit(1)

    def _signal(self, key: str, number: int) -> None:
        for pid in [pid for pid, name in self._children.items() if name == key]:
            os.kill(pid, number)
            if number == signal.SIGKILL:
                self._kill_group(pid)

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            key = self._children.pop(pid)
            self._tell(ended=key, code=os.waitstatus_to_exitcode(status))

    def _kill_all(self) -> None:
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
            self._kill_group(pid)

    def _kill_group(self, pid: int) -> None:
        """Whatever a cell has started; a group that is not there yet, or any more, is fine."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)

    def _tell(self, **event: object) -> None:
        try:
            os.write(1, json.dumps(event).encode() + b"\n")
        except OSError:  # the driver is gone
            self._kill_all()
            os._exit(1)


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler, so that the signal wakes the loop up."""


def find_target(name: str) -> Target:
    """Import "package.module:function"; a function `preload` beside it is called once."""
    module_name, _, function = name.partition(":")
    module = importlib.import_module(module_name)
    getattr(module, "preload", lambda: None)()
    target: Target = getattr(module, function)
    return target


def main(words: list[str]) -> None:
    """`python -m resdiag.study.engines.nursery PARENT TARGET`."""
    die_with_parent(int(words[0]))
    Nursery(find_target(words[1])).run()


if __name__ == "__main__":
    # what is imported prints to stderr if it must; stdout is for events
    sys.stdout = sys.stderr
    sys.path[:0] = [str(Path.cwd())] if str(Path.cwd()) not in sys.path else []
    main(sys.argv[1:])
