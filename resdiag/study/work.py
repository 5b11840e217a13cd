"""The work on one cell, under every engine: idempotent, resumable, one process at a time."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resdiag.errors import BusyError, ResdiagError, UsageError
from resdiag.registry import load_extensions
from resdiag.runs.files import make_folder, to_json, write_file
from resdiag.runs.folder import read_run
from resdiag.runs.lock import LEASE_S, Heartbeat, Lock
from resdiag.study.failure import clear_failure, write_failure
from resdiag.study.ledger import ENDED, find_run, read_entry
from resdiag.study.progress import ProgressFile
from resdiag.study.study import Study, load_study
from resdiag.training.device import find_device
from resdiag.training.fair_lock import UNSHARED, LockHandle
from resdiag.training.interrupt import EXIT_CODES

if TYPE_CHECKING:
    from resdiag.study.cell import Outcome

STOPPED = tuple(EXIT_CODES.values())
"""Exit codes of a cell that stopped after a commit, or that another process has: it can go on."""


@dataclass(frozen=True)
class Task:
    """One cell to work on, in plain values that can be sent to another machine.

    Attributes:
        study: Path of a plan, or what else `load_study` takes.
        cell: Id of the cell.
        runs: Folder that holds the study's folder.
        data_root: Folder of downloaded data sets; "" for the default places.
        device: auto, cpu, cuda or cuda:N.
        allow_drift: Continue in a changed environment.
    """

    study: str
    cell: str
    runs: str
    data_root: str = ""
    device: str = "auto"
    allow_drift: bool = False


def preload() -> None:
    """Import what every cell needs, so that processes forked after it have it."""
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch._dynamo  # noqa: F401  the first optimizer of a process imports it: 1.5 s

    import resdiag.study.cell  # noqa: F401


def start(plain: dict[str, Any], thread_lock: LockHandle = UNSHARED) -> int:
    """Work on a task that arrived as plain data; what goes wrong is printed.

    Args:
        plain: The task.
        thread_lock: See `work`.

    Returns:
        The exit code.
    """
    load_extensions()
    try:
        return work(Task(**plain), thread_lock=thread_lock)
    except ResdiagError as error:
        hint = f" ({error.hint})" if error.hint else ""
        print(f"resdiag: {error.message}{hint}", file=sys.stderr)
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return 1


def start_logged(plain: dict[str, Any], log: str) -> int:
    """The same with what it prints, and what C code prints, appended to a file.

    For engines whose processes write their output elsewhere.
    """
    path = Path(log)
    make_folder(path.parent)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    before = [os.dup(1), os.dup(2)]
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.dup2(file, 1)
        os.dup2(file, 2)
        print(f"process {os.getpid()} on {socket.gethostname()}", flush=True)
        return start(plain)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for handle, number in zip(before, (1, 2), strict=True):
            os.dup2(handle, number)
        for handle in (file, *before):
            os.close(handle)


def work(task: Task, say: Callable[[str], None] = print, thread_lock: LockHandle = UNSHARED) -> int:
    """Bring a cell to its end; do nothing if it is there.

    Args:
        task: Which cell, and where.
        say: Told what happens, line by line.
        thread_lock: Held while it trains, where cells share a process; not held now.

    Returns:
        0 if the cell is done or has diverged; one of STOPPED if a signal ended it after a commit.

    Raises:
        BusyError: Another process works on it.
        ResdiagError: It failed; the reason is in its folder too.
    """
    study, runs = load_study(task.study), Path(task.runs)
    cell = study.cell(task.cell)
    folder = study.folder(runs) / cell.id
    if _has_ended(folder, say):
        return 0
    make_folder(folder)
    lock = Lock.take(folder, LEASE_S)
    try:
        if _has_ended(folder, say):  # another process ended it while we waited
            return 0
        with Heartbeat(lock.beat):
            return _work_alone(study, task, lock, say, thread_lock)
    finally:
        lock.release()


def _has_ended(folder: Path, say: Callable[[str], None]) -> bool:
    state = read_entry(folder).state
    if state in ENDED:
        say(f"{folder.name} is {state} already")
    return state in ENDED


def _work_alone(
    study: Study, task: Task, lock: Lock, say: Callable[[str], None], thread_lock: LockHandle
) -> int:
    folder = lock.path.parent
    clear_failure(folder)
    try:
        outcome = _run(study, task, folder, say, thread_lock)
    except BusyError:
        raise
    except ResdiagError as error:
        write_failure(folder, "error", error.message, error.hint)
        raise
    except Exception as error:
        write_failure(folder, "error", f"{type(error).__name__}: {error}")
        raise
    lock.check()
    say(f"{task.cell}: {outcome.run.status} after {outcome.run.steps} steps")
    return 0 if outcome.run.status in ENDED else EXIT_CODES[outcome.signal]


def _run(
    study: Study, task: Task, folder: Path, say: Callable[[str], None], thread_lock: LockHandle
) -> "Outcome":
    import torch

    from resdiag.study.cell import Options, run_cell

    torch.set_num_threads(study.file.resources.threads)
    device = _device_of(task.device, folder)
    request = replace(study.cell(task.cell).request, device=device)
    about = {"schema": 1, "id": task.cell, "study": study.name, "plan": study.digest}
    write_file(folder / "cell.json", to_json(about))
    options = Options(
        root=folder,
        data_root=Path(task.data_root) if task.data_root else None,
        allow_drift=task.allow_drift,
        patience=LEASE_S,
        display=lambda _, steps, done: ProgressFile(folder, steps, done),
        thread_lock=thread_lock,
    )
    return run_cell(request, options, say)


def _device_of(name: str, folder: Path) -> str:
    """The device of a cell: the one it was begun on, else the requested one."""
    run, commit = find_run(folder)
    begun = getattr(read_run(run).config, "device", None) if run and commit else None
    if begun is not None and name not in ("auto", begun):
        hint = f"--device {begun} continues it; without the folder {run} it starts again"
        raise UsageError(f"{folder.name} was begun on {begun}, not on {name}", hint)
    return find_device(begun or name)
