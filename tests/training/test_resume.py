"""A run that is killed at any instant resumes by the same command and ends bit-identical."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest
from forked import start_cell, start_command, wait_for
from tiny_training import digest

from resdiag.runs.commit import COMMIT, Commit

pytestmark = pytest.mark.timeout(600)  # dozens of processes

ROOT = Path(__file__).resolve().parents[2]
PLAIN = {"steps": 18, "commit_every": 4, "record_first": 5, "every": 3}
KINDS = (
    {"variant": "elu", "width": 0.25},
    {"variant": "original", "width": 0.5, "recipe": "paper"},
    {"variant": "plain", "width": 0.25, "every": 7, "record_first": 0},
    {"variant": "elu_pre", "width": 0.25, "lr": 0.2},
    {"variant": "elu_nobn", "width": 0.25, "lr": 30.0},  # explodes between two commits
)


@dataclass
class Tally:
    """What the killing came to."""

    kills: int = 0
    finished: int = 0
    lost: list[str] = field(default_factory=list)
    differ: list[str] = field(default_factory=list)


def committed(folder):
    """The step of the last commit; 0 before the first."""
    return Commit.read(folder / COMMIT).step if (folder / COMMIT).exists() else 0


def straight(root, asked):
    """The uninterrupted run: its folder's name, its digest, and the seconds it took."""
    begun = time.monotonic()
    assert wait_for(start_cell(root, asked), 280) == 0
    seconds = time.monotonic() - begun
    (folder,) = root.iterdir()
    return folder.name, digest(folder), seconds


def kill_until_done(root, asked, name, expected, seconds, dice, tally, longest=11):
    """Start the same cell again and again, each killed at a random instant, until it is done.

    After `longest` kills it may run to its end.
    """
    folder, last = root / name, 0
    for attempt in range(longest + 1):
        process = start_cell(root, asked)
        code = wait_for(process, dice.uniform(0, 0.7 * seconds) if attempt < longest else 280)
        if code is None:
            process.kill()
            process.join()
            tally.kills += 1
        now = committed(folder)
        if now < last:
            tally.lost.append(f"{name}: {last} -> {now}")
        last = now
        assert code in (None, 0), f"{name} failed after {tally.kills} kills"
        if code == 0:
            break
    tally.finished += 1
    if digest(folder) != expected:
        tally.differ.append(name)


def soak(tmp_path, kills, seed):
    """Kill runs of every kind until there are enough kills."""
    dice, tally = random.Random(seed), Tally()
    known = [straight(tmp_path / f"straight{i}", {**PLAIN, **kind}) for i, kind in enumerate(KINDS)]
    for turn in count():
        if tally.kills >= kills and turn >= len(KINDS):
            break
        kind, reference = KINDS[turn % len(KINDS)], known[turn % len(KINDS)]
        kill_until_done(tmp_path / str(turn), {**PLAIN, **kind}, *reference, dice, tally)
    print(f"{tally.kills} kills, {tally.finished} finished runs, {len(KINDS)} kinds")
    return tally


def test_fifty_kills_lose_no_commit_and_change_no_bit(tmp_path):
    tally = soak(tmp_path, kills=50, seed=1)
    assert tally.lost == []
    assert tally.differ == []
    assert tally.finished >= len(KINDS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [2, 3])
def test_hundreds_of_kills_lose_no_commit_and_change_no_bit(tmp_path, seed):
    tally = soak(tmp_path, kills=250, seed=seed)
    assert (tally.lost, tally.differ) == ([], [])


def test_the_reference_runs_end_as_they_are_meant_to(tmp_path):
    """Two uninterrupted runs are equal, and the exploding kind does explode within it."""
    name, first, _ = straight(tmp_path / "a", {**PLAIN, **KINDS[4]})
    assert straight(tmp_path / "b", {**PLAIN, **KINDS[4]})[:2] == (name, first)
    assert first.startswith("diverged")
    assert 4 < committed(tmp_path / "a" / name) < PLAIN["steps"]


