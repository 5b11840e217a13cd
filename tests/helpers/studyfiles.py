"""Study files and fake cells for the tests of studies."""

import json
import os
import signal
import threading
import time
from pathlib import Path

TINY = """
question = "Do tiny networks learn?"
seeds = [0, 1]
[fixed]
data = "digits"
width = 0.25
steps = 6
batch_size = 16
commit_every = 2
record_first = 6
[grid]
variant = ["elu", "elu_pre"]
depth = [8]
"""


def write_study(folder, text=TINY, name="tiny"):
    path = Path(folder) / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


# -- cells that misbehave, called by the fork server in a process of their own ---------------------


def faulty(task, *thread_lock):
    """Real work, after a fault: which one, and how often, says a file beside the study."""
    from resdiag.study.work import start

    faults = json.loads((Path(task["study"]).parent / "faults.json").read_text())
    kind = next((kind for part, kind in faults.items() if part in task["cell"]), "none")
    if kind != "none" and _first_time(task, kind):
        _FAULTS[kind.removesuffix(" once")]()
    return start(task, *thread_lock)


_HERE, _MET = threading.Condition(), []


def noted(task, thread_lock=None):
    """Real work; in a shared process each step is noted beside the study, one cell's id a line.

    The first three cells meet before their second step. A cell of the variant `plain` fails then.
    """
    import torch

    from resdiag.study.work import start

    torch.backends.cudnn.deterministic = True
    if thread_lock is None:
        return start(task)
    pass_on, cell, first = thread_lock.pass_on, task["cell"], True

    def note():
        nonlocal first
        if first:
            first = False
            with thread_lock.released(), _HERE:
                _MET.append(cell)
                _HERE.notify_all()
                assert _HERE.wait_for(lambda: len(_MET) > 2, 100)
        elif cell.startswith("plain"):
            raise RuntimeError("a fault in the middle of a training")
        with (Path(task["runs"]) / "steps.txt").open("a") as file:
            stream = torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else 0
            file.write(f"{cell} {os.getpid()} {stream}\n")
        pass_on()

    thread_lock.pass_on = note
    return start(task, thread_lock)


def told(task, thread_lock=None):
    """No work: what a cell is told of its device is noted down beside the study."""
    with (Path(task["runs"]) / "devices.txt").open("a") as file:
        file.write(f"{task['device']} {os.environ['CUDA_VISIBLE_DEVICES']}\n")
    return 0


def preload():
    from resdiag.study.work import preload

    preload()


def _first_time(task, kind):
    """Whether a fault is due: always, or only the first time if it says "once"."""
    mark = Path(task["runs"]) / f"{task['cell']}.mark"
    with mark.open("a") as file:
        file.write("x")
    return not kind.endswith(" once") or mark.stat().st_size == 1


def _hang():
    while True:
        time.sleep(60)


def _eat():
    """Memory to the end: what a limit on it does to a process."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
    held = []
    while True:
        held.append(bytearray(2**28))


def _fill_disk():
    """No file may grow beyond 20 kB from now on: the checkpoint does not fit."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


_FAULTS = {
    "full": _fill_disk,
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": _hang,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "eat": _eat,
    "exit": lambda: os._exit(7),
}
