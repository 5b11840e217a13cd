"""The command line: every mistake is one line and an exit code, results are on stdout alone."""

import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
from fresh_imports import modules_of_commands

from resdiag.catalog.table import METRICS
from resdiag.cli.main import app
from resdiag.models.variants import VARIANTS
from resdiag.runs import files

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "run", "--variant", "elu", "--depth", "8", "--width", "0.25", "--data", "digits",
    "--batch-size", "32",
]  # fmt: skip
HEAVY = ("torch", "seaborn", "matplotlib", "pandas", "pyarrow", "torchvision", "scipy")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Every command runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("RESDIAG_RUNS", "RESDIAG_DATA", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def refused(call):
    """Check that a command line is refused: one line, an exit code, and the same as JSON."""

    def check(*args, code=2, json_too=True, after_progress=False):
        got, out, err = call(*args)
        assert (got, out) == (code, "")
        *progress, err = err.splitlines(keepends=True)
        assert after_progress or progress == []
        assert not any(line.startswith(("resdiag: ", "Traceback")) for line in progress)
        assert re.fullmatch("resdiag: .+\n", err)
        if json_too:
            got, out, said = call(*args, "--json")
            assert got == code
            document = json.loads(out)
            assert set(document) == {"error", "hint"}
            assert " ".join(document["error"].splitlines()) in err
            assert document["hint"] in err
            assert "resdiag: " not in said
        return err

    return check


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small finished run, made once; read it, do not write to it."""
    root = tmp_path_factory.mktemp("runs")
    assert app.run([*TINY, "--steps", "3", "--quiet", "--runs", str(root)]) == 0
    return next(root.iterdir())


def strict(text):
    """One JSON document without the NaN and Infinity that JSON does not have."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def spawn(*args, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *map(str, args)],
        env=environment, capture_output=True, text=True, timeout=280, **options,
    )  # fmt: skip


# -- mistakes in what is asked for --------------------------------------------------------------

MISTAKES = [
    (["run", "--variant", "elu", "--depth", "57"], "depth 57 is not 6n+2; nearest: 56, 62"),
    (["run", "--variant", "elu_prr", "--depth", "56"], "did you mean 'elu_pre'"),
    (["run", "--depth", "56"], "Missing option '--variant'"),
    (["run", "--variant", "elu"], "Missing option '--depth'"),
    (["run", "--variant", "elu", "--depth", "many"], "--depth"),
    ([*TINY, "--nonsense"], "No such option: --nonsense"),
    ([*TINY, "--recipe", "papr"], "did you mean 'paper'"),
    ([*TINY, "--dtype", "int8"], "unknown dtype 'int8'"),
    ([*TINY, "--device", "cuda:x"], "unknown device 'cuda:x'"),
    ([*TINY, "--device", "tpu"], "unknown device 'tpu'"),
    ([*TINY, "--device", "cpu:1"], "unknown device 'cpu:1'"),
    ([*TINY, "--threads", "0"], "--threads"),
    ([*TINY, "--threads", "999999999"], "--threads"),
    ([*TINY, "--lr", "inf"], "--lr inf"),
    ([*TINY, "--lr", "-1"], "--lr -1.0 must be at least 0"),
    ([*TINY, "--steps", "1", "--epochs", "1"], "exclude each other"),
    ([*TINY, "--seed", str(2**70)], "--seed"),
    ([*TINY, "--width", "1e12"], "--width"),
    ([*TINY, "--data", "cifar11"], "did you mean 'cifar10'"),
    ([*TINY, "--data", "folder:missing"], "no such file or folder"),
    ([*TINY, "--data", "folder:a\nb"], "no such file or folder"),
    (["plot", "gradnorm"], "did you mean 'gradnorms'"),
    (["plot", "gradnorms", "--format", "bmp"], "unknown format 'bmp'"),
    (["plot", "gradnorms"], "runs"),
    (["plot", "gradnorms", "missing"], "missing"),
    (["explain"], "runs"),
    (["explain", "missing"], "missing"),
    (["metrics", "gradd"], "unknown metric 'gradd'"),
    (["nothing"], "No such command 'nothing'"),
    (["data", "nothing"], "No such command 'nothing'"),
    (["variants", "too", "many"], "unexpected"),
]