COMMAND = [
    sys.executable, str(ROOT / "cli.py"), "run", "--variant", "elu", "--depth", "8",
    "--width", "0.25", "--data", "digits", "--steps", "40", "--batch-size", "32",
    "--commit-every", "3", "--threads", "1", "--json",
]  # fmt: skip


def start(root):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*COMMAND, "--runs", str(root)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_commit(root, process):
    """Wait until the process has committed once; False if it ended before."""
    while process.poll() is None:
        if list(root.glob("*/COMMIT.json")):
            return True
        time.sleep(0.005)
    return False


@pytest.mark.slow
def test_the_command_itself_survives_kills(tmp_path):
    output, _ = start(tmp_path / "straight").communicate()
    document = json.loads(output)
    expected = digest(document["run"])
    dice = random.Random(4)
    root, last = tmp_path / "killed", 0
    for _ in range(8):
        process = start(root)
        if wait_for_commit(root, process):
            time.sleep(dice.uniform(0, 3.5))
        process.kill()
        process.communicate()
        (folder,) = root.iterdir()
        assert committed(folder) >= last
        last = committed(folder)
    output, _ = start(root).communicate()
    assert json.loads(output)["status"] == "done"
    assert digest(json.loads(output)["run"]) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_the_command_stops_on_a_signal_with_a_commit_and_continues(tmp_path, number, code):
    process = start(tmp_path)
    assert wait_for_commit(tmp_path, process)
    process.send_signal(number)
    output, error = process.communicate()
    document = json.loads(output)
    assert process.returncode == code
    assert document["status"] == "stopped"
    assert "Traceback" not in error
    again = start(tmp_path)
    output, _ = again.communicate()
    assert (again.returncode, json.loads(output)["status"]) == (0, "done")
    assert json.loads(output)["resumed_at"] == document["steps"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_the_command_at_once(tmp_path, number):
    process = start(tmp_path)
    assert wait_for_commit(tmp_path, process)
    process.send_signal(number)
    process.send_signal(number)
    _, error = process.communicate(timeout=280)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 75}[number]
    assert "Traceback" not in error


ENDLESS = [
    "run", "--variant", "elu", "--depth", "8", "--width", "0.25", "--data", "digits",
    "--steps", "1000000", "--batch-size", "8", "--commit-every", "2", "--record-first", "5",
    "--every", "50", "--quiet",
]  # fmt: skip


def stop_again_and_again(tmp_path, tries, seed):
    """Start one run again and again, and end it by SIGTERM, once or twice, at a random instant."""
    dice, root, said = random.Random(seed), tmp_path / "runs", tmp_path / "stderr.txt"
    root.mkdir()
    last = 0
    for attempt in range(tries):
        process = start_command([*ENDLESS, "--runs", root], said)
        # its handlers are set before it takes the run's lock
        until = time.monotonic() + 280
        while not list(root.glob("*/lock-*.json")):
            assert time.monotonic() < until, said.read_text()
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.6))
        process.terminate()
        if attempt % 3 == 2:
            time.sleep(dice.choice([0, 0, 0.0001, 0.01]))
            process.terminate()
        assert wait_for(process, 280) == 75, said.read_text()
        for lock in root.glob("*/lock-*.json"):
            lock.unlink()  # a second signal leaves it
        (folder,) = root.iterdir()
        now = committed(folder)
        assert now >= last
        if attempt % 3 != 2:
            assert now > last
            assert Commit.read(folder / COMMIT).status == "stopped"
        if now:
            Commit.read(folder / COMMIT).verify(folder)
        last = now
    assert "Traceback" not in said.read_text()
    assert "Exception ignored" not in said.read_text()


def test_sigterm_at_any_instant_ends_in_a_commit_and_exit_code_75(tmp_path):
    stop_again_and_again(tmp_path, tries=9, seed=5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [6, 7])
def test_sigterm_at_hundreds_of_instants_ends_in_a_commit_and_exit_code_75(tmp_path, seed):
    stop_again_and_again(tmp_path, tries=200, seed=seed)
