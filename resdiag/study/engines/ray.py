"""The engine of a Ray cluster: a task per cell, started again where a worker or node is lost."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import resdiag
from resdiag.errors import ResdiagError, UsageError
from resdiag.study.engines.job import Job
from resdiag.study.engines.local import find_gpus
from resdiag.study.work import STOPPED
from resdiag.training.interrupt import Interrupt

_AGAIN_S = 5.0
_LOOK_S = 1.0


def run_on_ray(job: Job, address: str, slots: int | None) -> int:
    """Run a job's cells as Ray tasks; the folder of runs must be the same on every node.

    Args:
        job: What to do.
        address: Of an existing cluster, or "auto"; "" starts one on this machine.
        slots: Cells at a time; None leaves it to Ray and the resources of a cell.

    Returns:
        The signal that stopped it, or 0.

    Raises:
        UsageError: Ray is not installed.
        ResdiagError: There is no cluster at `address`.
    """
    with _cluster(job, address), Interrupt() as interrupt:
        _Tasks(job, slots).run(interrupt)
    return interrupt.signal


class _Tasks:
    """The tasks of one job, from start to end."""

    def __init__(self, job: Job, slots: int | None) -> None:
        import ray

        self._ray: Any = ray
        self._job = job
        needs = job.study.file.resources
        self._most = slots or len(job.cells)
        self._remote = ray.remote(
            num_cpus=needs.threads,
            num_gpus=needs.gpus if self._with_gpus() else 0,
            max_retries=needs.restarts,  # a crash of the worker, or of its node
        )(_start)
        self._waiting = [(0.0, cell) for cell in job.cells]
        self._running: dict[Any, str] = {}
        self._watched: dict[str, tuple[tuple[int, ...], float]] = {}

    def run(self, interrupt: Interrupt) -> None:
        """Start, watch and collect, until nothing is left or a signal arrives."""
        looked = 0.0
        while self._running or (self._waiting and not interrupt.signal):
            if interrupt.signal:
                self._stop()
                return
            self._fill()
            self._collect()
            self._check_hung()
            if time.monotonic() - looked > _LOOK_S:
                looked = time.monotonic()
                self._job.look()

    def _with_gpus(self) -> bool:
        kind = self._job.device.partition(":")[0]
        resources = self._ray.cluster_resources()
        return kind == "cuda" or (kind == "auto" and resources.get("GPU", 0) > 0)

    def _fill(self) -> None:
        now = time.monotonic()
        due = [item for item in self._waiting if item[0] <= now]
        for item in due[: self._most - len(self._running)]:
            self._waiting.remove(item)
            self._running[self._remote.remote(self._job.task(item[1]))] = item[1]

    def _collect(self) -> None:
        """Take note of the tasks that have ended."""
        if not self._running:
            time.sleep(0.2)
            return
        ended, _ = self._ray.wait(list(self._running), timeout=0.5)
        for task in ended:
            cell = self._running.pop(task)
            hung = self._watched.pop(cell, ((), 0.0))[1] < 0
            try:
                code = self._ray.get(task)
            except (self._ray.exceptions.RayError, OSError) as error:
                self._job.say(f"{cell}: {type(error).__name__}")
                self._job.give_up(cell, -9, hung)
                continue
            if code in (STOPPED, 130):  # somebody else's: a worker that is not quite dead yet
                self._waiting.append((time.monotonic() + _AGAIN_S, cell))
            elif code:
                self._job.give_up(cell, code)

    def _check_hung(self) -> None:
        """Kill the tasks whose cells have begun and have not moved for too long."""
        now = time.monotonic()
        for task, cell in self._running.items():
            sign = self._job.sign_of_life(cell)
            seen, since = self._watched.get(cell, ((), 0.0))
            if sign != seen or not any(sign):  # a cell without a sign may still wait for its turn
                self._watched[cell] = (sign, now)
            elif 0 <= since < now - self._job.study.file.resources.patience_s:
                self._watched[cell] = (sign, -1.0)
                self._ray.cancel(task, force=True)

    def _stop(self) -> None:
        """End the tasks; their last commits stay."""
        self._job.say(f"stopping {len(self._running)} cells at their last commit")
        for task in self._running:
            with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
                self._ray.cancel(task, force=True)


def _start(task: dict[str, Any]) -> int:
    """What a worker does; everything but its words is in the files."""
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    from resdiag.study.work import start

    return start(task)


@contextlib.contextmanager
def _cluster(job: Job, address: str) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine and end it afterwards."""
    # before the import, which reads them: no telemetry, and no copy of the project to the workers
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        hint = "pip install 'resdiag[ray]'"
        raise UsageError("the engine ray needs Ray, which is not installed", hint) from None
    package = str(Path(resdiag.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}},
    }
    if address:
        options["address"] = address
    else:
        options |= {"include_dashboard": False, "num_gpus": len(_gpus(job))}
    owns = not ray.is_initialized()
    try:
        if owns:
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ResdiagError(f"no Ray cluster at '{address}': {first}", "ray start --head") from error
    try:
        yield
    finally:
        if owns:
            ray.shutdown()
        sys.stderr.flush()


def _gpus(job: Job) -> list[str]:
    return [] if job.device == "cpu" else find_gpus()
