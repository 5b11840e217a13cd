"""Cells that are threads of one process train by turns, and end as each would by itself."""

import os
import signal
import sys
import threading

import psutil
import pytest
import torch
from captures import ASKED, TapeCapture
from hypothesis import given
from hypothesis import strategies as st
from study_runs import HERE, digests, driver, run_local, states, wait_for
from studyfiles import write_study
from tiny_training import digest, tiny_config, tiny_data, train, weights

from resdiag.cli.main import app
from resdiag.runs.environment import environment
from resdiag.runs.store import RunWriter
from resdiag.study.engines import thread_pool
from resdiag.study.ledger import read_ledger
from resdiag.study.progress import read_progress
from resdiag.study.study import load_study
from resdiag.training.display import Silent
from resdiag.training.fair_lock import FairLock, LockHandle
from resdiag.training.interrupt import Interrupt
from resdiag.training.loop import Training

MIXED = """
question = "Do neighbours matter?"
seeds = [0]
[fixed]
data = "digits"
width = 0.25
steps = 30
batch_size = 16
commit_every = 6
record_first = 6
[grid]
variant = ["elu", "elu_pre"]
depth = [8]
backend = ["eager", "fast"]
[[include]]
variant = "relu_nobn"
depth = 8
lr = 1e6
[[include]]
variant = "original"
depth = 14
seed = 3
steps = 11
[resources]
restarts = 1
patience_s = 200
"""


