"""Ray, really started: several raylets on this machine; workers, raylets and drivers are killed."""

import contextlib
import re
import signal
import time

import psutil
import pytest
from study_runs import PATIENCE_S, digests, driver, ended_once, run_local, wait_for
from studyfiles import TINY, write_study
from tiny_training import digest

from resdiag.cli.main import app
from resdiag.runs.lock import find_holder
from resdiag.study.ledger import find_run, read_ledger
from resdiag.study.study import load_study

# a cluster is a dozen processes: beside others its start and its answers take ten times as long
pytestmark = pytest.mark.timeout(900)

pytest.importorskip("ray", reason="Ray is not installed: pip install 'resdiag[ray]'")

SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
LONG = (
    TINY.replace("steps = 6", "steps = 300")
    .replace("commit_every = 2", "commit_every = 10")
    .replace('["elu", "elu_pre"]', '["elu"]')
)
"""Two cells of many seconds, so that something can happen to them."""
SHORT = LONG.replace("steps = 300", "steps = 60")


@contextlib.contextmanager
def raylets(*nodes):
    """A head without CPUs and a raylet for each of `nodes`: the cluster, as Ray's own tests do."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **SMALL})
    try:
        for node in nodes:
            cluster.add_node(**node, **SMALL)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The long cells, by the local engine."""
    return digests(run_local(tmp_path_factory.mktemp("undisturbed"), LONG)[0])


@pytest.fixture(scope="module")
def cluster():
    with raylets({"num_cpus": 1, "num_gpus": 1}, {"num_cpus": 1, "num_gpus": 1}) as started:
        yield started


def begin(root, address, text=LONG, *more):
    """A driver on a cluster, and the worker of a cell that has committed something."""
    path = write_study(root, text)
    study, runs = load_study(str(path)), root / "runs"
    process = driver(root, path, "--engine", "ray", "--address", address, *more)
    wait_for(lambda: find_committed(study, runs))
    return study, runs, process, find_committed(study, runs)


def find_committed(study, runs):
    """The process of a cell that is in its middle."""
    for cell in study.cells:
        folder = study.folder(runs) / cell.id
        _, commit = find_run(folder)
        holder = find_holder(folder)
        if commit and 0 < commit.step < cell.request.steps * 0.7 and holder and holder.alive:
            return psutil.Process(holder.pid)
    return None


def came_out(study, runs):
    return {entry.id: digest(entry.run) for entry in read_ledger(study, runs)}


def logs(study, runs):
    return "\n".join(path.read_text() for path in study.folder(runs).glob("*/log.txt"))


def ray_processes():
    """What Ray has running on this machine."""
    listed = psutil.process_iter(["cmdline"])
    return [
        one for one in listed if re.match(r"ray::|.*/ray/", " ".join(one.info["cmdline"] or []))
    ]


@pytest.mark.slow
def test_a_cluster_of_its_own_leaves_no_process(tmp_path):
    before = set(psutil.pids())
    path = write_study(tmp_path, SHORT)
    assert driver(tmp_path, path, "--engine", "ray", "--slots", "2").wait(280) == 0
    ended_once(load_study(str(path)), tmp_path / "runs")
    wait_for(lambda: not [one for one in ray_processes() if one.pid not in before])


@pytest.mark.parametrize(
    ("address", "code", "words"),
    [
        ("127.0.0.1:1", 1, "no Ray cluster at '127.0.0.1:1': [Errno 111] Connection refused"),
        ("127.0.0.1:99999", 1, "no Ray cluster at '127.0.0.1:99999'"),
        ("somewhere", 2, "--address 'somewhere' is neither HOST:PORT nor auto"),
        ("auto", 1, "no Ray cluster at 'auto'"),
    ],
)
def test_a_cluster_that_is_not_there_is_named_at_once(
    address, code, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address == "auto" and ray_processes():
        pytest.skip("a cluster runs on this machine, of another test perhaps: auto finds it")
    line = ["study", "run", str(write_study(tmp_path, SHORT)), "--runs", str(tmp_path / "runs")]
    assert app.run([*line, "--engine", "ray", "--address", address]) == code
    assert words in capsys.readouterr().err


def test_a_killed_worker_is_replaced_and_the_digest_is_that_of_the_local_engine(cluster, tmp_path):
    study, runs, process, worker = begin(tmp_path, cluster.address, SHORT)
    worker.kill()
    assert process.wait(PATIENCE_S) == 0
    ended_once(study, runs)
    (tmp_path / "local").mkdir()
    assert came_out(study, runs) == digests(run_local(tmp_path / "local", SHORT)[0])
    said = (tmp_path / "driver.txt").read_text()
    assert said.count("its process died") == said.count("started again") == 1
    assert "(raylet)" not in said  # Ray's own words are in a file beside the cells
    assert "continues at step" in logs(study, runs)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["the raylet alone", "the node"])