@pytest.mark.parametrize(
    ("args", "message"), MISTAKES, ids=[" ".join(a)[-40:] for a, _ in MISTAKES]
)
def test_a_mistake_is_one_line_that_names_it(refused, args, message):
    line = refused(*args)
    assert message.replace("\n", " ") in line
    assert not list(Path.cwd().iterdir())


def test_an_unknown_download_is_refused(refused):
    assert "did you mean 'cifar10'" in refused("data", "get", "cifar1", json_too=False)


LIGHT = [("--help",), ("run", "--help"), ("version",), *(tuple(args) for args, _ in MISTAKES)]


@pytest.mark.parametrize("args", LIGHT, ids=lambda args: " ".join(args)[-40:].replace("\n", " "))
def test_help_and_mistakes_import_nothing_heavy(args):
    _, modules = modules_of_commands(*LIGHT)[args]
    assert not set(HEAVY) & set(modules)
    assert len(modules) < 500  # about 300; PyTorch alone has more than a thousand


def test_no_command_prints_help_and_fails(call):
    code, out, err = call()
    assert code == 2
    assert "Usage: resdiag" in out
    assert err == ""
    code, out, err = call("data")
    assert code == 2
    assert "Usage: resdiag data" in out


# -- data ---------------------------------------------------------------------------------------


def test_an_empty_image_folder_is_refused(refused, tmp_path):
    (tmp_path / "pictures").mkdir()
    assert "has no folder train" in refused(*TINY, "--data", "folder:pictures")
    for split in ("train", "test"):
        (tmp_path / "pictures" / split / "cat").mkdir(parents=True)
    assert "train holds no file" in refused(*TINY, "--data", "folder:pictures")


def test_a_folder_without_images_is_refused(refused, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "pictures" / split / "cat").mkdir(parents=True)
        (tmp_path / "pictures" / split / "cat" / "note.txt").write_text("no picture")
    assert "pictures" in refused(*TINY, "--data", "folder:pictures")


