"""The engine of a Slurm cluster, by submitit: an array of jobs, one per cell.

The queue is asked by `squeue`, which every cluster has; submitit asks `sacct`, which needs a
database. Job ids are kept beside the cells: a driver that comes back finds the jobs of the last.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from resdiag.errors import ResdiagError, UsageError
from resdiag.runs.files import make_folder, to_json, write_file
from resdiag.study.engines.job import Attempts, Job
from resdiag.study.ledger import ENDED, read_entry
from resdiag.study.work import STOPPED
from resdiag.training.interrupt import Interrupt

_LOOK_S = 2.0
_ASK_S = 5.0
_GRACE_S = 60
_MOST_TIMEOUTS = 10_000
_ARRAY = 1000  # MaxArraySize is 1001 unless the site says otherwise
_JOBS = "jobs.json"
_TIME_IS_UP = signal.SIGUSR2  # from Slurm, `_GRACE_S` before the end of the job's time
_OVER = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL",
         "DEADLINE")  # fmt: skip


@dataclass(frozen=True)
class CellJob:
    """What a job does. It is pickled by submitit, so it holds words only: never a stale copy.

    Attributes:
        task: A `Task` as plain data.
        log: File for what the cell prints.
    """

    task: dict[str, Any]
    log: str

    def __call__(self) -> int:
        """Work on the cell; a failure is in its files and in the exit code."""
        from resdiag.study.work import start_logged

        with _commit_first() as ask_for_more_time:
            code = start_logged(self.task, self.log)
            if code in STOPPED:
                ask_for_more_time()
        if code:
            sys.exit(code)
        return code

    def checkpoint(self) -> Any:  # noqa: ANN401
        """What submitit requeues at the end of the time."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@contextlib.contextmanager
