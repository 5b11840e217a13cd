"""The engine of a Ray cluster: a task per cell, in a process of its own."""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resdiag.errors import ResdiagError, UsageError
from resdiag.study.engines.job import Attempts, Job
from resdiag.study.engines.local import find_gpus
from resdiag.training.interrupt import Interrupt

_GRACE_S = 30.0
"""Seconds for a task that was asked to end before it is no longer waited for."""
_ANSWER_S = 10.0
_STORE_BYTES = 80 * 2**20
"""Ray's object store, which cells do not use: near the least that it takes."""


def run_on_ray(job: Job, address: str) -> int:
    """Run a job's cells as Ray tasks; the folder of runs must be the same on every node.

    Args:
        job: What to do.
        address: Of an existing cluster, or "auto"; "" starts one on this machine.

    Returns:
        The signal that stopped it, or 0.

    Raises:
        UsageError: Ray is not installed, or `address` is not an address.
        ResdiagError: No cluster answers at `address`.
    """
    if ":" in job.device:
        raise UsageError(f"--device {job.device}: Ray gives each cell its GPU", "--device cuda")
    with _cluster(job, address), Interrupt() as interrupt:
        _Tasks(job).run(interrupt)
    return interrupt.signal


class _Tasks:
    """The tasks of one job, from start to end.

    Ray is told not to retry: `Attempts` decides about a lost task, as in the other engines.
    """

    def __init__(self, job: Job) -> None:
        import ray

        self._ray: Any = ray
        self._job, self._attempts = job, Attempts(job)
        self._most = job.slots or len(job.cells)
        threads, gpus = job.study.file.resources.threads, self._find_gpu_share()
        self._remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0, max_calls=1)(
            _start
        )
        self._running: dict[Any, str] = {}
        self._ended_by_us: dict[Any, float] = {}
        if not self._fits(threads, gpus):
            job.say(f"no node has {threads} CPUs and {gpus:g} GPUs for a cell; waiting for one")

    def run(self, interrupt: Interrupt) -> None:
        """Start, watch and collect, until nothing is left or a signal arrives."""
        while self._running or self._attempts.waiting:
            if interrupt.signal:
                self._stop()
                return
            self._fill()
            self._collect()
            for cell in self._attempts.find_hung():
                self._kill(cell)
            self._abandon()
            self._job.look()

    def _find_gpu_share(self) -> float:
        """GPUs of a cell: none if it is to run on a CPU, or if there are none."""
        if self._job.device == "auto" and not self._ray.cluster_resources().get("GPU", 0):
            return 0.0
        return 0.0 if self._job.device == "cpu" else self._job.study.file.resources.gpus

    def _fits(self, cpus: int, gpus: float) -> bool:
        """Whether a node that is there could ever run a cell."""
        alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return any(has.get("CPU", 0) >= cpus and has.get("GPU", 0) >= gpus for has in alive)

    def _fill(self) -> None:
        for cell in self._attempts.due()[: self._most - len(self._running)]:
            self._attempts.begin(cell, queued=True)
            task = self._remote.remote(self._job.task(cell), self._job.log(cell))
            self._running[task] = cell

    def _collect(self) -> None:
        if not self._running:
            time.sleep(0.2)
            return
        ended, _ = self._ray.wait(list(self._running), timeout=0.5)
        for task in ended:
            cell = self._running.pop(task)
            self._ended_by_us.pop(task, None)
            try:
                self._attempts.end(cell, *self._ray.get(task))
            except self._ray.exceptions.NodeDiedError:  # the cell is not to blame
                self._job.say(f"{cell}: its node is gone; started again")
                self._attempts.drop(cell)
            except self._ray.exceptions.RayError as error:
                self._attempts.end(cell, -1, f"its process died: {_first_line(error)}")

    def _kill(self, cell: str) -> None:
        """Kill the task of a cell that makes no progress."""
        for task in [task for task, name in self._running.items() if name == cell]:
            self._ended_by_us[task] = time.monotonic() + _GRACE_S
            self._ray.cancel(task, force=True)

    def _abandon(self) -> None:
        """Wait no longer for tasks that cannot even be killed: a stopped process, a dead link.

        If one comes back, it has lost its cell's lease to the next attempt, and writes no more.
        """
        now = time.monotonic()
        for task in [task for task, due in self._ended_by_us.items() if due < now]:
            del self._ended_by_us[task]
            self._attempts.end(self._running.pop(task), -1)

    def _stop(self) -> None:
        """Have the cells commit and stop; the kill follows for those that take too long."""
        self._job.say(f"stopping {len(self._running)} cells after their next commit")
        for force in (False, True):
            for task in self._running:  # Ray raises SIGINT in a worker's process
                with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
                    self._ray.cancel(task, force=force)
            tasks = list(self._running)
            ended, _ = self._ray.wait(tasks, num_returns=max(1, len(tasks)), timeout=_GRACE_S)
            for task in ended:
                del self._running[task]
            if not self._running:
                return


def _start(task: dict[str, Any], log: str) -> tuple[int, str]:
    """What a worker does: exit code, and words where the files cannot have them."""
    from resdiag.study.work import start_logged

    if not Path(task["study"]).exists():
        host, folder = socket.gethostname(), Path(task["study"]).parent
        return 1, f"{host} does not see {folder}: the folder of runs must be on every node"
    return start_logged(task, log), ""


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
    options = {**_find_cluster(job, address), "runtime_env": {"env_vars": job.environment()}}
    log = job.plan.parent / "ray.log"
    # what Ray says of dead workers and nodes is long, and it says it on standard output
    with log.open("a", encoding="utf-8") as words, contextlib.redirect_stdout(words):
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            message = f"no Ray cluster at '{address}': {_first_line(error)}"
            raise ResdiagError(message, "ray start --head starts one") from error
        try:
            yield
        finally:
            ray.shutdown()


def _find_cluster(job: Job, address: str) -> dict[str, Any]:
    """The cluster at an address, or a new one with room for at least one cell."""
    if address:
        _check_address(address)
        return {"address": address}
    threads = job.study.file.resources.threads
    return {
        "address": "local",  # never one that happens to run here
        "include_dashboard": False,
        "object_store_memory": _STORE_BYTES,
        "num_cpus": max(len(os.sched_getaffinity(0)), threads * (job.slots or 1)),
        "num_gpus": 0 if job.device == "cpu" else len(find_gpus()),
    }


def _check_address(address: str) -> None:
    """Refuse an address that does not answer: Ray would try to connect for ever."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdecimal():
        raise UsageError(f"--address {address!r} is neither HOST:PORT nor auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, OverflowError) as error:
        message = f"no Ray cluster at '{address}': {error}"
        raise ResdiagError(message, "ray start --head starts one") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].strip() if str(error) else type(error).__name__
