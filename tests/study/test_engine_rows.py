"""Engines are rows: those that come with resdiag, and one that is added from outside."""

import os
import subprocess
import sys

import pytest
from engine_conformance import EngineConformance
from pages import DOCS
from study_runs import HERE
from studyfiles import TINY, write_study

from resdiag.cli.main import app
from resdiag.study.engines.engine import ENGINES, Engine, Option, register_engine
from resdiag.study.ledger import read_ledger
from resdiag.study.study import load_study


class TestLocal(EngineConformance):
    engine = ENGINES["local"]


class TestLocalThreads(EngineConformance):
    engine = ENGINES["local"]
    options = {"cells_per_device": 3}  # noqa: RUF012


@pytest.mark.slow
class TestRay(EngineConformance):
    engine = ENGINES["ray"]

    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("ray")


def test_the_page_adds_an_engine_from_outside_the_package(tmp_path):
    code = (DOCS / "howto" / "extend-engine.md").read_text().split("```python\n")[1]
    (tmp_path / "pool.py").write_text(code.split("```")[0])
    text = TINY.replace("seeds = [0, 1]", "seeds = [0]")
    path, runs = write_study(tmp_path, text), tmp_path / "runs"
    words = ["study", "run", str(path), "--runs", str(runs), "--engine", "pool", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(tmp_path / "pool.py"), *words, "--device", "cpu", "-q"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    states = [entry.state for entry in read_ledger(load_study(str(path)), runs)]
    assert states == ["done", "done"]


def test_the_command_line_follows_the_rows(tmp_path, capsys):
    told = []

    def run(job, **options):
        told.append((job.slots, len(job.cells), options))
        return 0

    words = ["study", "run", str(write_study(tmp_path)), "--runs", str(tmp_path / "runs"), "-q"]
    row = Engine(
        name="told",
        run=run,
        options=(
            Option(name="queue", default="", help="its queue."),
            Option(name="hours", flag="--most-hours", default=2, max=9, help="its hours."),
        ),
    )
    with ENGINES.added(row):
        assert app.run([*words, "--engine", "told", "--slots", "3", "--queue", "q"]) == 0
        assert told == [(3, 4, {"queue": "q", "hours": 2})]
        assert app.run([*words, "--engine", "told", "--most-hours", "10"]) == 2
        assert app.run([*words, "--queue", "q"]) == 2
        assert "--queue is for the told engine, not local" in capsys.readouterr().err
        assert app.run(["study", "run", "--help"]) == 0
        assert "told: its queue." in " ".join(capsys.readouterr().out.split())
    assert app.run([*words, "--engine", "told"]) == 2
    assert "unknown engine 'told'" in capsys.readouterr().err


def test_an_option_may_be_called_like_one_of_the_command_and_must_be_an_argument_s_name(capsys):
    def row(name):
        options = (Option(name=name, flag="--its-own", default="", help="x"),)
        return Engine(name="mine", run=lambda job, **options: 0, options=options)

    with ENGINES.added(row("device")):
        assert app.run(["study", "run", "--help"]) == 0
        assert "--its-own" in capsys.readouterr().out
    for name in ("class", "two words", "1st"):
        with pytest.raises(ValueError, match="cannot name an argument"):
            register_engine(row(name))
