"""Slurm, really started from Debian's packages: jobs, nodes and drivers are killed and come back.

What needs no Slurm runs with submitit's executor of this machine: pickling, starting, collecting.
"""

import getpass
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time

import psutil
import pytest
from study_runs import digests, driver, ended_once, run_local, wait_for
from studyfiles import TINY, write_study
from tiny_training import digest

from resdiag.cli.main import app
from resdiag.runs.lock import find_holder
from resdiag.study.engines import slurm
from resdiag.study.engines.job import Job
from resdiag.study.ledger import find_run, read_ledger
from resdiag.study.progress import read_progress
from resdiag.study.study import load_study
from resdiag.training.interrupt import Interrupt

submitit = pytest.importorskip("submitit", reason="pip install 'resdiag[slurm]'")

LONG = (
    TINY.replace("steps = 6", "steps = 200")
    .replace("commit_every = 2", "commit_every = 10")
    .replace('["elu", "elu_pre"]', '["elu"]')
)
SHORT = TINY.replace("[0, 1]", "[0]").replace('["elu", "elu_pre"]', '["elu"]')


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The long cells, by the local engine."""
    return digests(run_local(tmp_path_factory.mktemp("undisturbed"), LONG)[0])


def came_out(study, runs):
    return {entry.id: digest(entry.run) for entry in read_ledger(study, runs)}


# -- without Slurm ---------------------------------------------------------------------------------


class ThisMachine(slurm.SlurmJobs):
    """Jobs without Slurm: submitit starts every one at once."""

    def __init__(self, job):
        executor = slurm.open_executor(job, "local")
        executor.update_parameters(timeout_min=10)
        super().__init__(job, executor)
        self.started = {}

    def submit(self, cells):
        jobs = super().submit(cells)
        self.started |= {job.job_id: job for job in jobs}
        return jobs

    def states(self, jobs):
        return {id: "COMPLETED" if self.started[id].done() else "RUNNING" for id in jobs}

    def cancel(self, jobs):
        for id in jobs:
            self.started[id].cancel()


def test_a_job_ends_like_a_cell_of_the_local_engine(tmp_path, monkeypatch):
    for name in ("_ASK_S", "_LOOK_S"):
        monkeypatch.setattr(slurm, name, 0.1)
    study = load_study(str(write_study(tmp_path, SHORT)))
    runs, said = tmp_path / "runs", []
    cells = tuple(cell.id for cell in study.cells)
    plan = study.write_plan(runs)
    job = Job(study=study, plan=plan, cells=cells, runs=runs, device="cpu", say=said.append)
    ThisMachine(job).run(Interrupt())
    (tmp_path / "local").mkdir()
    assert came_out(study, runs) == digests(run_local(tmp_path / "local", SHORT)[0])
    ended_once(study, runs)
    assert said == [f"1 jobs submitted; scripts in {runs / 'tiny' / 'slurm'}"]


def test_without_slurm_the_engine_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    words = ["study", "run", str(write_study(tmp_path, SHORT)), "--engine", "slurm"]
    assert app.run([*words, "--runs", str(tmp_path / "runs")]) == 2
    assert "srun is not on the path" in capsys.readouterr().err


# -- a cluster of one node -------------------------------------------------------------------------

CONF = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={port}
SlurmdPort={port1}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdTimeout=10
KillWait=20
SchedulerParameters=sched_interval=2,batch_sched_delay=0
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 CoresPerSocket=4 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol")


class Cluster:
    """munged, slurmctld and slurmd in a folder, without systemd and without root's files."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("state", "spool"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        with socket.socket() as one, socket.socket() as two:
            one.bind(("", 0)), two.bind(("", 0))
            port, port1 = one.getsockname()[1], two.getsockname()[1]
        names = {"host": socket.gethostname(), "user": getpass.getuser(), "folder": folder}
        (folder / "slurm.conf").write_text(CONF.format(port=port, port1=port1, **names))
        files = {"socket": "munge.sock", "key-file": "munge.key", "pid-file": "munged.pid",
                 "log-file": "munged.log", "seed-file": "munged.seed"}  # fmt: skip
        options = (f"--{name}={folder / file}" for name, file in files.items())
        self.run("munged", "--force", *options)
        self.run("slurmctld", "-c")
        self.start_node()

    def run(self, *words):
        environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, check=False, timeout=280
        )
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    def start_node(self):
        self.run("slurmd")

    def is_idle(self):
        return "idle" in self.run("sinfo", "--noheader", "--format=%t")

    def kill_node(self):
        os.kill(int((self.folder / "slurmd.pid").read_text()), signal.SIGKILL)

    def close(self):
        self.run("scancel", "--user", getpass.getuser())
        for name in ("slurmd", "slurmctld", "munged"):
            path = self.folder / f"{name}.pid"
            if path.exists():
                psutil.Process(int(path.read_text())).terminate()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = [name for name in NEEDED if not shutil.which(name)]
    if missing:
        pytest.skip(f"{missing[0]} is not here: apt-get install slurm-wlm munge")
    started = Cluster(tmp_path_factory.mktemp("slurm"))
    wait_for(started.is_idle)
    yield started
    started.close()


def begin(cluster, monkeypatch, root, text=LONG):
    """A driver on the cluster, once a cell has committed something."""
    monkeypatch.setenv("SLURM_CONF", str(cluster.folder / "slurm.conf"))
    path = write_study(root, text)
    study, runs = load_study(str(path)), root / "runs"
    process = driver(root, path, "--engine", "slurm")
    wait_for(lambda: find_committed(study, runs))
    return study, runs, process