@pytest.fixture(autouse=True)
def _tests_can_be_imported(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What the cells compute in a process each."""
    found = digests(run_local(tmp_path_factory.mktemp("alone"), MIXED)[0])
    assert {words.split()[0] for words in found.values()} == {"done", "diverged"}
    return found


# -- the lock --------------------------------------------------------------------------------------


def serve(lock, scripts, held):
    """Threads that wait in this order; each notes its number, passes on, and leaves or fails."""
    order, threads = [], []

    def run(number, times, fails):
        with LockHandle(lock) as handle:
            order.append(number)
            for _ in range(times):
                handle.pass_on()
                order.append(number)
            if fails:
                raise RuntimeError(number)

    for number, script in enumerate(scripts):
        threads.append(threading.Thread(target=run, args=(number, *script), daemon=True))
        threads[-1].start()
        wait_for(lambda one=number: len(lock.waiting) == one + 1)
    held.__exit__()
    for thread in threads:
        thread.join(100)
        assert not thread.is_alive()
    return order


def round_robin(scripts):
    """The same without threads."""
    line, order = [(number, times) for number, (times, _) in enumerate(scripts)], []
    while line:
        number, times = line.pop(0)
        order.append(number)
        if times:
            line.append((number, times - 1))
    return order


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=4))
def test_the_lock_goes_round_whoever_leaves_or_fails(scripts):
    lock = FairLock()
    assert serve(lock, scripts, LockHandle(lock).__enter__()) == round_robin(scripts)
    with LockHandle(lock) as again:  # and is free at the end
        again.pass_on()


def test_a_released_lock_goes_to_those_that_wait_and_comes_back_last():
    lock, order = FairLock(), []
    with LockHandle(lock) as held:

        def other():
            with LockHandle(lock) as handle:
                order.append("other")
                handle.pass_on()
                order.append("other again")

        thread = threading.Thread(target=other, daemon=True)
        thread.start()
        wait_for(lambda: lock.waiting)
        with held.released():
            thread.join(100)
        order.append("back")
    assert order == ["other", "other again", "back"]


# -- trainings in threads --------------------------------------------------------------------------


class NotedHandle(LockHandle):
    """Notes which training ends a step."""

    def __init__(self, lock, name, order):
        super().__init__(lock)
        self.name, self.order = name, order

    def pass_on(self):
        self.order.append(self.name)
        super().pass_on()


def train_together(root, asked, capture=lambda: None):
    """Trainings in a thread each: their weights, their digests, and the order of their steps."""
    lock, order, ended = FairLock(), [], {}

    def run(number, changes):
        config, data = tiny_config(**changes), tiny_data()
        described = environment(config.device, config.dtype)
        folder = root / str(number)
        with (
            NotedHandle(lock, number, order) as handle,
            RunWriter.open(folder, config, environment=described, data=data.identity) as writer,
        ):
            training = Training(config, data, writer, capture=capture(), thread_lock=handle)
            training.run(Silent(), Interrupt())
            ended[number] = weights(training.model), writer.folder

    threads = [threading.Thread(target=run, args=about, daemon=True) for about in enumerate(asked)]
    with LockHandle(lock):
        for thread in threads:
            thread.start()
        wait_for(lambda: len(lock.waiting) == len(threads))
    for thread in threads:
        thread.join(100)
    return [(ended[number][0], digest(ended[number][1])) for number in range(len(asked))], order


def test_graphs_of_trainings_that_take_turns_have_the_bits_of_each_alone(tmp_path, monkeypatch):
    """Passes from tapes that stand for CUDA graphs; recorded, not recorded, and smaller batches."""
    graph = {**ASKED, "backend": "graph"}
    asked = [{**graph, "variant": "elu"}, {**graph, "variant": "original", "steps": 9, "seed": 1},
             {**graph, "variant": "elu", "every": 2}]  # fmt: skip
    patched = lambda: TapeCapture(monkeypatch)  # noqa: E731
    alone = [train_together(tmp_path / f"alone{i}", [one], patched)[0][0]
             for i, one in enumerate(asked)]  # fmt: skip
    together, order = train_together(tmp_path / "together", asked, patched)
    assert together == alone
    assert len(set(order[:3])) == 3
    assert order[:15] == order[:3] * 5  # the second commit waits for the first one without the lock


def test_the_fast_elu_is_that_of_its_own_thread(tmp_path):
    asked = [{"backend": "fast"}, {"backend": "eager"}]
    alone = [train(tmp_path / str(i), **one) for i, one in enumerate(asked)]
    together, order = train_together(tmp_path / "together", asked)
    assert set(order[:2]) == {0, 1}
    assert order[:10] == order[:2] * 5
    assert [bits for bits, _ in together] == [weights(one.model) for one, _, _ in alone]
    assert together[0][0] != together[1][0]


# -- a study ---------------------------------------------------------------------------------------


def test_cells_that_share_a_process_end_as_in_one_each_and_a_failing_one_fails_alone(
    alone, tmp_path
):
    failing = '[[include]]\nvariant = "plain"\ndepth = 8\n'
    lost = '[[include]]\nvariant = "original"\ndepth = 20\ndata = "folder:nowhere"\n'
    text = MIXED.replace("[resources]", f"{failing}{lost}[resources]")
    job, said = run_local(tmp_path, text, each=3, target="studyfiles:noted")
    assert digests(job) == alone
    found = {entry.id: entry for entry in read_ledger(job.study, job.runs)}
    assert (
        sorted(entry.state for entry in found.values() if entry.id not in alone) == ["failed"] * 2
    )
    messages = {id: entry.message for id, entry in found.items() if entry.state == "failed"}
    assert any("a fault in the middle of a training" in one for one in messages.values())
    assert any("nowhere" in one for one in messages.values())
    assert not any("died" in line for line in said)

    turns = [line.split() for line in (job.runs / "steps.txt").read_text().splitlines()]
    processes = {int(pid) for _, pid, _ in turns}
    assert len(processes) == 1
    assert {read_progress(job.folder(cell))["pid"] for cell in alone} == processes
    order = [cell for cell, _, _ in turns]
    trio = list(dict.fromkeys(order))[:3]  # on a busy machine one of them may begin late
    last = min(len(order) - 1 - order[::-1].index(cell) for cell in trio)
    shared = order[order.index(trio[2]) : last + 1]
    assert len(shared) >= 3
    assert shared[3:] == shared[:-3]  # while all three are there, they take turns
    for cell in alone:  # what each said is in its own log, and nothing of the others
        log = job.folder(cell).joinpath("log.txt").read_text()
        assert log.count("data: ") == 1
        assert log.rstrip().splitlines()[-1].startswith(f"{cell}: d")
        assert not any(other in log for other in found if other != cell)


def test_cells_that_kill_their_process_are_found_and_the_others_go_on(alone, tmp_path):
    """Two of four; the others are started again although they did no harm."""
    head, tail = MIXED.index("[[include]]"), MIXED.index("[resources]")
    text = MIXED[:head] + MIXED[tail:]
    job, said = run_local(
        tmp_path, text, each=4, target="studyfiles:faulty", faults={"elu-d8": "segfault"}
    )
    found = {entry.id: entry for entry in read_ledger(job.study, job.runs)}
    guilty = [id for id in found if id.startswith("elu-d8")]
    assert len(guilty) == 2
    assert all("SIGSEGV" in found[id].message for id in guilty)
    harmless = [id for id in found if id not in guilty]
    assert digests(job) == {id: alone[id] for id in harmless}
    assert said.count("a process that 4 cells shared died; each continues in its own") == 1
    assert sorted(line for line in said if "started again" in line) == sorted(
        f"{id}: killed by SIGSEGV; started again" for id in guilty
    )


@pytest.mark.slow
def test_a_cell_that_hangs_ends_its_process_and_fails_alone(alone, tmp_path):
    job, said = run_local(
        tmp_path,
        MIXED.replace("patience_s = 200", "patience_s = 30"),
        each=3,
        target="studyfiles:faulty",
        faults={"relu_nobn": "hang"},
    )
    (guilty,) = (id for id, state in states(job).items() if state == "failed")
    assert f"{guilty}: makes no progress; the process that it shares is killed" in said
    assert digests(job) == {id: words for id, words in alone.items() if id != guilty}


def test_a_signal_stops_the_cells_after_commits_and_kill_9_of_their_process_loses_nothing(
    alone, tmp_path
):
    path, runs = write_study(tmp_path, MIXED), tmp_path / "runs"
    study = load_study(str(path))

    def entries():
        return read_ledger(study, runs)

    process = driver(tmp_path, path, "--cells-per-device", "3")
    wait_for(lambda: any(entry.step > 2 for entry in entries()))
    process.send_signal(signal.SIGTERM)
    assert process.wait(250) == 75
    begun = [entry for entry in entries() if entry.run]
    assert begun
    assert {entry.state for entry in begun} <= {"stale", "done", "diverged"}
    assert not list((runs / "tiny").glob("**/lock-*"))

    steps = sum(entry.step for entry in begun)
    process = driver(tmp_path, path, "--cells-per-device", "3")
    wait_for(lambda: sum(entry.step for entry in entries()) > steps + 4)
    (family,) = psutil.Process(process.pid).children()
    family.kill()
    assert process.wait(300) == 0
    assert "each continues in its own" in (tmp_path / "driver.txt").read_text()
    assert {entry.id: digest(entry.run) for entry in entries()} == alone


def test_kill_9_of_the_driver_ends_the_process(tmp_path):
    path = write_study(tmp_path, MIXED.replace("steps = 30", "steps = 4000"))
    study, runs = load_study(str(path)), tmp_path / "runs"
    process = driver(tmp_path, path, "--cells-per-device", "2")
    wait_for(lambda: any(entry.state == "running" for entry in read_ledger(study, runs)))
    family = psutil.Process(process.pid).children()
    assert len(family) == 1
    process.kill()
    process.wait()
    gone, _ = psutil.wait_procs(family, timeout=60)
    assert gone == family
    assert {entry.state for entry in read_ledger(study, runs)} <= {"stale", "missing"}


@pytest.mark.parametrize("error", [None, RuntimeError("CUDA error: an illegal memory access")])
def test_a_device_that_is_lost_ends_the_process_and_not_its_cells_one_by_one(error, monkeypatch):
    ended = []

    def synchronize():
        if error is not None:
            raise error

    monkeypatch.setattr(thread_pool.torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(thread_pool.torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(thread_pool.os, "_exit", ended.append)
    stream = thread_pool.PerThreadStream(sys.stderr)
    pool = thread_pool.ThreadWorkerPool(lambda task, handle: 1, 1, stream)
    pool.handles["a"] = LockHandle(FairLock())
    monkeypatch.setattr(thread_pool, "send_event", lambda **event: ended.append(event) or True)
    pool.serve({"start": "a", "task": {}, "log": os.devnull})
    assert ended[0] == ({"ended": "a", "code": 1} if error is None else 1)


def test_a_shared_process_sees_its_gpu_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    job, _ = run_local(tmp_path, each=2, target="studyfiles:told", device="cuda:1")
    assert (job.runs / "devices.txt").read_text().splitlines() == ["cuda 5"] * len(job.cells)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "ray"], "--cells-per-device is for the local engine, not ray"),
        (["--engine", "slurm"], "--cells-per-device is for the local engine, not slurm"),
        (["--slots", "4"], "--slots and --cells-per-device exclude each other"),
        (["--set", "fixed.backend=compile"], "backend 'compile' needs a process of its own"),
    ],
)
def test_what_a_shared_process_cannot_do_is_one_line(options, words, tmp_path, capsys):
    path, runs = (
        write_study(tmp_path, MIXED.replace('backend = ["eager", "fast"]\n', "")),
        tmp_path / "runs",
    )
    command = ["study", "run", str(path), "--runs", str(runs), "--device", "cpu"]
    assert app.run([*command, "--cells-per-device", "3", *options]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert words in error
    assert not list(runs.glob("*/*/*"))


def test_cells_of_a_gpu_have_a_stream_each_and_the_bits_of_each_alone(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    text = MIXED.replace('"fast"', '"graph"')
    both = []
    for each in (1, 3):
        (tmp_path / str(each)).mkdir()
        job, _ = run_local(
            tmp_path / str(each), text, each=each, target="studyfiles:noted", device="cuda:0"
        )
        both.append(digests(job))
    assert len(both[0]) == 6
    assert both[0] == both[1]
    turns = [line.split() for line in (job.runs / "steps.txt").read_text().splitlines()]
    streams = [stream for _, _, stream in turns[:12]]
    assert len(set(streams[:3])) == 3
    assert "0" not in streams
    assert streams == streams[:3] * 4
