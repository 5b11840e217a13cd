"""`resdiag bench pathologies`: what it prints, and what it refuses."""

import json

import pytest

from resdiag.pathologies.result import Result


@pytest.fixture
def untrained(monkeypatch):
    """Every second case is judged right, without a training."""
    count = iter(range(10**6))

    def stub(case):
        wanted = "dead_block" if case.kind else "healthy"
        verdict = wanted if next(count) % 2 else "exploded"
        return Result(case=case, family="f", wanted=wanted, verdict=verdict, step=0)

    monkeypatch.setattr("resdiag.pathologies.suite.try_case", stub)


def test_json_has_the_scores_and_every_case(call, untrained):
    code, out, _ = call("bench", "pathologies", "--limit", 10, "--seed", 3, "--json")
    document = json.loads(out)
    assert code == 0
    assert (document["set"], document["seed"]) == ("quick", 3)
    assert len(document["cases"]) == document["scores"]["cases"] == 10
    low, high = document["scores"]["recall"]["interval"]
    assert low < document["scores"]["recall"]["value"] < high
    assert sum(sum(row.values()) for row in document["confusion"].values()) == 10
    assert all(Result.from_dict(case) for case in document["cases"])


def test_the_table_has_the_rates_and_the_misses(call, untrained):
    code, out, err = call("bench", "pathologies", "--limit", 10)
    assert code == 0
    for word in ("precision", "recall", "median error of the date", "dead_block"):
        assert word in out
    assert out.count("wanted dead_block, named exploded") == 5
    assert "quick set, seed 0" in err


def test_results_are_kept_and_taken_up_again(call, untrained, tmp_path):
    path = tmp_path / "results.jsonl"
    first = call("bench", "pathologies", "--limit", 4, "--to", path, "--json")
    lines = path.read_text().splitlines()
    assert len(lines) == 4
    again = call("bench", "pathologies", "--limit", 4, "--to", path, "--json")
    assert json.loads(first[1]) == json.loads(again[1])
    assert path.read_text().splitlines() == lines


def test_mistakes_are_one_line(call, tmp_path):
    code, _, err = call("bench", "pathologies", "--set", "lokced")
    assert (code, err.count("\n")) == (2, 1)
    assert "unknown set 'lokced'; did you mean 'locked'? known: development, locked, quick" in err
    code, _, err = call("bench", "pathologies", "--to", tmp_path / "no" / "file", "--limit", 1)
    assert (code, err.count("\n")) == (2, 1)
    assert "no such folder" in err
    code, out, _ = call("bench")
    assert code == 2
    assert "pathologies" in out
