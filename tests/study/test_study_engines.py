"""Engines: every cell ends once and alike, whatever happens to it, its neighbours or the driver."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
from study_runs import (
    HERE,
    PATIENCE_S,
    digests,
    driver,
    ended_once,
    is_running,
    run_local,
    states,
    wait_for,
)
from studyfiles import TINY, write_study
from tiny_training import digest

import resdiag
from resdiag.cli.main import app
from resdiag.report.outcomes import measure
from resdiag.runs.lock import Lock
from resdiag.runs.store import RunWriter
from resdiag.study.engines import job as engine_job
from resdiag.study.engines.job import Job
from resdiag.study.engines.local import find_slots
from resdiag.study.ledger import find_run, read_entry, read_ledger
from resdiag.study.study import load_study
from resdiag.study.work import Task, work

PATIENT = "[resources]\nrestarts = 1\npatience_s = 30\n"


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


def test_a_cell_that_dies_between_its_last_step_and_its_verdict_is_judged_later(
    undisturbed, tmp_path, monkeypatch
):
    cell = next(iter(states(undisturbed)))
    plan = undisturbed.study.write_plan(tmp_path)
    task = Task(study=str(plan), cell=cell, runs=str(tmp_path), device="cpu")
    folder = tmp_path / "tiny" / cell

    def die(*_):
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "finish", die)
        with pytest.raises(SystemExit):
            work(task, print)
    entry = read_entry(folder)
    run = resdiag.load_run(entry.run)
    assert (run.status, run.written_verdict) == ("done", None)
    assert (entry.state, entry.message) == ("stale", "trained to its end, not judged yet")
    assert "verdict" not in measure(run, [])
    assert work(task, print) == 0
    entry = read_entry(folder)
    assert entry.state == "done"
    assert digest(entry.run) == digests(undisturbed)[cell]
    assert measure(resdiag.load_run(entry.run), [])["verdict"]


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


# -- the local engine ------------------------------------------------------------------------------


def test_cells_end_alike_whatever_the_number_of_slots(undisturbed, tmp_path):
    assert set(states(undisturbed).values()) == {"done"}
    job, _ = run_local(tmp_path, slots=1)
    assert digests(job) == digests(undisturbed)


@pytest.mark.slow
def test_a_fault_of_one_cell_does_not_disturb_the_others(undisturbed, tmp_path):
    """Killed and crashed for good, hung for good, without memory or disk, some that recover."""
    text = TINY.replace("seeds = [0, 1]", "seeds = [0, 1, 2, 3]") + PATIENT
    faults = {
        "elu-d8-s0": "segfault", "elu-d8-s1": "killed once", "elu_pre-d8-s0": "hang",
        "elu_pre-d8-s2": "eat", "elu-d8-s2": "stop once", "elu-d8-s3": "full",
        "elu_pre-d8-s3": "exit",
    }  # fmt: skip
    job, said = run_local(tmp_path, text, target="studyfiles:faulty", faults=faults)
    found = {id[: id.rindex("-")]: state for id, state in states(job).items()}
    assert found == {
        "elu-d8-s0": "failed", "elu-d8-s1": "done", "elu-d8-s2": "done",
        "elu-d8-s3": "failed", "elu_pre-d8-s0": "failed", "elu_pre-d8-s1": "done",
        "elu_pre-d8-s2": "failed", "elu_pre-d8-s3": "failed",
    }  # fmt: skip
    messages = " ".join(entry.message for entry in read_ledger(job.study, job.runs))
    for words in (
        "SIGSEGV",
        "no progress for 30 s",
        "MemoryError",
        "File too large",
        "exit code 7",
    ):
        assert words in messages, words
    assert sum("started again" in line for line in said) == 4
    undamaged = digests(job)
    assert {id: undamaged[id] for id in digests(undisturbed) if id in undamaged}.items() <= digests(
        undisturbed
    ).items()
    for cell, expected in digests(undisturbed).items():  # and failed cells can be tried again
        if cell not in undamaged and "elu-d8" in cell:
            words = ["study", "retry", str(tmp_path / "tiny.toml"), cell, "--slots", "1"]
            assert app.run([*words, "--runs", str(job.runs), "--device", "cpu", "-q"]) == 3
            assert digest(read_entry(job.folder(cell)).run) == expected
    words = ["study", "retry", str(tmp_path / "tiny.toml"), "--failed", "--runs", str(job.runs)]
    assert app.run([*words, "--device", "cpu", "-q"]) == 0
    assert set(states(job).values()) == {"done"}
    assert digests(undisturbed).items() <= digests(job).items()


@pytest.mark.slow
def test_two_drivers_at_once_run_each_cell_once(undisturbed, tmp_path):
    text = TINY.replace("steps = 6", "steps = 60")
    path = write_study(tmp_path, text)
    both = [driver(tmp_path, path) for _ in range(2)]
    assert [process.wait(280) for process in both] == [0, 0]
    study = load_study(str(path))
    ended_once(study, tmp_path / "runs")
    logs = [(entry.folder / "log.txt").read_text() for entry in
            read_ledger(study, tmp_path / "runs")]  # fmt: skip
    assert all("continues at step" not in log for log in logs)
    (tmp_path / "calm").mkdir()
    calm, _ = run_local(tmp_path / "calm", text)
    assert {e.id: digest(e.run) for e in read_ledger(study, tmp_path / "runs")} == digests(calm)


def test_a_machine_that_slept_has_no_hung_cells(tmp_path, monkeypatch):
    """Patience is counted in looks: an hour in which nobody looked is one look."""
    study = load_study(str(write_study(tmp_path, TINY + PATIENT)))
    clock, said = [0.0], []
    monkeypatch.setattr(engine_job.time, "monotonic", lambda: clock[0])
    job = Job(study=study, plan=tmp_path, cells=(), runs=tmp_path, say=said.append)
    watched, cell = engine_job.Attempts(job), study.cells[0].id
    watched.begin(cell)
    clock[0] += 3600
    assert watched.find_hung() == []
    hung = []
    for _ in range(32):
        clock[0] += 1
        hung += watched.find_hung()
    assert hung == [cell]  # thirty seconds, five of them the hour, and said once
    watched.end(cell, -9)
    assert watched.due() == [cell]
    assert said == [f"{cell}: no progress for 30 s, and killed for it; started again"]
    watched.begin(cell, queued=True)  # waits for a machine: no sign of life is expected
    clock[0] += 5
    assert watched.find_hung() == []
    for _ in range(60):
        clock[0] += 1
        assert watched.find_hung() == []


def test_a_diverging_cell_is_a_result_and_a_mistake_of_the_cell_is_said(tmp_path, capsys):
    text = TINY.replace("seeds = [0, 1]", "seeds = [0]").replace(
        "[grid]", '[[include]]\nvariant = "relu_nobn"\ndepth = 8\nlr = 1e6\n'
        '[[include]]\nvariant = "plain"\ndepth = 8\ndata = "folder:nowhere"\n[grid]',
    )  # fmt: skip
    job, _ = run_local(tmp_path, text)
    assert sorted(states(job).values()) == ["diverged", "done", "done", "failed"]
    failed = next(entry for entry in read_ledger(job.study, job.runs) if entry.state == "failed")
    assert "nowhere" in failed.message
    words = ["study", "run", str(tmp_path / "tiny.toml"), "--runs", str(job.runs)]
    assert app.run([*words, "--device", "cpu"]) == 3  # nothing is left but the failed one
    printed = capsys.readouterr()
    assert "1 cells failed before; `resdiag study retry` tries them again" in printed.err


def disturb(root, text, kills, seed=0):
    """Kill -9 the driver, by turns soon after cells began and soon after one committed.

    At last it ends in peace: study, folder of runs, number of kills.
    """
    draw = random.Random(seed)
    path = write_study(root, text)
    study, runs = load_study(str(path)), root / "runs"
    for number in range(kills):
        if all(entry.state == "done" for entry in read_ledger(study, runs)):
            return study, runs, number
        before = committed(study, runs)
        process = driver(root, path)
        due = (lambda: is_running(study, runs)) if number % 2 else (
            lambda before=before: committed(study, runs) > before
        )  # fmt: skip
        wait_for(lambda one=process, due=due: due() or one.poll() is not None, 240)
        time.sleep(draw.uniform(0, 0.6))
        family = (
            psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        )
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not [one for one in alive if one.is_running() and one.status() != "zombie"]
    assert driver(root, path).wait(900) == 0
    return study, runs, kills


def committed(study, runs):
    """Steps that all cells together have committed."""
    commits = [find_run(study.folder(runs) / cell.id)[1] for cell in study.cells]
    return sum(commit.step for commit in commits if commit)


def test_kill_9_of_the_driver_leaves_no_orphan_and_no_cell_runs_twice(undisturbed, tmp_path):
    study, runs, killed = disturb(tmp_path, TINY, kills=2)
    assert killed >= 1
    ended_once(study, runs)
    found = {e.id: digest(e.run) for e in read_ledger(study, runs)}
    assert found == digests(undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_of_the_driver(tmp_path):
    # enough work for fifty kills on a slow machine too; in 100 steps some of b would diverge
    text = TINY.replace("seeds = [0, 1]", f"seeds = {list(range(20))}").replace(
        "steps = 6", "steps = 40"
    )
    calm, _ = run_local(tmp_path, text.replace("tiny", "calm"))
    (tmp_path / "kills").mkdir()
    study, runs, killed = disturb(tmp_path / "kills", text, kills=50)
    logs = [(entry.folder / "log.txt").read_text() for entry in read_ledger(study, runs)]
    resumed = sum(log.count("continues at step") for log in logs)
    print(f"{killed} kills, {len(logs)} cells, {resumed} times a cell continued from a commit")
    assert killed == 50
    assert resumed >= 20
    ended_once(study, runs)
    assert {e.id: digest(e.run) for e in read_ledger(study, runs)} == digests(calm)


def test_a_signal_stops_the_cells_after_a_commit_and_the_same_command_goes_on(
    undisturbed, tmp_path
):
    long = TINY.replace("steps = 6", "steps = 4000").replace("seeds = [0, 1]", "seeds = [0]")
    path = write_study(tmp_path, long)
    study, runs = load_study(str(path)), tmp_path / "runs"
    process = driver(tmp_path, path)
    wait_for(lambda: any(entry.step > 4 for entry in read_ledger(study, runs)))
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 75
    entries = [entry for entry in read_ledger(study, runs) if entry.run]
    assert entries
    assert {entry.state for entry in entries} == {"stale"}
    assert all(not list(entry.folder.glob("**/lock-*")) for entry in entries)


def test_slots_follow_the_device_and_the_resources(undisturbed, monkeypatch):
    from dataclasses import replace

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    quarter = load_study(str(undisturbed.plan))
    needs = quarter.file.resources.model_copy(update={"gpus": 0.5})
    job = replace(undisturbed, study=replace(
        quarter, file=quarter.file.model_copy(update={"resources": needs})
    ), device="auto")  # fmt: skip
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in find_slots(job)] == ["3", "5"] * 2
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in find_slots(replace(job, slots=3))] == [
        "3",
        "5",
        "3",
    ]
    one = replace(job, device="cuda:1")
    assert {slot["CUDA_VISIBLE_DEVICES"] for slot in find_slots(one)} == {"5"}
    cores = len(os.sched_getaffinity(0))
    assert find_slots(replace(job, device="cpu")) == [{"CUDA_VISIBLE_DEVICES": ""}] * cores


# -- other engines ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_lines_of_a_plan_are_commands_for_xargs(undisturbed, tmp_path, capfd):
    place = tmp_path / "a place"  # whose name a shell must not split
    place.mkdir()
    path = write_study(place)
    command = tmp_path / "resdiag"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE.parent / "cli.py"} "$@"\n')
    command.chmod(0o755)
    words = ["study", "plan", str(path), "--runs", str(place / "runs"), "--device", "cpu"]
    assert app.run(words) == 0
    plan = capfd.readouterr().out
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    line = ["xargs", "-d", "\n", "-P", "2", "-I", "{}", "sh", "-c", "{}"]
    subprocess.run(line, input=plan, text=True, check=True, env=environment, timeout=280)
    study = load_study(str(path))
    found = {e.id: digest(e.run) for e in read_ledger(study, place / "runs")}
    assert found == digests(undisturbed)


def test_a_plan_of_commands_ends_like_the_engine(undisturbed, tmp_path, capsys):
    path = write_study(tmp_path, TINY)
    words = ["study", "plan", str(path), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    assert app.run([*words, "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [cell["id"] for cell in plan["cells"]] == list(states(undisturbed))
    command = plan["cells"][0]["command"]
    assert app.run(command[1:]) == 0
    entry = read_entry(tmp_path / "runs" / "tiny" / plan["cells"][0]["id"])
    assert digest(entry.run) == digests(undisturbed)[entry.id]
    capsys.readouterr()
    assert app.run(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # what is done is not in it
    assert all(line.startswith("resdiag study cell ") for line in lines)