def _commit_first() -> Iterator[Callable[[], None]]:
    """Have the end of a job's time mean what SIGTERM means, and only then what submitit does.

    Yields:
        Does what submitit does, which is to requeue the job, if its time was up.
    """
    theirs = signal.getsignal(_TIME_IS_UP)
    received: list[tuple[int, FrameType | None]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append((number, frame))
        os.kill(os.getpid(), signal.SIGTERM)

    def go_on() -> None:
        if received and callable(theirs):
            theirs(*received[0])

    signal.signal(_TIME_IS_UP, stop)
    try:
        yield go_on
    finally:
        signal.signal(_TIME_IS_UP, theirs)


def run_on_slurm(job: Job, partition: str, minutes: int) -> int:
    """Submit a job's cells and wait for them; the folder of runs must be the same on every node.

    Args:
        job: What to do.
        partition: Of Slurm; "" takes its default.
        minutes: Time limit of each job; one that reaches it commits, is requeued and continues.

    Returns:
        The signal that stopped the waiting, or 0. The jobs are cancelled then.

    Raises:
        UsageError: submitit is not installed, or there is no Slurm.
        ResdiagError: Slurm refuses the jobs.
    """
    if ":" in job.device:
        raise UsageError(f"--device {job.device}: Slurm gives each cell its GPU", "--device cuda")
    needs = job.study.file.resources
    gpus = 0 if job.device == "cpu" else -(-int(needs.gpus * 100) // 100)
    executor = open_executor(job, "slurm")
    executor.update_parameters(
        name=f"resdiag-{job.study.name}", timeout_min=minutes, cpus_per_task=needs.threads,
        slurm_array_parallelism=job.slots or _ARRAY, slurm_signal_delay_s=_GRACE_S,
        slurm_additional_parameters={"requeue": True},
        **({"gpus_per_node": gpus} if gpus else {}),
        **({"slurm_partition": partition} if partition else {}),
    )  # fmt: skip
    with Interrupt() as interrupt:
        SlurmJobs(job, executor).run(interrupt)
    return interrupt.signal


def open_executor(job: Job, cluster: str) -> Any:  # noqa: ANN401
    """The executor of submitit, which keeps its scripts and pickles in the study's folder.

    Raises:
        UsageError: It is not installed, or there is no Slurm.
    """
    try:
        import submitit
    except ImportError:
        hint = "pip install 'resdiag[slurm]'"
        raise UsageError("the engine slurm needs submitit, which is not installed", hint) from None
    folder = _folder(job)
    make_folder(folder)
    try:
        return submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=_MOST_TIMEOUTS)
    except RuntimeError:
        raise UsageError("there is no Slurm here: srun is not on the path") from None


def _folder(job: Job) -> Path:
    return job.study.folder(job.runs) / "slurm"


class SlurmJobs:
    """The jobs of one study, from their submission to their end.

    Args:
        job: Whose cells; `job.slots` at a time, of each thousand that is submitted.
        executor: See `open_executor`.
    """

    def __init__(self, job: Job, executor: Any) -> None:  # noqa: ANN401
        self._job, self._executor = job, executor
        self._attempts = Attempts(job)
        self._hung: set[str] = set()
        self._jobs: dict[str, str] = {}  # ids by cell

    def run(self, interrupt: Interrupt) -> None:
        """Submit what is not in the queue yet, and wait for all, or for a signal."""
        self._jobs = self._adopt()
        for cell in self._jobs:
            self._attempts.begin(cell, queued=True)
        self._submit_due()
        asked = 0.0
        while self._jobs or self._attempts.waiting:
            if interrupt.signal:
                self._job.say(f"cancelling {len(self._jobs)} jobs; they commit before they end")
                self.cancel(self._jobs.values())
                return
            for cell in self._attempts.find_hung():
                self._hung.add(cell)
                self.cancel([self._jobs[cell]])
            if time.monotonic() - asked > _ASK_S:
                self._collect(self.states(self._jobs.values()) if self._jobs else {})
                self._submit_due()
                asked = time.monotonic()
            self._job.look()
            time.sleep(_LOOK_S)

    def _submit_due(self) -> None:
        cells = self._attempts.due()
        if not cells:
            return
        for cell in cells:
            self._attempts.begin(cell, queued=True)
        for some in (cells[i : i + _ARRAY] for i in range(0, len(cells), _ARRAY)):
            submitted = self.submit(some)
            self._jobs |= {cell: one.job_id for cell, one in zip(some, submitted, strict=True)}
        self._job.say(f"{len(cells)} jobs submitted; scripts in {_folder(self._job)}")
        write_file(_folder(self._job) / _JOBS, to_json(self._jobs))

    def submit(self, cells: list[str]) -> list[Any]:
        """Submit cells as one array: submitit's jobs.

        Raises:
            ResdiagError: They are refused.
        """
        import submitit

        job = self._job
        try:
            with _environment(job.environment()), self._executor.batch():
                work = [CellJob(job.task(cell), job.log(cell)) for cell in cells]
                return [self._executor.submit(one) for one in work]
        except (OSError, RuntimeError, submitit.core.utils.FailedJobError) as error:
            words = [line for line in str(error).splitlines() if "error:" in line]
            reason = words[0].split("error:")[-1].strip() if words else str(error).split("\n")[0]
            hint = "--device cpu asks for no GPU, --partition names another partition"
            raise ResdiagError(f"Slurm refused the jobs: {reason}", hint) from error

    def states(self, jobs: Iterable[str]) -> dict[str, str]:
        """The state of each job that Slurm knows; an empty one: it does not answer."""
        jobs = list(jobs)
        arrays = ",".join(sorted({id.partition("_")[0] for id in jobs}))
        command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T"]
        listed = _ask([*command, f"--jobs={arrays}"])
        if listed is None and _ask([*command, "--user=" + str(os.getuid())]) is None:
            return dict.fromkeys(jobs, "")
        found = dict(line.split()[:2] for line in (listed or "").splitlines())
        return {id: found.get(id) or _recall(id) for id in jobs}

    def cancel(self, jobs: Iterable[str]) -> None:
        """Have the jobs commit and end."""
        _ask(["scancel", *jobs])

    def _adopt(self) -> dict[str, str]:
        """The jobs of a driver before this one that are still in the queue."""
        try:
            known = json.loads((_folder(self._job) / _JOBS).read_bytes())
            known = {str(c): str(id) for c, id in known.items() if c in self._job.cells}
        except (OSError, ValueError, AttributeError, RecursionError):
            return {}
        states = self.states(known.values()) if known else {}
        over = ("", "GONE", *_OVER)
        found = {cell: id for cell, id in known.items() if states[id] not in over}
        if found:
            self._job.say(f"{len(found)} jobs are in the queue already")
        return found

    def _collect(self, states: Mapping[str, str]) -> None:
        for cell, id in list(self._jobs.items()):
            state = states.get(id, "")
            if state in _OVER or state == "GONE":
                del self._jobs[cell]
                self._end(cell, state)

    def _end(self, cell: str, state: str) -> None:
        """A job is over: what the files say counts more than what Slurm says."""
        found = read_entry(self._job.folder(cell)).state
        if state == "CANCELLED" and found not in (*ENDED, "failed") and cell not in self._hung:
            self._attempts.drop(cell, again=False)
            self._job.say(f"{cell}: its job was cancelled; the same command continues it")
            return
        self._hung.discard(cell)
        code = 0 if found in ENDED else 1 if found == "failed" else -1
        self._attempts.end(cell, code, f"its job ended as {state}")


def _recall(id: str) -> str:
    """The state of a job that left the queue, where there is a database."""
    listed = _ask(["sacct", "--noheader", "--allocations", "--format=State", f"--jobs={id}"])
    return (listed or "").split()[0] if (listed or "").strip() else "GONE"


@contextlib.contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    """Set variables, which sbatch hands to the jobs, while entered."""
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _ask(command: list[str]) -> str | None:
    """What a command of Slurm prints; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
