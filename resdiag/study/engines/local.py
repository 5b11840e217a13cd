"""The engine of one machine: a slot per GPU or core, a process per cell, and a watch over them."""

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resdiag.errors import ResdiagError, UsageError
from resdiag.runs.files import make_folder
from resdiag.study.engines.attempts import Attempts
from resdiag.study.engines.job import Job
from resdiag.study.work import STOPPED
from resdiag.training.interrupt import Interrupt

TARGET = "resdiag.study.work:start"
_LOOK_S = 1.0
_LOST = 3  # nurseries in a row that die without a cell having ended

Slot = dict[str, str]
"""The environment of the cells that run in a slot."""


class Local:
    """Starts cells in slots until each is done, failed or in somebody else's hands.

    Args:
        job: What to do.
        slots: Where; see `find_slots`.
        target: What a cell's process calls with its task; tests have others.
    """

    def __init__(self, job: Job, slots: Sequence[Slot], target: str = TARGET) -> None:
        self._job, self._free = job, list(slots)
        self._target = target
        self._waiting = deque((0.0, cell) for cell in job.cells)
        self._running: dict[str, Slot] = {}
        self._attempts = Attempts(job)
        self._nursery: _Child | None = None
        self._lost = 0
        self._stopping = False

    def run(self) -> int:
        """Run to the end of the last cell, or until a signal: then every cell commits and stops.

        Returns:
            The signal, or 0.

        Raises:
            ResdiagError: Processes cannot be started.
        """
        looked = 0.0
        with Interrupt() as interrupt:
            try:
                while self._running or (self._waiting and not self._stopping):
                    self._fill()
                    self._listen()
                    self._check_hung()
                    if interrupt.signal and not self._stopping:
                        self._stop()
                    if time.monotonic() - looked > _LOOK_S:
                        looked = time.monotonic()
                        self._job.look()
            finally:
                if self._nursery:
                    self._nursery.close()
        return interrupt.signal

    def _fill(self) -> None:
        """Start cells where there is room."""
        now = time.monotonic()
        for _ in range(len(self._waiting)):
            if not self._free or self._stopping:
                return
            due, cell = self._waiting.popleft()
            if due > now:
                self._waiting.append((due, cell))
                continue
            self._start(cell, self._free.pop())

    def _start(self, cell: str, slot: Slot) -> None:
        folder = self._job.folder(cell)
        make_folder(folder)
        if self._nursery is None:
            log = folder.parent / "nursery.log"
            self._nursery = _Child(self._target, self._job.environment(), log)
        self._running[cell] = slot
        self._attempts.begin(cell)
        about = {"task": self._job.task(cell), "log": self._job.log(cell), "env": slot}
        self._nursery.send({"start": cell, **about})

    def _listen(self) -> None:
        """Wait a moment for news of the cells."""
        if self._nursery is None:  # nothing runs: others have what is left
            time.sleep(0.2)
            return
        events = self._nursery.events(0.2)
        if events is None:
            self._nursery_died()
            return
        for event in events:
            if "ended" in event:
                self._lost = 0
                self._end(event["ended"], event["code"])

    def _end(self, cell: str, code: int) -> None:
        """A cell's process has ended: is the cell done, failed, or to be started again?"""
        self._free.append(self._running.pop(cell))
        if self._stopping and (code < 0 or code in (STOPPED, 130)):
            self._attempts.drop(cell)
            return
        again = self._attempts.end(cell, code)
        if again is not None:
            self._waiting.append((time.monotonic() + again, cell))

    def _check_hung(self) -> None:
        """Kill cells that have not moved for too long."""
        for cell in self._attempts.find_hung():
            self._signal(cell, signal.SIGKILL)

    def _stop(self) -> None:
        """Ask every cell to commit and stop; a second signal ends this process and them at once."""
        self._stopping = True
        self._job.say(f"stopping {len(self._running)} cells after their next commit")
        for cell in self._running:
            self._signal(cell, signal.SIGTERM)

    def _signal(self, cell: str, number: int) -> None:
        if self._nursery:
            self._nursery.send({"signal": cell, "number": int(number)})

    def _nursery_died(self) -> None:
        """All cells died with it; they are not to blame."""
        assert self._nursery is not None
        log, self._nursery = self._nursery.log, None
        self._lost += 1
        if self._lost >= _LOST:
            raise ResdiagError("processes for cells cannot be started", f"see {log}")
        for cell, slot in self._running.items():
            self._attempts.drop(cell)
            self._free.append(slot)
            self._waiting.append((0.0, cell))
        self._running.clear()


class _Child:
    """The nursery's process, from the driver's side."""

    def __init__(self, target: str, environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        module = "resdiag.study.engines.nursery"
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(os.getpid()), target],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # the terminal's Ctrl-C is for the driver
                env={
                    **os.environ,
                    **environment,
                    "OPENBLAS_NUM_THREADS": "1",  # its threads would not survive the fork
                    # asking CUDA how many GPUs there are would spoil it for the forked cells
                    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
                },
            )
        assert self._process.stdin
        assert self._process.stdout
        self._in, self._out = self._process.stdin, self._process.stdout
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._out, selectors.EVENT_READ)
        self._buffer = b""

    def send(self, command: dict[str, Any]) -> None:
        """Send a command; a nursery that is gone says so at the next `events`."""
        try:
            self._in.write(json.dumps(command).encode() + b"\n")
            self._in.flush()
        except OSError:
            return

    def events(self, timeout: float) -> list[dict[str, Any]] | None:
        """What has happened; waits up to `timeout` seconds. None: the nursery is gone."""
        if not self._selector.select(timeout):
            return []
        data = os.read(self._out.fileno(), 65536)
        if not data:
            self.close()
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """End the nursery and all that it started."""
        with contextlib.suppress(OSError):
            self._in.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._out.close()
        self._selector.close()


def find_slots(job: Job, wanted: int | None) -> list[Slot]:
    """The slots of this machine: per GPU as many cells as fit, else a cell per so many cores.

    Args:
        job: What a cell needs.
        wanted: Number of slots; None takes what fits.

    Raises:
        UsageError: There is not even one.
    """
    needs = job.study.file.resources
    gpus = [] if job.device == "cpu" else find_gpus()
    if job.device not in ("auto", "cpu"):
        index = int(job.device.partition(":")[2] or 0)
        if index >= len(gpus):
            raise UsageError(f"device '{job.device}' is not here", f"{len(gpus)} GPUs found")
        gpus = gpus if job.device == "cuda" else [gpus[index]]
    if not gpus:
        fitting = max(1, len(os.sched_getaffinity(0)) // needs.threads)
        return [{"CUDA_VISIBLE_DEVICES": ""} for _ in range(wanted or fitting)]
    if needs.gpus > 1:
        raise UsageError("resources.gpus is more than 1, and a cell uses one GPU")
    slots = [{"CUDA_VISIBLE_DEVICES": gpu} for _ in range(int(1 / needs.gpus)) for gpu in gpus]
    return [slots[i % len(slots)] for i in range(wanted or len(slots))]


def find_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
    return [str(index) for index in range(len(lines))] if done.returncode == 0 else []
