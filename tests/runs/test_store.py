import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import (
    ENVIRONMENT,
    contents,
    continue_run,
    make_checkpoint,
    make_config,
    make_curve,
    make_metrics,
    open_writer,
    write_run,
)

from resdiag.catalog.table import RECORDED
from resdiag.errors import BusyError, StorageError, UsageError
from resdiag.runs import files, lock, segments
from resdiag.runs.folder import read_run

OPERATIONS = ("open", "write", "fsync", "rename", "unlink", "mkdir")


class Faulty(files.System):
    """Counts the operations and does `fault` at the n-th; nothing waits for the disk."""

    def __init__(self, at=None, fault=None, operations=OPERATIONS):
        self.done, self.at, self.fault, self.operations = [], at, fault, operations

    def __getattribute__(self, name):
        if name == "operations" or name not in self.operations:
            return super().__getattribute__(name)

        def operate(*args):
            self.done.append((name, args))
            if len(self.done) == self.at:
                self.fault(name, args)
            return None if name == "fsync" else getattr(files.System, name)(*args)

        return operate


def die(name, args):
    """The process ends here; of a write, half the bytes may have got through."""
    if name == "write":
        os.write(args[0], args[1][: len(args[1]) // 2])
    os._exit(9)


def in_child(work):
    """Run `work` in a fork; the lines it acknowledged, and whether it ended by itself."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work(lambda step: os.write(write, f"{step}\n".encode()))
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as lines:
        acknowledged = [int(line) for line in lines]
    return acknowledged, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def count_operations(root, monkeypatch):
    system = Faulty()
    with monkeypatch.context() as patch:
        patch.setattr(files, "system", system)
        write_run(root)
    return system.done


def litter(folder):
    return [str(p) for p in folder.rglob("*") if p.name.endswith(".tmp")]


def steps_seen(folder):
    """What a reader sees: 0 before there is a run."""
    if not (folder / "run.json").exists():
        return 0
    run = read_run(folder)
    assert len(run.curve()) == run.steps
    return run.steps


# --- crashes and failing disks --------------------------------------------------------------


@pytest.mark.timeout(900)  # more than a hundred processes
def test_a_crash_at_every_operation_leaves_a_commit_that_continues_to_the_same_end(
    tmp_path, monkeypatch
):
    operations = count_operations(tmp_path / "whole", monkeypatch)
    name = make_config().name
    expected = contents(tmp_path / "whole" / name)
    assert len(operations) > 100
    monkeypatch.setattr(lock, "_GRACE", 0.05)

    for point in range(1, len(operations) + 1):
        root = tmp_path / str(point)

        def work(acknowledge, root=root, point=point):
            files.system = Faulty(point, die)
            with open_writer(root) as writer:
                continue_run(writer, acknowledge=acknowledge)

        acknowledged, code = in_child(work)
        assert code == 9, point
        sure = max(acknowledged, default=0)
        assert steps_seen(root / name) in (sure, sure + 5), point
        monkeypatch.setattr(files, "system", Faulty())
        with open_writer(root) as writer:
            assert not litter(writer.folder), point
            at = writer.committed_step
            assert at in (sure, sure + 5), point
            checkpoint = writer.restore()
            assert (checkpoint.state["best"] if checkpoint else 0) == at
            continue_run(writer)
        assert contents(root / name) == expected, operations[point - 1]


def test_a_failing_disk_is_a_storage_error_and_leaves_the_old_commit(tmp_path, monkeypatch):
    operations = count_operations(tmp_path / "whole", monkeypatch)
    name = make_config().name
    expected = contents(tmp_path / "whole" / name)
    numbers = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT, errno.EROFS)

    for point in range(1, len(operations) + 1):
        number = numbers[point % len(numbers)]

        def fail(_name, args, number=number):
            raise OSError(number, os.strerror(number), str(args[0]))

        root, acknowledged = tmp_path / str(point), [0]
        monkeypatch.setattr(files, "system", Faulty(point, fail))
        failure = None
        try:
            with open_writer(root) as writer:
                continue_run(writer, acknowledge=acknowledged.append)
        except StorageError as error:
            failure = error
        if failure is None:  # removing an old file may fail, the commit stands
            assert operations[point - 1][0] == "unlink"
        else:
            assert os.strerror(number) in failure.message
            assert str(root) in failure.message
            assert failure.exit_code == 74
        assert not litter(root), operations[point - 1]
        assert steps_seen(root / name) in (acknowledged[-1], acknowledged[-1] + 5)
        monkeypatch.setattr(files, "system", Faulty())
        for path in root.glob("*/lock-*"):  # its removal failed, and this process lives on
            path.unlink()
        with open_writer(root) as writer:
            continue_run(writer)
        assert contents(root / name) == expected, operations[point - 1]


PASSING = ("EIO", "EMFILE", "ENFILE", "ESTALE", "EACCES", "ENOMEM")


@pytest.mark.parametrize("reason", PASSING)
def test_a_read_that_fails_for_a_while_changes_nothing(tmp_path, monkeypatch, reason):
    root, number = tmp_path / "run", getattr(errno, reason)
    with open_writer(root) as writer:
        continue_run(writer, until=10)
    before = _bytes(writer.folder)

    def fail(_name, args):
        raise OSError(number, os.strerror(number), str(args[0]))

    for point in range(1, 1000):
        monkeypatch.setattr(files, "system", Faulty(point, fail, operations=("read",)))
        failure = None
        try:
            with open_writer(root) as writer:
                writer.restore()
        except StorageError as error:
            failure = error
        if failure is None:
            break
        assert failure.exit_code == 74
        assert failure.message.startswith(f"cannot read {root}")
        assert os.strerror(number) in failure.message
        assert "repair" not in failure.hint
        assert _bytes(writer.folder) == before
        monkeypatch.setattr(files, "system", Faulty(1, fail, operations=("read",)))
        with pytest.raises(StorageError, match="cannot read"):
            read_run(writer.folder)
    assert point > 8  # each of the commits' files was read, and failed once
    monkeypatch.setattr(files, "system", files.System())
    with open_writer(root) as writer:
        assert writer.committed_step == 10
        continue_run(writer)
    with open_writer(tmp_path / "whole") as writer:
        continue_run(writer)
    assert contents(root / make_config().name) == contents(writer.folder)


def _bytes(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "lock" not in p.name}


def test_a_merge_of_segments_that_cannot_be_read_now_waits(tmp_path, monkeypatch):
    def fail(_name, args):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(args[0]))

    def refuse(*_):
        fail("read", ("a segment",))

    monkeypatch.setattr(segments, "COUNT", 2)
    with open_writer(tmp_path) as writer:
        continue_run(writer, until=5)
        monkeypatch.setattr(files.System, "read", staticmethod(refuse))
        continue_run(writer, until=10)
        assert writer.committed_step == 10
    monkeypatch.undo()
    assert read_run(writer.folder).steps == 10
    assert len(read_run(writer.folder).curve()) == 10


def test_a_commit_is_tried_again_after_room_was_made(tmp_path, monkeypatch):
    with open_writer(tmp_path) as writer:
        continue_run(writer, until=5)

    def full(_name, _args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_writer(tmp_path, make_config(seed=1)) as writer:
        monkeypatch.setattr(files, "system", Faulty(9, full))
        with pytest.raises(StorageError, match="No space left"):
            continue_run(writer)
        continue_run(writer)
        assert writer.status == "done"


def test_everything_a_commit_names_is_on_the_disk_before_the_commit(tmp_path, monkeypatch):
    handles, durable, renamed = {}, set(), set()

    class Recording(files.System):
        @staticmethod
        def open(path, *args):
            handle = os.open(path, *args)
            handles[handle] = path
            return handle

        @staticmethod
        def fsync(handle):
            path = handles[handle]
            durable.update({path} if path.is_file() else {p for p in renamed if p.parent == path})

        @staticmethod
        def rename(old, new):
            assert old in durable
            if new.name == "COMMIT.json":
                named = files.unseal(old.read_bytes(), old)["files"]
                assert {new.parent / name for name in named} <= durable
            old.replace(new)
            renamed.add(new)

    monkeypatch.setattr(files, "system", Recording())
    write_run(tmp_path)


# --- damage ---------------------------------------------------------------------------------


def damages(data):
    """Truncations and single flipped bits."""
    yield b""
    yield data[: len(data) // 2]
    yield data[:-1]
    for at in np.linspace(0, len(data) - 1, 12).astype(int):
        yield data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def test_every_damage_is_named_and_costs_at_most_one_commit(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "system", Faulty())
    folder = write_run(tmp_path)
    expected, whole = contents(folder), {p: p.read_bytes() for p in folder.rglob("*.*")}
    caplog.set_level(logging.WARNING)
    outcomes = set()
    for path, original in whole.items():
        for data in damages(original):
            for other, content in whole.items():
                other.write_bytes(content)
            path.write_bytes(data)
            caplog.clear()
            refusal = None
            try:
                with open_writer(tmp_path) as writer:
                    at = writer.committed_step
                    continue_run(writer)
            except UsageError as error:
                refusal = error
            if refusal:
                assert str(path) in refusal.message
                assert "\n" not in refusal.message
                assert "--force" in refusal.hint
                outcomes.add((path.name, "refused"))
                continue
            assert str(path) in caplog.text
            outcomes.add((path.name, at))
            if at < 15:
                assert contents(folder) == expected
    assert outcomes == {
        ("COMMIT.json", 10),
        ("COMMIT.prev.json", 15),
        ("ckpt-00000010.safetensors", 15),
        ("ckpt-00000015.safetensors", 10),
        ("state-00000010.json", 15),
        ("state-00000015.json", 10),
        ("verdict.json", 10),
        ("part-00000015.parquet", 10),
        *((f"part-{step:08d}.parquet", "refused") for step in (5, 10)),
        ("run.json", "refused"),
        ("blocks.json", "refused"),
    }


def test_a_lost_commit_is_not_taken_for_a_new_run(tmp_path):
    folder = write_run(tmp_path)
    (folder / "COMMIT.json").unlink()
    with open_writer(tmp_path) as writer:
        assert writer.committed_step == 10
    (folder / "COMMIT.json").unlink()
    (folder / "COMMIT.prev.json").unlink()
    with pytest.raises(UsageError, match=r"COMMIT\.json.*no other commit"):
        open_writer(tmp_path)
    with open_writer(tmp_path, force=True) as writer:
        assert writer.status == "new"
        assert not list(folder.rglob("part-*"))


# --- locks ----------------------------------------------------------------------------------


def test_a_second_writer_is_told_host_pid_and_age(tmp_path):
    with open_writer(tmp_path) as writer:
        with pytest.raises(BusyError) as caught:
            open_writer(tmp_path)
        assert f"process {os.getpid()} on {socket.gethostname()} since 0 s" in str(caught.value)
        assert caught.value.exit_code == 75
        writer.commit(5, {}, make_curve(0, 5), *make_checkpoint(5))
    open_writer(tmp_path).close()


def test_of_racing_processes_exactly_one_writes(tmp_path):
    for attempt in range(10):
        root = tmp_path / str(attempt)
        if attempt % 2:  # all find the lock of a dead process

            def leave(_acknowledge, root=root):
                open_writer(root)
                os._exit(9)

            in_child(leave)
        go, done, end = time.time() + 0.03, os.pipe(), os.pipe()
        for _ in range(3):
            if os.fork() == 0:
                os.close(end[1])
                try:
                    time.sleep(max(0, go - time.time()))
                    open_writer(root)
                    os.write(done[1], b"won ")
                except BusyError:
                    os.write(done[1], b"busy ")
                finally:
                    os.read(end[0], 1)  # alive until all have tried
                    os._exit(0)
        os.close(done[1])
        results = b""
        while len(results.split()) < 3 and (more := os.read(done[0], 100)):
            results += more
        for descriptor in (end[1], end[0], done[0]):
            os.close(descriptor)
        for _ in range(3):
            os.wait()
        results = results.split()
        assert sorted(results) == [b"busy", b"busy", b"won"]


def leave_lock(root, **owner):
    folder = write_run(root, until=5)
    content = {"host": socket.gethostname(), "pid": os.getpid(), "start": "", **owner}
    path = folder / "lock-3.json"
    path.write_text(json.dumps(content))
    return path


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    path = leave_lock(tmp_path, pid=2**22 + 1)
    with open_writer(tmp_path) as writer:
        assert not path.exists()
        assert (writer.folder / "lock-4.json").exists()
    assert not list(writer.folder.glob("lock-*"))


def test_a_reused_pid_is_not_the_owner(tmp_path):
    path = leave_lock(tmp_path, start="1")
    with open_writer(tmp_path):
        assert not path.exists()


def test_a_zombie_is_dead(tmp_path):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    time.sleep(0.05)
    path = leave_lock(tmp_path, pid=pid)
    with open_writer(tmp_path):
        assert not path.exists()
    os.waitpid(pid, 0)


def test_a_lock_of_another_host_is_respected(tmp_path):
    path = leave_lock(tmp_path, host="elsewhere", pid=1)
    with pytest.raises(BusyError, match="process 1 on elsewhere") as caught:
        open_writer(tmp_path)
    assert str(path) in caught.value.hint


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}', '{"host":"x","pid":[]}'])
def test_the_lock_of_a_process_that_died_while_writing_it_is_taken_over(
    tmp_path, monkeypatch, content
):
    monkeypatch.setattr(lock, "_GRACE", 0.1)
    path = leave_lock(tmp_path)
    path.write_text(content)
    with open_writer(tmp_path):
        assert not path.exists()


def test_a_lock_that_is_about_to_be_written_is_respected(tmp_path):
    path = leave_lock(tmp_path)
    content = path.read_text()
    path.write_text("")
    writing = threading.Timer(0.1, path.write_text, [content])
    writing.start()
    with pytest.raises(BusyError, match=f"process {os.getpid()}"):
        open_writer(tmp_path)


def test_a_writer_whose_lock_was_taken_over_commits_no_more(tmp_path):
    old = open_writer(tmp_path)
    continue_run(old, until=5)
    next(old.folder.glob("lock-*")).unlink()
    with open_writer(tmp_path) as new:
        before = contents(new.folder)
        with pytest.raises(BusyError, match="taken over"):
            old.commit(10, {}, make_curve(5, 10), *make_checkpoint(10))
        assert contents(new.folder) == before


# --- resuming -------------------------------------------------------------------------------


def test_a_changed_environment_is_refused_or_marked(tmp_path):
    with open_writer(tmp_path) as writer:
        writer.commit(5, {}, make_curve(0, 5), *make_checkpoint(5))
    now = {**ENVIRONMENT, "threads": 2, "git": "b"}
    with pytest.raises(UsageError, match=r"threads: 1 -> 2$") as caught:
        open_writer(tmp_path, environment=now)
    assert "--allow-drift" in caught.value.hint
    with open_writer(tmp_path, environment=now, allow_drift=True) as writer:
        assert read_run(writer.folder).drift == ()
        continue_run(writer, until=10)
        (drift,) = read_run(writer.folder).drift
        assert (drift["step"], drift["differences"]) == (5, ["threads: 1 -> 2"])
    open_writer(tmp_path, environment=now).close()


def test_a_finished_run_opens_anywhere(tmp_path):
    write_run(tmp_path)
    with open_writer(tmp_path, environment={}) as writer:
        assert writer.status == "done"


def test_other_data_or_another_config_is_refused(tmp_path):
    folder = write_run(tmp_path)
    with pytest.raises(UsageError, match="other data"):
        open_writer(tmp_path, data={"name": "cifar10"})
    other = make_config(lr=0.2)
    folder.rename(tmp_path / other.name)
    with pytest.raises(UsageError, match=r"holds another run: lr: 0\.1 -> 0\.2$"):
        open_writer(tmp_path, other)


def test_force_deletes_our_files_and_no_others(tmp_path):
    folder = write_run(tmp_path)
    (folder / "notes.txt").write_text("mine")
    (folder / "metrics" / "other.parquet").write_text("mine")
    with open_writer(tmp_path, force=True) as writer:
        assert (writer.status, writer.committed_step, writer.restore()) == ("new", 0, None)
    left = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert left == {"notes.txt", "metrics/other.parquet", "run.json"}


def test_two_checkpoints_are_kept(tmp_path):
    folder = write_run(tmp_path)
    kept = sorted(path.name for path in folder.glob("ckpt-*"))
    assert kept == ["ckpt-00000010.safetensors", "ckpt-00000015.safetensors"]


def test_a_stopped_run_goes_on_without_its_old_verdict(tmp_path):
    with open_writer(tmp_path) as writer:
        continue_run(writer, until=5)
    with open_writer(tmp_path) as writer:
        writer.finish("stopped", {"name": "early"})
        writer.finish("stopped", {"name": "later"})
        assert read_run(writer.folder).written_verdict == {"name": "later"}
    with open_writer(tmp_path) as writer:
        writer.commit(10, {}, make_curve(5, 10), *make_checkpoint(10))
        assert read_run(writer.folder).written_verdict is None
        assert not (writer.folder / "verdict.json").exists()


def test_steps_do_not_go_back(tmp_path):
    with open_writer(tmp_path) as writer:
        writer.commit(5, {}, make_curve(0, 5), *make_checkpoint(5))
        with pytest.raises(ValueError, match="committed already"):
            writer.commit(5, {}, make_curve(0, 5), *make_checkpoint(5))


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    base = torch.randn(4, 4)
    tensors = {
        "view": base.t(), "shared": base[1:], "bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.tensor([float("nan"), 1.0], dtype=torch.bfloat16), "scalar": torch.tensor(3),
        "empty": torch.empty(0, 2),
    }  # fmt: skip
    state = {"best": float("inf"), "last": float("nan"), "list": [1, None, "x"]}
    with open_writer(tmp_path) as writer:
        writer.commit(5, {}, {}, tensors, state)
    with open_writer(tmp_path) as writer:
        again = writer.restore()
    assert again.step == 5
    assert str(again.state) == str(state)
    assert again.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        torch.testing.assert_close(again.tensors[name], value, rtol=0, atol=0, equal_nan=True)


# --- tables ---------------------------------------------------------------------------------

FLOAT32 = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(FLOAT32, FLOAT32, st.integers(0, 2**31 - 1)), min_size=1))
def test_metrics_come_back_bit_for_bit(rows):
    a, b, step = (np.array(column) for column in zip(*rows, strict=True))
    columns = {
        "step": step.astype(np.int32), "block": np.arange(len(rows), dtype=np.int16),
        "grad_param": a.astype(np.float32), "update_ratio": b.astype(np.float32),
    }  # fmt: skip
    data = segments.encode("metrics", columns, {"run": "x\udc80"})
    assert segments.encode("metrics", columns, {"run": "x\udc80"}) == data
    frame = segments.decode("metrics", [("part", data)]).to_pandas()
    for name, values in columns.items():
        assert frame[name].dtype == values.dtype
        np.testing.assert_array_equal(frame[name].to_numpy(), values)
    assert frame[list(set(RECORDED) - set(columns))].isna().all(axis=None)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(), st.floats(), FLOAT32), min_size=1))
def test_the_curve_keeps_losses_beyond_float32(rows):
    loss, norm, lr = (np.array(column) for column in zip(*rows, strict=True))
    columns = {"step": np.arange(len(rows)), "loss": loss, "grad_norm": norm, "lr": lr}
    frame = segments.decode("curve", [("p", segments.encode("curve", columns, {}))]).to_pandas()
    for name, values in columns.items():
        np.testing.assert_array_equal(frame[name].to_numpy(), values)


def test_a_wrong_column_is_a_mistake_of_the_caller():
    rows = make_metrics(0, 1)
    with pytest.raises(ValueError, match="no such column in metrics: grad_parm"):
        segments.encode("metrics", {**rows, "grad_parm": rows["grad_param"]}, {})
    with pytest.raises(ValueError, match="'grad_param' has shape"):
        segments.encode("metrics", {**rows, "grad_param": np.zeros(1)}, {})
    with pytest.raises(ValueError, match="'block' is missing"):
        segments.encode("metrics", {"step": rows["step"]}, {})


def test_a_reader_never_fails_while_a_run_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "system", Faulty())
    folder = write_run(tmp_path, until=1, every=1)
    seen, stop, errors = [1], threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                seen.append(steps_seen(folder))
                assert len(read_run(folder).metrics()) >= 3 * seen[-1]
            except Exception as error:
                errors.append(error)

    with open_writer(tmp_path, force=False) as writer:
        read_run(folder).metrics()  # the first table imports pandas: not in the middle of the race
        reader = threading.Thread(target=read)
        reader.start()
        for step in range(2, 600):
            if step >= 60 and len(set(seen)) > 5:  # a slow machine's reader gets its turns too
                break
            rows = make_metrics(step - 1, step), make_curve(step - 1, step)
            writer.commit(step, *rows, *make_checkpoint(step))
            writer.finish("stopped", {"step": step})
            writer.finish("stopped", {"again": step})
        stop.set()
        reader.join()
    assert not errors
    assert seen == sorted(seen)
    assert len(set(seen)) > 5


def test_a_commit_costs_the_same_however_long_the_run_is(tmp_path, monkeypatch):
    costs = []
    with open_writer(tmp_path) as writer:
        for step in range(25, 200, 25):
            rows = make_metrics(step - 25, step, blocks=54), make_curve(step - 25, step)
            system = Faulty()
            monkeypatch.setattr(files, "system", system)
            writer.commit(step, *rows, *make_checkpoint(step))
            names = [name for name, _ in system.done]
            written = sum(len(args[1]) for name, args in system.done if name == "write")
            costs.append((names.count("fsync"), names.count("rename"), written))
    first, *others = costs[1:]  # the first commit has no other before it
    assert first[:2] == (12, 6)  # two tables, checkpoint, state, two commits: file and folder
    for fsyncs, renames, written in others:
        assert (fsyncs, renames) == first[:2]
        assert written < 1.1 * first[2]


class Broken(Faulty):
    """From the n-th operation on every one of them fails."""

    def __getattribute__(self, name):
        operate = super().__getattribute__(name)
        if name not in OPERATIONS:
            return operate

        def attempt(*args):
            if len(self.done) + 1 >= self.at:
                self.done.append((name, args))
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(args[0]))
            return operate(*args)

        return attempt


@pytest.mark.parametrize("fault", ["broken disk", "interrupt"])
def test_the_next_commit_clears_what_failed_operations_left(tmp_path, monkeypatch, fault):
    """No temporary file can be removed from a disk on which everything fails."""
    operations = count_operations(tmp_path / "whole", monkeypatch)
    expected = contents(tmp_path / "whole" / make_config().name)
    left = 0

    def interrupt(_name, _args):
        raise KeyboardInterrupt

    for point in range(1, len(operations) + 1):
        root = tmp_path / str(point)
        monkeypatch.setattr(files, "system", Faulty())
        with open_writer(root) as writer:
            broken = Broken(point) if fault == "broken disk" else Faulty(point, interrupt)
            monkeypatch.setattr(files, "system", broken)
            with contextlib.suppress(StorageError, KeyboardInterrupt):
                continue_run(writer)
            left += len(litter(root))
            monkeypatch.setattr(files, "system", Faulty())
            if writer.status == "done":
                writer.finish("done", {"name": "fine"})
            continue_run(writer)
            assert not litter(root), operations[point - 1]
        assert contents(writer.folder) == expected, operations[point - 1]
    assert (left > 0) == (fault == "broken disk")