def find_committed(study, runs):
    """Id and process of a cell that is in its middle."""
    for cell in study.cells:
        folder = study.folder(runs) / cell.id
        _, commit = find_run(folder)
        holder = find_holder(folder)
        if commit and 0 < commit.step < 130 and holder and holder.alive:
            return cell.id, psutil.Process(holder.pid)
    return None


def is_training(study, runs, cell):
    return read_progress(study.folder(runs) / cell).get("step", 0) > 0


def job_of(study, runs, cell):
    return json.loads((study.folder(runs) / "slurm" / "jobs.json").read_text())[cell]


def log_of(study, runs, cell):
    return (study.folder(runs) / cell / "log.txt").read_text()


@pytest.mark.slow
def test_a_killed_process_is_started_again_as_another_job(
    cluster, undisturbed, tmp_path, monkeypatch
):
    study, runs, process = begin(cluster, monkeypatch, tmp_path)
    cell, worker = find_committed(study, runs)
    worker.kill()
    assert process.wait(280) == 0
    ended_once(study, runs)
    assert came_out(study, runs) == undisturbed
    assert "its job ended as FAILED; started again" in (tmp_path / "driver.txt").read_text()
    assert "continues at step" in log_of(study, runs, cell)


@pytest.mark.slow
def test_jobs_that_are_requeued_or_whose_time_is_up_commit_and_go_on_by_themselves(
    cluster, undisturbed, tmp_path, monkeypatch
):
    study, runs, process = begin(cluster, monkeypatch, tmp_path)
    ids = {cell.id: job_of(study, runs, cell.id) for cell in study.cells}
    first, second = ids.values()
    wait_for(lambda: all(is_training(study, runs, cell) for cell in ids))
    cluster.run("scontrol", "requeue", first)
    cluster.run("scancel", "--signal=USR2", second)  # what Slurm sends before the end of the time
    assert process.wait(290) == 0
    assert {cell.id: job_of(study, runs, cell.id) for cell in study.cells} == ids
    ended_once(study, runs)
    assert came_out(study, runs) == undisturbed
    for cell in ids:
        assert "stopped after" in log_of(study, runs, cell)
        assert "continues at step" in log_of(study, runs, cell)


@pytest.mark.slow
def test_a_dead_node_costs_nothing_but_time(cluster, undisturbed, tmp_path, monkeypatch):
    """slurmd dies and its jobs are requeued, while their processes live on: two want one cell."""
    study, runs, process = begin(cluster, monkeypatch, tmp_path)
    ids = {job_of(study, runs, cell.id) for cell in study.cells}
    node = f"nodename={socket.gethostname()}"
    cluster.kill_node()
    cluster.run("scontrol", "update", node, "state=down", "reason=test")
    cluster.start_node()
    cluster.run("scontrol", "update", node, "state=resume")
    assert process.wait(290) == 0
    assert any("Restarts=1" in cluster.run("scontrol", "show", "job", id) for id in ids)
    ended_once(study, runs)
    assert came_out(study, runs) == undisturbed


@pytest.mark.slow
def test_a_driver_that_comes_back_finds_its_jobs_and_a_cancelled_one_stays_cancelled(
    cluster, undisturbed, tmp_path, monkeypatch
):
    study, runs, process = begin(cluster, monkeypatch, tmp_path)
    process.kill()
    process.wait()
    cell, _ = find_committed(study, runs)
    before = job_of(study, runs, cell)
    again = driver(tmp_path, tmp_path / "tiny.toml", "--engine", "slurm")
    wait_for(lambda: "in the queue already" in (tmp_path / "driver.txt").read_text())
    cluster.run("scancel", before)
    assert again.wait(280) == 0
    said = (tmp_path / "driver.txt").read_text()
    assert "jobs are in the queue already" in said
    assert f"{cell}: its job was cancelled; the same command continues it" in said
    assert "stopped after" in log_of(study, runs, cell)  # it committed first
    assert {e.id: e.state for e in read_ledger(study, runs)}[cell] == "stale"
    cluster.run("scontrol", "update", f"nodename={socket.gethostname()}", "state=drain",
                "reason=test")  # fmt: skip
    last = driver(tmp_path, tmp_path / "tiny.toml", "--engine", "slurm")
    time.sleep(8)
    assert last.poll() is None  # it waits for the node
    cluster.run("scontrol", "update", f"nodename={socket.gethostname()}", "state=resume")
    assert last.wait(280) == 0
    ended_once(study, runs)
    assert came_out(study, runs) == undisturbed
    assert job_of(study, runs, cell) != before


@pytest.mark.slow
def test_a_signal_has_the_jobs_commit_and_end(cluster, tmp_path, monkeypatch):
    study, runs, process = begin(cluster, monkeypatch, tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.wait(250) == 130
    wait_for(lambda: not cluster.run("squeue", "--noheader").strip())
    entries = read_ledger(study, runs)
    assert {entry.state for entry in entries} <= {"stale", "done"}
    assert "stopped after" in "".join(log_of(study, runs, entry.id) for entry in entries)


@pytest.mark.slow
def test_what_slurm_refuses_is_said(cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_CONF", str(cluster.folder / "slurm.conf"))
    words = ["study", "run", str(write_study(tmp_path, SHORT)), "--engine", "slurm"]
    words += ["--device", "cpu", "--partition", "nowhere", "--runs", str(tmp_path / "runs")]
    assert app.run(words) == 1
    assert "Slurm refused the jobs: invalid partition specified: nowhere" in capsys.readouterr().err
