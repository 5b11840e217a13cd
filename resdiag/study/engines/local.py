"""The engine of one machine: a slot per GPU or core, and a process per cell.

Or a process per GPU, in which several cells are threads that train by turns (`thread_pool`).
"""

import os
import select
import shutil
import signal
import subprocess
from collections.abc import Sequence

from resdiag.errors import ResdiagError, UsageError
from resdiag.runs.files import make_folder
from resdiag.study.engines.job import Attempts, Job
from resdiag.study.engines.worker_process import WorkerProcess
from resdiag.study.work import STOPPED
from resdiag.training.interrupt import Interrupt

TARGET = "resdiag.study.work:start"
_LOST = 3  # fork servers in a row that die without a cell having ended

_FORKING = {
    "OPENBLAS_NUM_THREADS": "1",  # its threads would not survive the fork
    # a process that asked CUDA for the number of GPUs could not use it after a fork
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}

Slot = dict[str, str]
"""The environment of the cells that run in a slot."""


class Local:
    """Starts cells in slots until each is done, has failed or is run by another driver.

    Args:
        job: What to do.
        slots: Where; see `find_slots`.
        each: Cells per device that share a process; 1 gives every cell its own.
        target: What a cell's process calls with its task; tests have others.
    """

    def __init__(
        self, job: Job, slots: Sequence[Slot], each: int = 1, target: str = TARGET
    ) -> None:
        self._job, self._free = job, list(slots)
        self._each, self._target = each, target
        self._running: dict[str, tuple[Slot, WorkerProcess]] = {}
        self._attempts = Attempts(job)
        self._processes: dict[str, WorkerProcess] = {}
        self._no_sharing: set[str] = set()  # cells whose shared process has died
        self._lost = 0
        self._stopping = False

    def run(self) -> int:
        """Run to the end of the last cell, or until a signal: then every cell commits and stops.

        Returns:
            The signal, or 0.

        Raises:
            ResdiagError: Processes cannot be started.
        """
        with Interrupt() as interrupt:
            try:
                while self._running or (self._attempts.waiting and not self._stopping):
                    self._fill()
                    self._listen()
                    self._check_hung()
                    if interrupt.signal and not self._stopping:
                        self._stop()
                    self._job.look()
            finally:
                for process in self._processes.values():
                    process.close()
        return interrupt.signal

    def _fill(self) -> None:
        due = [] if self._stopping else self._attempts.due()
        for cell in due[: len(self._free)]:
            make_folder(self._job.folder(cell))
            slot = self._free.pop()
            process = self._find_process(cell, slot)
            self._running[cell] = slot, process
            self._attempts.begin(cell)
            # a slot's process sees its own GPU and no other, which has another number here
            task = {**self._job.task(cell), "device": self._job.device.partition(":")[0]}
            process.start(cell, task, self._job.log(cell), slot)

    def _find_process(self, cell: str, slot: Slot) -> WorkerProcess:
        """The thread pool of the slot's device, or the fork server; started if it is not there."""
        module, words, more = "fork_server", [self._target], _FORKING
        key = module
        if self._each > 1 and cell not in self._no_sharing:
            module, words, more = "thread_pool", [self._target, str(self._each)], slot
            key = f"{module} {slot}"
        if key not in self._processes:
            environment = {**self._job.environment(), **more}
            log = self._job.folder(cell).parent / f"{module}.log"
            self._processes[key] = WorkerProcess(module, words, environment, log)
        return self._processes[key]

    def _listen(self) -> None:
        # without any process, nothing runs here: other drivers have what is left
        for process in select.select(list(self._processes.values()), [], [], 0.2)[0]:
            events = process.events()
            if events is None:
                self._lose(process)
            for event in events or []:
                if "ended" in event:
                    self._lost = 0
                    self._end(event["ended"], event["code"])

    def _end(self, cell: str, code: int) -> None:
        """A cell's process has ended: is the cell done, failed, or to be started again?"""
        self._free.append(self._running.pop(cell)[0])
        if self._stopping and (code < 0 or code in STOPPED):
            self._attempts.drop(cell)
        else:
            self._attempts.end(cell, code)

    def _check_hung(self) -> None:
        """Kill cells that have made no progress for too long."""
        for cell in self._attempts.find_hung():
            if self._running[cell][1].is_thread_pool:
                self._job.say(f"{cell}: makes no progress; the process that it shares is killed")
            self._running[cell][1].signal(cell, signal.SIGKILL)

    def _stop(self) -> None:
        """Ask every cell to commit and stop; a second signal ends this process and them at once."""
        self._stopping = True
        self._job.say(f"stopping {len(self._running)} cells after their next commit")
        for cell, (_, process) in self._running.items():
            process.signal(cell, signal.SIGTERM)

    def _lose(self, process: WorkerProcess) -> None:
        """A process has died, and all its cells with it. No attempt counts as failed for that.

        Which cell of a thread pool caused it cannot be known. So each continues in a process of its
        own, where that cell dies alone.
        """
        self._processes = {key: one for key, one in self._processes.items() if one is not process}
        cells = [cell for cell, (_, its) in self._running.items() if its is process]
        if process.is_thread_pool:
            self._no_sharing.update(cells)
            if cells:
                self._job.say(
                    f"a process that {len(cells)} cells shared died; each continues in its own"
                )
        else:
            self._lost += 1
            if self._lost >= _LOST:
                raise ResdiagError("processes for cells cannot be started", f"see {process.log}")
        for cell in cells:
            self._attempts.drop(cell)
            self._free.append(self._running.pop(cell)[0])


def run_here(job: Job, cells_per_device: int) -> int:
    """Run a job's cells on this machine.

    Returns:
        The signal that stopped it, or 0.

    Raises:
        UsageError: See `find_slots`.
        ResdiagError: Processes cannot be started.
    """
    return Local(job, find_slots(job, cells_per_device), cells_per_device).run()


def find_slots(job: Job, each: int = 1) -> list[Slot]:
    """The slots of this machine: per GPU as many cells as fit, else a cell per so many cores.

    Args:
        job: What a cell needs, and the number of slots; without one, what fits.
        each: If more than 1, so many per GPU instead; without a GPU, so many in all.

    Raises:
        UsageError: There is not even one, or a cell cannot share a process.
    """
    if each > 1:
        _check_sharing(job)
    needs, wanted = job.study.file.resources, job.slots
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
