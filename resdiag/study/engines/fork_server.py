"""A process that has imported everything and forks a child for each cell: a start in no time.

It runs no thread and no operation of PyTorch before it forks, so that a child is as good as a fresh
process. Nothing outlives its parent: the kernel kills this process with the driver, and the cells
with this process (PR_SET_PDEATHSIG). Where there is no such signal, the end of standard input ends
this process, and the end of a pipe the cells.

Why not `multiprocessing`'s forkserver with `set_forkserver_preload`: its children inherit the
writing end of the pipe by whose end it notices that the driver died, so after a `kill -9` of the
driver it goes on as long as a cell does (tried with Python 3.11). It has one server and one
environment per driver, runs the driver's main module again in every child, reports a lost server
as exit code 255, which a cell may return too, and gives children no log of their own.
"""

import contextlib
import json
import os
import select
import signal
import sys
import threading
import traceback
from typing import Any

from resdiag.study.engines.worker_process import Target, die_with_parent, send_event, start_up

_POLL_S = 0.02  # a handler of SIGCHLD would have to be undone in every child


class ForkServer:
    """The loop of the process.

    Args:
        target: What a child does with its task; its result is the exit code.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._children: dict[int, str] = {}
        self._buffer = b""
        # the children hold the reading end: they read its end when this process is gone
        self._lifeline, self._life = os.pipe()

    def run(self) -> None:
        """Serve until stdin ends, which is when the driver does."""
        serving = send_event(ready=os.getpid())
        while serving:
            if select.select([0], [], [], _POLL_S if self._children else None)[0]:
                serving = self._read_commands()
            serving = self._reap() and serving
        for pid in self._children:
            _kill_group(pid)

    def _read_commands(self) -> bool:
        """Obey what has arrived; False at the end of stdin."""
        data = os.read(0, 65536)
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
        send_event(started=command["start"], pid=pid)

    def _become_child(self, parent: int, command: dict[str, Any]) -> None:
        """Leave everything of the server behind: its pipes, signals, group and environment."""
        os.setsid()
        die_with_parent(parent)
        for number in (signal.SIGINT, signal.SIGTERM):
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

    def _signal(self, cell: str, number: int) -> None:
        for pid in [pid for pid, name in self._children.items() if name == cell]:
            if number == signal.SIGKILL:
                _kill_group(pid)
            else:
                os.kill(pid, number)

    def _reap(self) -> bool:
        """Report the children that have ended; False if the driver is gone."""
        alive = True
        while alive and self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            cell = self._children.pop(pid)
            alive = send_event(ended=cell, code=os.waitstatus_to_exitcode(status))
        return alive


def _kill_group(pid: int) -> None:
    """Kill a cell and its child processes; its group may not be there yet, or any more."""
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.stdout = sys.stderr  # stdout is for events
    ForkServer(start_up(sys.argv[1:])).run()
