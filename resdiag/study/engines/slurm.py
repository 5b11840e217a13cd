"""The engine of a Slurm cluster, by submitit: an array of jobs, one per cell."""

import contextlib
import sys
import time
from dataclasses import dataclass
from typing import Any

from resdiag.errors import ResdiagError, UsageError
from resdiag.study.engines.job import Job
from resdiag.study.ledger import ENDED, read_entry
from resdiag.study.work import STOPPED
from resdiag.training.interrupt import Interrupt

_LOOK_S = 1.0
_GRACE_S = 60


@dataclass(frozen=True)
class CellJob:
    """What a job does. It is pickled by submitit, so it holds words only: never a stale copy.

    Attributes:
        task: A `Task` as plain data.
    """

    task: dict[str, Any]

    def __call__(self) -> int:
        """Work on the cell; a failure is in its files and in the exit code."""
        from resdiag.study.work import start

        code = start(self.task)
        if code == STOPPED:  # a signal, after a commit: the same job goes on later
            return code
        if code:
            sys.exit(code)
        return code

    def checkpoint(self) -> Any:  # noqa: ANN401
        """What submitit requeues at the end of the time or when the job is preempted."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run_on_slurm(
    job: Job, partition: str, minutes: int, slots: int | None, cluster: str = "slurm"
) -> int:
    """Submit a job's cells and wait for them; the folder of runs must be the same on every node.

    Args:
        job: What to do.
        partition: Of Slurm; "" takes its default.
        minutes: Time limit of each job; one that reaches it is requeued and continues.
        slots: Jobs at a time.
        cluster: Executor of submitit: "slurm", or "local" and "debug" for tests.

    Returns:
        The signal that stopped the waiting, or 0. The jobs are cancelled then.

    Raises:
        UsageError: submitit is not installed.
        ResdiagError: Slurm refuses the jobs.
    """
    try:
        import submitit
    except ImportError:
        hint = "pip install 'resdiag[slurm]'"
        raise UsageError("the engine slurm needs submitit, which is not installed", hint) from None
    needs = job.study.file.resources
    # its own folder: nothing beside the runs is ever un-pickled by resdiag
    executor = submitit.AutoExecutor(job.study.folder(job.runs) / "slurm", cluster=cluster)
    gpus = 0 if job.device == "cpu" else -(-int(needs.gpus * 100) // 100)
    executor.update_parameters(
        name=f"resdiag-{job.study.name}", timeout_min=minutes, cpus_per_task=needs.threads,
        gpus_per_node=gpus if cluster == "slurm" else 0,
    )  # fmt: skip
    if cluster == "slurm":
        executor.update_parameters(
            slurm_array_parallelism=slots or 1000, slurm_signal_delay_s=_GRACE_S,
            **({"slurm_partition": partition} if partition else {}),
        )  # fmt: skip
    try:
        with executor.batch():
            jobs = [executor.submit(CellJob(job.task(cell))) for cell in job.cells]
    except (OSError, RuntimeError, submitit.core.utils.FailedJobError) as error:
        raise ResdiagError(f"Slurm refused the jobs: {error}", "is sbatch on the path?") from error
    job.say(f"{len(jobs)} jobs submitted; logs in {executor.folder}")
    with Interrupt() as interrupt:
        _wait(job, dict(zip(job.cells, jobs, strict=True)), interrupt)
    return interrupt.signal


def _wait(job: Job, jobs: dict[str, Any], interrupt: Interrupt) -> None:
    """Wait for the jobs; those that died without a word are noted as failed."""
    left = dict(jobs)
    while left:
        if interrupt.signal:
            job.say(f"cancelling {len(left)} jobs")
            for submitted in left.values():
                with contextlib.suppress(OSError, RuntimeError):
                    submitted.cancel(check=False)
            return
        for cell in [cell for cell, submitted in left.items() if submitted.done()]:
            submitted = left.pop(cell)
            state = read_entry(job.folder(cell)).state
            if state not in (*ENDED, "failed"):
                job.say(f"{cell}: the job ended as {submitted.state}")
                job.give_up(cell, -9, hung=False)
        job.look()
        time.sleep(_LOOK_S)