def test_a_closed_image_folder_is_refused(refused, tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read everything
    assert "not readable" in refused(*TINY, "--data", "folder:pictures")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_somebody_who_may_not_read_the_images_is_told_so(refused):
    with tempfile.TemporaryDirectory() as place:  # tmp_path is closed to others already
        Path(place).chmod(0o755)
        closed = Path(place, "closed")
        (closed / "train" / "cat").mkdir(parents=True)
        closed.chmod(0)
        for spec in (f"folder:{closed}", f"folder:{closed / 'train'}"):
            os.setresuid(65534, 65534, 0)
            try:
                line = refused(*TINY, "--data", spec)
            finally:
                os.setresuid(0, 0, 0)
            assert "not readable" in line or "Permission denied" in line


@pytest.mark.parametrize("cut", [1, 100, 700])
def test_a_damaged_archive_is_refused(refused, tmp_path, cut):
    (tmp_path / "picture.png").write_bytes(os.urandom(2000))
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for split in ("train", "test"):
            archive.add(tmp_path / "picture.png", f"{split}/cat/1.png")
    whole = (tmp_path / "a.tar.gz").read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(whole[:-cut])
    assert "a.tar.gz" in refused(*TINY, "--data", "folder:a.tar.gz")
    (tmp_path / "a.tar.gz").write_bytes(whole[:40] + bytes(200) + whole[240:])
    assert "a.tar.gz" in refused(*TINY, "--data", "folder:a.tar.gz")


# -- a run and what it prints -------------------------------------------------------------------


def test_a_run_prints_one_document(call):
    code, out, err = call(*TINY, "--steps", "4", "--json")
    document = strict(out)
    assert code == 0
    assert document["schema"] == 1
    assert Path(document["run"]).is_dir()
    assert (document["status"], document["steps"], document["resumed_at"]) == ("done", 4, 0)
    assert (document["data"], document["variant"], document["depth"]) == ("digits", "elu", 8)
    assert {"name", "step", "block", "summary"} <= set(document["verdict"])
    error = document["test_error"]
    assert 0 <= error["best"] == error["final"] <= 1
    assert 0 <= document["train_error"] <= 1
    assert err.startswith("data: digits")


def test_a_run_says_what_happened_and_its_progress_goes_to_stderr(call):
    code, out, err = call(*TINY, "--steps", "3")
    assert code == 0
    first, _, rest = out.partition("\n\n")
    assert re.fullmatch(
        r"runs/elu-d8-s0-\w{8}: done after 3 steps, test error [\d.]+% at the end, [\d.]+% at "
        r"best, training error [\d.]+% over the last epoch",
        first,
    )
    assert rest.strip()
    assert [line.split(":")[0].split("  ")[0] for line in err.splitlines()[:3]] == [
        "data", err.splitlines()[1], "elu d8",
    ]  # fmt: skip
    assert "\x1b" not in out + err


def test_quiet_says_nothing_on_stderr(call):
    assert call(*TINY, "--steps", "2", "--quiet")[2] == ""


def test_a_diverged_run_is_a_result_not_a_failure(call):
    args = ["run", "--variant", "a", "--depth", "8", "--width", "0.25", "--data", "digits"]
    code, out, _ = call(*args, "--lr", "1e6", "--steps", "30", "--json")
    document = strict(out)
    assert (code, document["status"]) == (0, "diverged")
    assert document["verdict"]["name"] == "lr_too_high"
    assert "exploded" in {finding["name"] for finding in document["verdict"]["findings"]}
    assert document["test_error"] == {"final": None, "best": None}
    code, out, _ = call(*args, "--lr", "1e6", "--steps", "30")
    assert code == 0
    assert "diverged after" in out
    assert "test error" not in out


def test_the_same_command_again_does_not_train_again(call, monkeypatch):
    _, first, _ = call(*TINY, "--steps", "3", "--json")
    monkeypatch.setattr("resdiag.training.loop.Training.run", None)
    code, again, err = call(*TINY, "--steps", "3", "--json")
    first, again = json.loads(first), json.loads(again)
    assert code == 0
    assert again["resumed_at"] == 3
    assert {**again, "resumed_at": 0, "notes": []} == {**first, "notes": []}
    assert "done already; --force starts over" in err


def test_force_starts_over(call):
    _, first, _ = call(*TINY, "--steps", "3", "--json")
    commit = Path(json.loads(first)["run"]) / "COMMIT.json"
    before = commit.stat().st_mtime_ns  # an inode's number may be used again
    code, again, _ = call(*TINY, "--steps", "3", "--json", "--force")
    assert code == 0
    assert json.loads(again) == json.loads(first)
    assert commit.stat().st_mtime_ns > before


def stop_after(monkeypatch, step):
    """Let SIGTERM arrive while the batch of `step` is made."""
    from resdiag.data.augment import Augmenter

    batch = Augmenter.batch

    def send(self, at):
        if at == step:
            os.kill(os.getpid(), 15)
        return batch(self, at)

    monkeypatch.setattr(Augmenter, "batch", send)


def test_a_stopped_run_exits_75_and_the_same_command_continues(call, monkeypatch):
    args = [*TINY, "--steps", "8", "--json"]
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        code, out, _ = call(*args)
    document = json.loads(out)
    assert (code, document["status"], document["steps"]) == (75, "stopped", 5)
    assert document["test_error"]["final"] is None
    code, out, err = call(*args)
    document = json.loads(out)
    assert (code, document["status"], document["resumed_at"]) == (0, "done", 5)
    assert "continues at step 5" in err


def test_a_stopped_run_says_how_to_go_on_and_is_not_called_healthy(call, monkeypatch):
    learns = [*TINY, "--steps", "60", "--lr", "0.02", "--quiet"]
    whole = json.loads(call(*learns, "--runs", "whole", "--json")[1])
    assert whole["verdict"]["name"] == "healthy"
    args = [*TINY, "--steps", "60", "--lr", "0.02", "--force"]
    with monkeypatch.context() as patch:
        stop_after(patch, 57)
        code, out, err = call(*args)
    assert code == 75
    last = err.splitlines()[-1]
    assert last == f"stopped; to go on: resdiag {' '.join(args[:-1])}"
    assert "healthy" not in out
    verdict = json.loads(next(Path("runs").glob("*/verdict.json")).read_text())
    assert verdict["name"] == "undetermined"
    assert "stopped at step 58 of 60" in verdict["why"]
    code, out, _ = call(*last.split("resdiag ")[1].split(), "--json")
    document = json.loads(out)
    assert (code, document["resumed_at"], document["status"]) == (0, 58, "done")
    for one in (document, whole):
        del one["verdict"]["next"]  # names the folder
    assert document["verdict"] == whole["verdict"]


def test_a_signal_in_the_last_step_is_no_reason_to_fail(call, monkeypatch):
    stop_after(monkeypatch, 2)
    code, out, _ = call(*TINY, "--steps", "3", "--json")
    assert (code, json.loads(out)["status"]) == (0, "done")


def test_other_threads_are_refused_unless_drift_is_allowed(call, refused, monkeypatch):
    import torch

    args = [*TINY, "--steps", "8"]
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert call(*args, "--threads", "1")[0] == 75
    try:
        line = refused(*args, "--threads", "2", after_progress=True)
        assert "threads: 1 -> 2" in line
        assert "--allow-drift" in line
        assert call(*args, "--threads", "2", "--allow-drift")[0] == 0
    finally:
        torch.set_num_threads(1)


def test_a_full_disk_is_74_and_the_old_commit_stays(call, refused, monkeypatch):
    args = [*TINY, "--steps", "9", "--commit-every", "3"]
    write, written = files.System.write, []

    def full(handle, data):
        written.append(len(data))
        if sum(written) > 150_000:
            raise OSError(28, "No space left on device")
        return write(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr(files.system, "write", full, raising=False)
        line = refused(*args, code=74, after_progress=True, json_too=False)
    assert "No space left on device" in line
    (folder,) = Path("runs").iterdir()
    commit = json.loads((folder / "COMMIT.json").read_text())
    assert commit["status"] == "running"
    assert not list(folder.rglob("*.tmp"))
    code, out, _ = call(*args, "--json")
    assert (code, json.loads(out)["status"]) == (0, "done")
    assert json.loads(out)["resumed_at"] == commit["step"] > 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_file_size_limit_is_74_too(tmp_path):
    import resource
    import signal

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = spawn(*TINY, "--steps", "3", cwd=tmp_path, preexec_fn=limit)
    assert done.returncode == 74, done.stderr
    assert done.stderr.splitlines()[-1].startswith("resdiag: cannot write runs/")
    assert "Traceback" not in done.stderr


def test_a_full_standard_output_is_74():
    with Path("/dev/full").open("w") as full:
        for args in (["version"], ["metrics"]):
            done = subprocess.run(
                [sys.executable, str(ROOT / "cli.py"), *args],
                stdout=full, stderr=subprocess.PIPE, text=True, timeout=280,
            )  # fmt: skip
            assert done.returncode == 74
            assert done.stderr.count("\n") == 1


def test_a_reader_that_leaves_early_is_no_accident():
    command = f"{sys.executable} {ROOT / 'cli.py'} metrics | head -c 10; echo"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=280)
    assert done.stderr == ""


# -- reading runs -------------------------------------------------------------------------------


def test_a_plot_is_drawn_of_the_run_named_and_of_the_latest(call, finished, tmp_path):
    code, out, err = call("plot", "gradnorms", finished, "--out", "a/b", "--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert document["schema"] == 1
    assert document["files"] == ["a/b.svg", "a/b.png"]
    assert all(Path(file).stat().st_size > 1000 for file in document["files"])
    code, out, _ = call("plot", "gradnorms", "--runs", finished.parent, "-o", tmp_path / "c.pdf")
    assert (code, out) == (0, f"{tmp_path / 'c.pdf'}\n")


def test_kinds_of_plots_are_listed(call):
    code, out, _ = call("plot", "--list", "--json")
    kinds = [row["kind"] for row in json.loads(out)]
    assert code == 0
    assert {"gradnorms", "biasshift", "skip", "signal", "growth", "curves", "updates"} < set(kinds)
    assert call("plot")[0] == 0


def test_explain_gives_the_verdict_again(call, finished):
    code, out, _ = call("explain", finished, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["schema"] == 1
    assert document["verdict"]["name"]
    assert call("explain", "--runs", finished.parent)[1].strip()


def test_explain_of_several_runs_puts_them_together_and_a_lesion_needs_one(call, refused):
    for seed in (0, 1):
        assert call(*TINY, "--steps", "1", "--quiet", "--seed", seed)[0] == 0
    code, out, _ = call("explain", "runs")
    assert (code, len(out.splitlines())) == (0, 3)
    assert "elu: undecidable" in out.splitlines()[-1]
    assert "runs holds 2 runs" in refused("explain", "runs", "--lesion")


@pytest.mark.parametrize("command", [["plot", "gradnorms"], ["explain"]])
def test_a_folder_that_is_no_run_is_refused(refused, tmp_path, command):
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(*command, "empty")
    (tmp_path / "empty" / ".hidden").mkdir()
    (tmp_path / "empty" / ".hidden" / "run.json").write_text("{}")
    assert "empty" in refused(*command, "empty")
    assert "no run" in refused(*command, "--runs", "empty")


@pytest.mark.parametrize("command", [["plot", "curves"], ["explain"]])
@pytest.mark.parametrize("name", ["run.json", "COMMIT.json", "blocks.json", "metrics/*", "curve/*"])
def test_a_damaged_run_is_refused_naming_the_file(refused, call, command, name):
    assert call(*TINY, "--steps", "2", "--commit-every", "1", "--quiet")[0] == 0
    (folder,) = Path("runs").iterdir()
    file = max(folder.glob(name))
    damages = {"half": file.read_bytes()[: file.stat().st_size // 2], "empty": b"", "gone": None}
    for content in damages.values():
        file.write_bytes(content) if content is not None else file.unlink()
        line = refused(*command, folder)
        assert name.strip("*") in line or "no run" in line


def test_one_bad_path_among_good_ones_is_refused(refused, finished, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no run at empty" in refused("plot", "gradnorms", finished, "empty")


# -- tables -------------------------------------------------------------------------------------


def test_the_table_of_variants_has_all_with_their_sources(call):
    code, out, err = call("variants")
    assert (code, err) == (0, "")
    assert set(VARIANTS) <= set(out.split())
    rows = json.loads(call("variants", "--json")[1])
    assert [row["id"] for row in rows] == list(VARIANTS)
    assert all(row["source"] for row in rows)


def test_the_table_of_metrics_has_all_with_their_formulas(call):
    rows = json.loads(call("metrics", "--json")[1])
    assert [row["name"] for row in rows] == list(METRICS)
    assert [row["formula"] for row in rows] == [metric.formula for metric in METRICS.values()]
    assert {row["kind"] for row in rows} == {"recorded", "derived"}
    _, out, _ = call("metrics", "skip_gain")
    assert "skip_gain_stage" in out
    assert "grad_param" not in out
    # brackets in a formula are not taken for markup
    bracketed = [row for row in rows if "[" in row["formula"] and len(row["formula"]) < 40]
    for row in bracketed:
        assert row["formula"] in call("metrics", row["name"])[1]


def test_the_list_of_data_says_what_is_here(call, tmp_path):
    code, out, _ = call("data", "list")
    assert code == 0
    assert "digits" in out
    rows = json.loads(call("data", "list", "--data-root", tmp_path, "--json")[1])
    assert rows[0] == {**rows[0], "data": "digits", "state": "built in"}


def test_there_is_no_colour_where_nobody_sees_it():
    forced = spawn("variants", env={"FORCE_COLOR": "1"})
    plain = spawn("variants", env={"FORCE_COLOR": "1", "NO_COLOR": "1"})
    assert "\x1b[" not in spawn("variants").stdout
    assert not re.search(r"\x1b\[[\d;]*3\d", plain.stdout)
    assert forced.returncode == plain.returncode == 0


def test_the_version_is_the_packages(call):
    import resdiag

    assert call("version")[1] == f"{resdiag.__version__}\n"


def test_the_whole_command_works_from_a_shell(tmp_path):
    done = spawn(*TINY, "--steps", "2", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "done"
