"""Studies that are really run, for the tests of engines: by which driver, and what came out."""

import json
import subprocess
import sys
import time
from pathlib import Path

from studyfiles import TINY, write_study
from tiny_training import digest

from resdiag.study.engines.job import Job
from resdiag.study.engines.local import Local, find_slots
from resdiag.study.ledger import read_entry, read_ledger
from resdiag.study.study import load_study

HERE = Path(__file__).resolve().parent
CORE = {"CUDA_VISIBLE_DEVICES": ""}


def run_local(root, text=TINY, *, slots=2, each=1, target=None, faults=None, device="cpu"):
    """Run a study under the local engine: its job and what was said."""
    study = load_study(str(write_study(root, text)))
    runs, said = root / "runs", []
    plan = study.write_plan(runs)
    if faults is not None:
        (plan.parent / "faults.json").write_text(json.dumps(faults))
    cells = tuple(cell.id for cell in study.cells)
    job = Job(study=study, plan=plan, cells=cells, runs=runs, device=device, say=said.append)
    targets = {"target": target} if target else {}
    places = find_slots(job, each) if each > 1 or device != "cpu" else [CORE] * slots
    assert Local(job, places, each, **targets).run() == 0
    return job, said


def states(job):
    return {entry.id: entry.state for entry in read_ledger(job.study, job.runs)}


def digests(job):
    """What the cells computed that came to an end, be it that of their numbers, by id."""
    entries = read_ledger(job.study, job.runs)
    ended = ("done", "diverged")
    return {entry.id: digest(entry.run) for entry in entries if entry.state in ended}


def driver(root, path, *more):
    """`resdiag study run` in a process of its own; what it says is in `driver.txt`."""
    command = [sys.executable, str(HERE.parents[1] / "cli.py"), "study", "run", str(path)]
    options = ["--runs", str(root / "runs"), "--device", "cpu", *(more or ["--slots", "2"])]
    with (root / "driver.txt").open("ab") as said:
        return subprocess.Popen([*command, *options], stdout=said, stderr=said)


PATIENCE_S = 250
"""How long tests wait for other processes: less than a test has, more than a busy machine needs."""


def wait_for(condition, seconds=PATIENCE_S):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_running(study, runs):
    return any(entry.state == "running" for entry in read_ledger(study, runs))


def ended_once(study, runs):
    """Each cell said just once that it came to its end, and its run has each step just once.

    All the steps that were asked for, but where it diverged by itself.
    """
    from resdiag.runs.folder import read_run

    for cell in study.cells:
        folder = runs / study.name / cell.id
        log = (folder / "log.txt").read_text()
        assert log.count(f"{cell.id}: done after") <= 1
        run = read_run(read_entry(folder).run)
        assert run.curve()["step"].tolist() == list(range(run.steps))
        assert run.steps == cell.request.steps or run.status == "diverged"
