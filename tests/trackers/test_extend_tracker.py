"""A tracker that is added from outside the package, as the page on it says."""

import json
from pathlib import Path

import pytest
from pages import DOCS
from tracker_conformance import TrackerConformance, assert_run_was_told, record_run

from resdiag.cli.main import app
from resdiag.runs.folder import read_run
from resdiag.trackers.tracker import TRACKERS, register_tracker

_BLOCKS = (DOCS / "howto" / "extend-tracker.md").read_text().split("```python\n")[1:]
_PAGE = {"__name__": "jsonfile", "TrackerConformance": TrackerConformance}
for _block in _BLOCKS:
    exec(_block.split("```")[0], _PAGE)

KIND = _PAGE["KIND"]
TestJsonFile = _PAGE["TestJsonFile"]


def test_the_command_line_takes_it(tmp_path, capsys):
    run = ["run", "--variant", "elu", "--depth", "8", "--width", "0.25", "--data", "digits"]
    run += ["--steps", "6", "--runs", str(tmp_path / "runs"), "--json"]
    with TRACKERS.added(KIND):
        assert app.run([*run, "--tracker", f"jsonfile:{tmp_path}/live.jsonl"]) == 0
        document = json.loads(capsys.readouterr().out)
        export = ["export", document["run"], "--to", "jsonfile", f"{tmp_path}/exported.jsonl"]
        assert app.run(export) == 0
        assert capsys.readouterr().out.split() == [f"{tmp_path}/exported.jsonl"]
    assert document["notes"] == []
    for name in ("live", "exported"):
        found = TestJsonFile().read(str(tmp_path / f"{name}.jsonl"), "")
        assert_run_was_told(found, read_run(Path(document["run"])))
    assert app.run([*run, "--tracker", f"jsonfile:{tmp_path}/x"]) == 2
    assert "unknown tracker 'jsonfile'" in capsys.readouterr().out


def test_a_name_is_taken_once():
    with TRACKERS.added(KIND), pytest.raises(ValueError, match="tracker 'jsonfile' exists already"):
        register_tracker(KIND)


def test_its_export_appends_no_second_run(tmp_path):
    run = record_run(tmp_path)
    with TRACKERS.added(KIND):
        for _ in range(2):
            assert app.run(["export", str(run.path), "--to", "jsonfile", f"{tmp_path}/e"]) == 0
    assert_run_was_told(TestJsonFile().read(str(tmp_path / "e"), ""), run)
    assert len((tmp_path / "e").read_text().splitlines()) == run.steps
