"""The engine of one machine: a slot per GPU or core, a process per cell, and a watch over them.

Or a crew per GPU: one process in which several cells take turns.
"""

import os
import select
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence

from resdiag.errors import ResdiagError, UsageError
from resdiag.runs.files import make_folder
from resdiag.study.engines.attempts import Attempts
from resdiag.study.engines.host import Host
from resdiag.study.engines.job import Job
from resdiag.study.work import STOPPED
from resdiag.training.interrupt import Interrupt

TARGET = "resdiag.study.work:start"
_LOOK_S = 1.0
_LOST = 3  # nurseries in a row that die without a cell having ended

_FORKING = {
    "OPENBLAS_NUM_THREADS": "1",  # its threads would not survive the fork
    # asking CUDA how many GPUs there are would spoil it for the forked cells
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}

Slot = dict[str, str]
"""The environment of the cells that run in a slot."""


class Local:
    """Starts cells in slots until each is done, failed or in somebody else's hands.

    Args:
        job: What to do.
        slots: Where; see `find_slots`.
        each: Cells per device that share a process, a crew; 1 gives every cell its own.
        target: What a cell's process calls with its task; tests have others.
    """

    def __init__(
        self, job: Job, slots: Sequence[Slot], each: int = 1, target: str = TARGET
    ) -> None:
        self._job, self._free = job, list(slots)
        self._each, self._target = each, target
        self._waiting = deque((0.0, cell) for cell in job.cells)
        self._running: dict[str, tuple[Slot, Host]] = {}
        self._attempts = Attempts(job)
        self._hosts: dict[str, Host] = {}
        self._loners: set[str] = set()  # cells whose crew has died
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
                for host in self._hosts.values():
                    host.close()
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
        make_folder(self._job.folder(cell))
        host = self._find_host(cell, slot)
        self._running[cell] = slot, host
        self._attempts.begin(cell)
        # a slot's process sees its own GPU and no other, whatever number it has here
        task = {**self._job.task(cell), "device": self._job.device.partition(":")[0]}
        host.send({"start": cell, "task": task, "log": self._job.log(cell), "env": slot})

    def _find_host(self, cell: str, slot: Slot) -> Host:
        """The crew of the slot's device, or the nursery; started if it is not there."""
        module, words, more = "nursery", [self._target], _FORKING
        if self._each > 1 and cell not in self._loners:
            module, words, more = "crew", [self._target, str(self._each)], slot
        key = f"{module} {slot}" if module == "crew" else module
        if key not in self._hosts:
            environment = {**self._job.environment(), **more}
            log = self._job.folder(cell).parent / f"{module}.log"
            self._hosts[key] = Host(module, words, environment, log)
        return self._hosts[key]

    def _listen(self) -> None:
        """Wait a moment for news of the cells."""
        # without any, nothing runs: others have what is left
        for host in select.select(list(self._hosts.values()), [], [], 0.2)[0]:
            events = host.events()
            if events is None:
                self._host_died(host)
            for event in events or []:
                if "ended" in event:
                    self._lost = 0
                    self._end(event["ended"], event["code"])

    def _end(self, cell: str, code: int) -> None:
        """A cell's process has ended: is the cell done, failed, or to be started again?"""
        self._free.append(self._running.pop(cell)[0])
        if self._stopping and (code < 0 or code in (STOPPED, 130)):
            self._attempts.drop(cell)
            return
        again = self._attempts.end(cell, code)
        if again is not None:
            self._waiting.append((time.monotonic() + again, cell))

    def _check_hung(self) -> None:
        """Kill cells that have not moved for too long."""
        for cell in self._attempts.find_hung():
            if self._running[cell][1].is_crew:
                self._job.say(f"{cell}: does not get on; its crew is killed for it")
            self._signal(cell, signal.SIGKILL)

    def _stop(self) -> None:
        """Ask every cell to commit and stop; a second signal ends this process and them at once."""
        self._stopping = True
        self._job.say(f"stopping {len(self._running)} cells after their next commit")
        for cell in self._running:
            self._signal(cell, signal.SIGTERM)

    def _signal(self, cell: str, number: int) -> None:
        self._running[cell][1].signal(cell, number)

    def _host_died(self, host: Host) -> None:
        """All its cells died with it. None is blamed: of a crew, nobody knows which one it was.

        So each of them goes on in a process of its own, where the guilty one dies alone.
        """
        self._hosts = {key: one for key, one in self._hosts.items() if one is not host}
        cells = [cell for cell, (_, its) in self._running.items() if its is host]
        if host.is_crew:
            self._loners.update(cells)
            if cells:
                self._job.say(f"a crew of {len(cells)} cells died; each goes on in its own process")
        else:
            self._lost += 1
            if self._lost >= _LOST:
                raise ResdiagError("processes for cells cannot be started", f"see {host.log}")
        for cell in cells:
            self._attempts.drop(cell)
            self._free.append(self._running.pop(cell)[0])
            self._waiting.append((0.0, cell))


def find_slots(job: Job, wanted: int | None, each: int = 1) -> list[Slot]:
    """The slots of this machine: per GPU as many cells as fit, else a cell per so many cores.

    Args:
        job: What a cell needs.
        wanted: Number of slots; None takes what fits.
        each: If more than 1, so many per GPU instead; without a GPU, so many in all.

    Raises:
        UsageError: There is not even one, or a cell cannot share a process.
    """
    if each > 1:
        _check_sharing(job)
    needs = job.study.file.resources
    gpus = [] if job.device == "cpu" else find_gpus()
    if job.device not in ("auto", "cpu"):
        index = int(job.device.partition(":")[2] or 0)
        if index >= len(gpus):
            raise UsageError(f"device '{job.device}' is not here", f"{len(gpus)} GPUs found")
        gpus = gpus if job.device == "cuda" else [gpus[index]]
    if not gpus:
        fitting = max(1, len(os.sched_getaffinity(0)) // needs.threads)
        fitting = each if each > 1 else fitting
        return [{"CUDA_VISIBLE_DEVICES": ""} for _ in range(wanted or fitting)]
    if needs.gpus > 1:
        raise UsageError("resources.gpus is more than 1, and a cell uses one GPU")
    fitting = each if each > 1 else int(1 / needs.gpus)
    slots = [{"CUDA_VISIBLE_DEVICES": gpu} for _ in range(fitting) for gpu in gpus]
    return [slots[i % len(slots)] for i in range(wanted or len(slots))]


def _check_sharing(job: Job) -> None:
    """Refuse cells whose numbers would depend on their neighbours.

    torch.compile keeps the graphs of a function, not of a network, gives up after eight of them,
    and then runs it uncompiled, without a word.
    """
    for cell in job.cells:
        if job.study.cell(cell).request.backend == "compile":
            raise UsageError(
                f"{cell}: backend 'compile' needs a process of its own",
                "leave out --cells-per-device, or choose backend eager, fast, graph or auto",
            )


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