def test_a_killed_node_costs_nothing_but_time(what, undisturbed, tmp_path):
    """Without its raylet a worker may go on, and its result arrive, while Ray buries the node."""
    with raylets({"num_cpus": 1}, {"num_cpus": 1}) as cluster:
        study, runs, process, worker = begin(tmp_path, cluster.address)
        raylet = worker.parent()
        family = [raylet, *(raylet.children() if what == "the node" else [])]
        for one in family:
            one.kill()
        assert process.wait(280) == 0
    ended_once(study, runs)
    assert came_out(study, runs) == undisturbed
    said = (tmp_path / "driver.txt").read_text()
    assert what != "the node" or "started again" in said


@pytest.mark.slow
def test_a_killed_driver_leaves_no_worker_and_the_same_command_goes_on(
    cluster, undisturbed, tmp_path
):
    study, runs, process, worker = begin(tmp_path, cluster.address)
    process.kill()
    began = time.monotonic()
    _, alive = psutil.wait_procs([worker], timeout=60)
    print(f"the worker ended {time.monotonic() - began:.1f} s after its driver")
    assert not alive
    address = ["--engine", "ray", "--address", cluster.address]
    assert driver(tmp_path, tmp_path / "tiny.toml", *address).wait(240) == 0
    ended_once(study, runs)
    assert came_out(study, runs) == undisturbed


@pytest.mark.slow
def test_a_second_driver_at_once_waits_for_the_cells_of_the_first(cluster, undisturbed, tmp_path):
    study, runs, process, _ = begin(tmp_path, cluster.address)
    second = driver(tmp_path, tmp_path / "tiny.toml", "--slots", "2")  # the local engine
    assert process.wait(240) == 0
    assert second.wait(240) == 0
    ended_once(study, runs)
    assert came_out(study, runs) == undisturbed


@pytest.mark.slow
def test_a_signal_has_the_workers_commit_and_stop(cluster, undisturbed, tmp_path):
    study, runs, process, _ = begin(tmp_path, cluster.address)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 75
    assert {entry.state for entry in read_ledger(study, runs)} <= {"stale", "done", "missing"}
    assert "stopped after" in logs(study, runs)
    address = ["--engine", "ray", "--address", cluster.address]
    assert driver(tmp_path, tmp_path / "tiny.toml", *address).wait(240) == 0
    assert came_out(study, runs) == undisturbed


@pytest.mark.slow
def test_a_stopped_worker_counts_as_hung(cluster, undisturbed, tmp_path):
    text = LONG + "[resources]\npatience_s = 15\n"
    study, runs, process, worker = begin(tmp_path, cluster.address, text)
    worker.send_signal(signal.SIGSTOP)
    try:
        assert process.wait(280) == 0
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    assert came_out(study, runs) == undisturbed
    assert "no progress for 15 s" in (tmp_path / "driver.txt").read_text()


@pytest.mark.slow
def test_cells_share_a_gpu_by_fractions(tmp_path):
    """One logical GPU, half a GPU a cell: two at a time of six, though there are CPUs for four."""
    text = SHORT.replace("[0, 1]", "[0, 1, 2, 3, 4, 5]") + "[resources]\ngpus = 0.5\n"
    with raylets({"num_cpus": 4, "num_gpus": 1}) as cluster:
        study, runs, process, _ = begin(tmp_path, cluster.address, text, "--device", "auto")
        most = 0
        while process.poll() is None:
            most = max(most, sum(entry.state == "running" for entry in read_ledger(study, runs)))
            time.sleep(0.2)
    assert process.returncode == 0
    assert most == 2
    ended_once(study, runs)


@pytest.mark.slow
def test_a_cell_that_no_node_can_hold_is_said_to_wait(cluster, tmp_path):
    path = write_study(tmp_path, SHORT + "[resources]\nthreads = 8\n")
    process = driver(tmp_path, path, "--engine", "ray", "--address", cluster.address)
    said = tmp_path / "driver.txt"
    wait_for(lambda: "no node has 8 CPUs and 0 GPUs for a cell" in said.read_text())
    process.terminate()
    assert process.wait(PATIENCE_S) == 75
