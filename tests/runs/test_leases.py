"""Leases: who has a cell, who has lost it, whatever clocks and processes do."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from resdiag.errors import BusyError
from resdiag.runs.lock import Heartbeat, Lock


def test_an_owner_that_beats_keeps_its_folder_and_a_silent_one_is_fenced(tmp_path):
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
        "from resdiag.runs.lock import Heartbeat; from resdiag.errors import BusyError\n"
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
        out, _ = process.communicate("go\n", timeout=280)
    assert out == "fenced\n"


@pytest.mark.parametrize("jump", [-3600.0, 3600.0 * 24 * 365])
def test_a_clock_that_jumps_neither_frees_a_cell_nor_keeps_it(jump, tmp_path):
    """What another host's clock says of a beat does not count, only whether beats arrive."""
    owner = Lock.take(tmp_path)
    owner.path.write_bytes(owner.path.read_bytes().replace(b'"host": "', b'"host": "other-'))
    beaten = [time.time() - jump]

    def beat():
        beaten[0] += 1
        os.utime(owner.path, (beaten[0], beaten[0]))

    with Heartbeat(beat, every=0.05), pytest.raises(BusyError, match="is being written"):
        Lock.take(tmp_path, patience=2.0)
    Lock.take(tmp_path, patience=0.3).check()


def test_an_owner_that_dies_is_not_waited_for(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from resdiag.runs.lock import Lock\n"
        "Lock.take(Path(sys.argv[1])); print('has it', flush=True); time.sleep(3600)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "has it\n"
        timer = threading.Timer(0.5, process.kill)
        timer.start()
        Lock.take(tmp_path, patience=3600.0).check()  # the test's own timeout is a minute
