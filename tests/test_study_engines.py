"""Engines: every cell ends once and alike, whatever happens to it, its neighbours or the driver."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from studyfiles import TINY, write_study
from tiny_training import digest

from resdiag.cli import app
from resdiag.runs.lock import Lock
from resdiag.study.engines.job import Job
from resdiag.study.engines.local import Local
from resdiag.study.ledger import read_entry, read_ledger
from resdiag.study.study import load_study
from resdiag.study.work import Task, work

HERE = Path(__file__).resolve().parent
CORE = {"CUDA_VISIBLE_DEVICES": ""}


def run_local(root, text=TINY, *, slots=2, target=None, faults=None):
    """Run a study under the local engine: its job and what was said."""
    study = load_study(str(write_study(root, text)))
    runs, said = root / "runs", []
    plan = study.write_plan(runs)
    if faults is not None:
        (plan.parent / "faults.json").write_text(json.dumps(faults))
    cells = tuple(cell.id for cell in study.cells)
    job = Job(study=study, plan=plan, cells=cells, runs=runs, device="cpu", say=said.append)
    targets = {"target": target} if target else {}
    assert Local(job, [CORE] * slots, **targets).run() == 0
    return job, said


def states(job):
    return {entry.id: entry.state for entry in read_ledger(job.study, job.runs)}


def digests(job):
    """What the cells computed, by id."""
    entries = read_ledger(job.study, job.runs)
    return {entry.id: digest(entry.run) for entry in entries if entry.state == "done"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The tiny study, run without a disturbance, by the local engine."""
    return run_local(tmp_path_factory.mktemp("undisturbed"))[0]


@pytest.fixture(autouse=True)
def _tests_can_be_imported(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))


# -- a cell ----------------------------------------------------------------------------------------


def test_a_cell_by_itself_ends_like_one_of_the_engine_and_is_done_once(undisturbed, tmp_path):
    cell = next(iter(states(undisturbed)))
    plan = undisturbed.study.write_plan(tmp_path)
    task = Task(study=str(plan), cell=cell, runs=str(tmp_path), device="cpu")
    said = []
    assert work(task, said.append) == 0
    entry = read_entry(tmp_path / "tiny" / cell)
    assert digest(entry.run) == digests(undisturbed)[cell]
    written = entry.run.stat().st_mtime_ns
    assert work(task, said.append) == 0
    assert said[-1] == f"{cell} is done already"
    assert entry.run.stat().st_mtime_ns == written
    assert not list(entry.folder.glob("lock-*"))


def test_a_cell_that_somebody_has_is_refused_and_left_alone(tmp_path, capsys, monkeypatch):
    from resdiag.study import work as module

    monkeypatch.setattr(module, "LEASE_S", None)  # refuse at once instead of watching for beats
    path = write_study(tmp_path)
    study, runs = load_study(str(path)), tmp_path / "runs"
    folder = runs / "tiny" / study.cells[0].id
    folder.mkdir(parents=True)
    lock = Lock.take(folder)
    words = ["study", "cell", str(path), study.cells[0].id, "--runs", str(runs)]
    assert app.run(words) == 75
    assert "is being written by process" in capsys.readouterr().err
    assert read_entry(folder).state == "running"
    lock.release()
    assert read_entry(folder).state == "missing"


def test_an_owner_that_beats_keeps_its_folder_and_a_silent_one_is_fenced(tmp_path):
    from resdiag.errors import BusyError
    from resdiag.study.heartbeat import Heartbeat

    owner = Lock.take(tmp_path)
    with Heartbeat(owner.beat, every=0.05), pytest.raises(BusyError, match="is being written"):
        Lock.take(tmp_path, patience=2.0)
    owner.check()
    successor = Lock.take(tmp_path, patience=0.3)
    with pytest.raises(BusyError, match="was taken over"):
        owner.check()
    owner.beat()  # a fenced owner can neither beat its way back nor release what is not its own
    owner.release()
    successor.check()


def test_a_stopped_process_loses_its_cell_and_commits_no_more(tmp_path):
    """SIGSTOP past the lease, a take-over, SIGCONT: the old owner finds out before it writes."""
    code = (
        "import sys, time; from pathlib import Path; from resdiag.runs.lock import Lock\n"
        "from resdiag.study.heartbeat import Heartbeat; from resdiag.errors import BusyError\n"
        "lock = Lock.take(Path(sys.argv[1])); Heartbeat(lock.beat, 0.05).__enter__()\n"
        "print('has it', flush=True); sys.stdin.readline()\n"
        "try: lock.check(); print('writes')\n"
        "except BusyError: print('fenced')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "has it\n"
        process.send_signal(signal.SIGSTOP)
        Lock.take(tmp_path, patience=0.5).check()
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate("go\n", timeout=20)
    assert out == "fenced\n"


# -- the local engine ------------------------------------------------------------------------------


def test_cells_end_alike_whatever_the_number_of_slots(undisturbed, tmp_path):
    assert set(states(undisturbed).values()) == {"done"}
    job, _ = run_local(tmp_path, slots=1)
    assert digests(job) == digests(undisturbed)
