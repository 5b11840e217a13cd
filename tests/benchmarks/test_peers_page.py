"""The page about other tools claims nothing without a test; the benchmark behind it reads right."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from pages import tables

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "explanation" / "other-tools.md"
_TEST = re.compile(r"`tests/([\w/]+\.py)::(test_\w+)`")


def _module(name):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


tools, trial, peers = _module("peer_tools"), _module("peer_trial"), _module("peers")


def _features(page):
    """(feature, our cell) of the table of features."""
    table = page.partition("| feature | resdiag |")[2].partition("\n\n")[0]
    rows = [line.split(" | ") for line in table.splitlines()[2:]]  # after the head and its rule
    return [(row[0].removeprefix("| "), row[1]) for row in rows]


def unfounded(page):
    """Features whose cell of ours neither says no nor names a test that exists."""
    bad = []
    for feature, cell in _features(page):
        named = _TEST.findall(cell)
        there = all(
            (ROOT / "tests" / file).exists()
            and re.search(rf"^ *def {name}\(", (ROOT / "tests" / file).read_text("utf-8"), re.M)
            for file, name in named
        )
        if not there or not (named or re.match(r"no\b", cell)):
            bad.append(feature)
    return bad


def test_no_cell_of_ours_claims_without_a_test_that_exists():
    page = PAGE.read_text("utf-8")
    assert len(_features(page)) > 30
    assert unfounded(page) == []


@pytest.mark.parametrize(
    "cell",
    ["yes", "", "yes: `tests/project/test_docs.py::test_gone`", "yes: `tests/gone.py::test_a`"],
)
def test_a_claim_without_a_test_would_be_seen(cell):
    page = f"| feature | resdiag | other |\n|---|---|---|\n| flies | {cell} | N |\n\nmore"
    assert unfounded(page) == ["flies"]
    assert unfounded(page.replace(f"| {cell} |", "| no |")) == []


def test_every_tool_was_asked_and_has_a_row():
    results = json.loads((ROOT / "benchmarks" / "results" / "peers.json").read_text("utf-8"))
    assert {row["name"] for row in results["tools"]} | {"nothing"} == set(tools.TOOLS)
    text = json.dumps(results)
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)
    page = PAGE.read_text("utf-8")
    for row in results["tools"]:
        assert row["name"] == "nothing" or f"| {row['label']}" in page


def _row(**answers):
    known = {"name": "a", "label": "a", "package": "a", "speaks": True}
    told = {"date": "", "machine": "", "python": "", "torch": ""}
    text = tables.peers_table({**told, "tools": [{**known, "torch": "", **answers}]})
    return tuple(text.splitlines()[-1].removeprefix("| ").removesuffix(" |").split(" | "))


def test_a_row_says_what_was_measured_and_nothing_else():
    found = {"points_to": "layer2.1", "names": True, "said": []}
    row = _row(
        version="1.2",
        runs=True,
        values={"compared": 9, "wrong": 2},
        changes=["buffers"],
        large=found,
        overflow={"points_to": "layer1.0", "names": False, "said": []},
        depth={"says": True, "healthy_findings": 3},
        alarms={"count": 0, "said": []},
        time={"ratio": [1.01, 1.02, 1.04], "null": [1, 1, 1]},
    )
    assert row == (
        "a 1.2",
        "yes",
        "2 of 9",
        "buffers",
        "words and numbers",
        "points to layer1.0",
        "words; 3 words on the healthy one",
        "0",
        "1.02 [1.01 1.04]",
    )
    assert _row(missing="No module named 'a'")[1] == "not installed"
    assert _row(failed="time: no answer in 240 s")[1] == "time: no answer in 240 s"
    crashed = _row(runs={"error": "RuntimeError: view"}, runs_without_inplace=True)
    assert crashed[1] == "only without in-place operations"
    assert set(crashed[2:]) == {"-"}
    assert _row(runs=True, failed="time: no answer in 9 s")[-1] == "no answer in 9 s"
    unread = {"points_to": None, "names": None}
    assert _row(runs=True, large=unread)[4] == "-"
    assert _row(runs=True, large={**unread, "names": False})[4] == "no words"
    assert _row(runs=True, large={"points_to": "", "names": False})[4] == "no"
    assert _row(runs=True, overflow={"error": "LinAlgError: eigh"})[5] == "stops with an error"


def test_the_first_block_that_moved_is_found_in_the_order_of_the_network():
    healthy = {
        ("activation rms", "layer1.0.bn2"): 1.0,
        ("activation rms", "layer2.1"): 1.0,
        ("activation rms", "layer3.0.conv1"): 1.0,
        ("activation mean", "layer1.0"): 1e-9,
        ("gradient norm", "layer1.0"): 1.0,
    }
    sick = dict.fromkeys(healthy, 1.0)
    assert trial.first_moved(healthy, sick) == ""
    sick["activation mean", "layer1.0"] = 1.0  # a mean may be anything
    sick["gradient norm", "layer1.0"] = float("nan")  # gradients are NaN wherever it broke
    sick["activation rms", "layer3.0.conv1"] = 1e3
    assert trial.first_moved(healthy, sick) == "layer3.0"
    sick["activation rms", "layer2.1"] = 1e3
    assert trial.first_moved(healthy, sick) == "layer2.1"
    del sick["activation rms", "layer2.1"]  # it was there before
    assert trial.first_moved(healthy, sick) == "layer2.1"
    parameters = {("parameter gradient norm", "layer2.1.bn2.weight"): 1.0}
    broken = {("parameter gradient norm", "layer2.1.bn2.weight"): float("inf")}
    assert trial.first_moved(parameters, broken) == "layer2.1"
    assert trial.first_moved({}, {}) is None


def test_a_list_of_all_layers_names_no_block():
    assert trial.names(["layer2.1 is odd"], ["layer2.1 is odd", "layer2.1.bn2 is large"])
    assert not trial.names([], ["conv1 is large", "layer2.1 is large"])
    assert not trial.names(["layer2.1 is odd"], ["layer2.1 is odd"])
    assert not trial.names([], ["layer2.10 is large"])


def test_a_changed_training_is_seen():
    class Touching(tools.Tool):
        """Changes a gradient a little and draws a random number."""

        def after(self, step, loss):
            torch.rand(1)

        def gradients(self, step, model):
            model.fc.bias.grad[0] *= 1.001

    assert trial.find_changes(Touching, trial.stock) == [
        "weights",
        "buffers",  # other weights, other activations
        "random state",
    ]
    assert trial.find_changes(tools.Naive, trial.stock) == []


def test_a_wrong_number_is_seen():
    class Off(tools.Naive):
        """Scales a number."""

        def values(self):
            seen = super().values()
            seen["activation std", "layer1.0"] *= 1.1
            return seen

    torch.set_num_threads(1)
    answer = trial.compare_values(Off, trial.stock)
    assert answer["compared"] == 78
    assert answer["wrong"] == 1
    assert answer["worst"]["what"] == ["activation std", "layer1.0"]


def test_answers_are_read_merged_and_kept(tmp_path):
    assert peers.understand('noise\n{"runs": true}\n', 0, "checks") == {"runs": True}
    assert "status -9" in peers.understand("noise", -9, "time")["failed"]
    old = {"runs": True, "version": "1", "torch": "2"}
    assert peers.merge(old, {"time": 1, "version": "1", "torch": "2"}) == {**old, "time": 1}
    assert peers.merge(old, {"time": 1, "version": "3"}) == {"time": 1, "version": "3"}
    assert peers.merge(old, {"missing": "a"}) == {"missing": "a"}
    peers.write(tmp_path / "new" / "peers.json", {"naive": {"runs": True}})
    assert peers.read(tmp_path / "new" / "peers.json")["naive"]["runs"] is True
    assert peers.read(tmp_path / "none.json") == {}


def test_paths_of_the_machine_do_not_get_into_the_results():
    assert (
        trial.shortened("in '/opt/some/where/file.py': bad\n  thing") == "in 'file.py': bad thing"
    )


def test_an_unknown_tool_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        peers.parse(["--tools", "wandbb"])
    assert "unknown tool 'wandbb'; known: nothing, resdiag" in capsys.readouterr().err
