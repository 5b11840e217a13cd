"""Running cases: files that grow and go on, processes, errors; real verdicts on cheap networks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision

from resdiag.diagnose.verdict import judge
from resdiag.errors import UsageError
from resdiag.pathologies import result as results
from resdiag.pathologies.architectures import SETS
from resdiag.pathologies.grammar import Case, draw
from resdiag.pathologies.result import CRASHED, Result, prepare, try_case
from resdiag.pathologies.suite import read_results, run_cases
from resdiag.pathologies.train import train_unwatched
from resdiag.runs.watched import as_run
from resdiag.watch.loop.attach import attach

CASE = Case(
    set="quick", drawn=0, kind="optimizer never steps", architecture="plain-mlp",
    optimizer="sgd", seed=1,
)  # fmt: skip
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "pathologies.jsonl"
CASES = [CASE, replace(CASE, seed=2), replace(CASE, kind="", recipe="SGD", seed=3)]


@pytest.fixture
def untrained(monkeypatch):
    """Results without trainings; the names of the cases that were tried."""
    tried = []

    def stub(case):
        tried.append(case.name)
        return Result(case=case, family="f", wanted="stalled", verdict="stalled")

    monkeypatch.setattr("resdiag.pathologies.suite.try_case", stub)
    return tried


def test_a_file_of_results_goes_on_where_it_stopped(tmp_path, untrained):
    path = tmp_path / "results.jsonl"
    first = run_cases(CASES[:2], to=path)
    assert len(untrained) == 2
    told = []
    both = run_cases(CASES, to=path, tell=told.append)
    assert untrained[2:] == [CASES[2].name]
    assert both[:2] == first
    assert told == both == read_results(path)


def test_a_line_that_was_cut_off_is_run_again(tmp_path, untrained):
    path = tmp_path / "results.jsonl"
    run_cases(CASES[:2], to=path)
    path.write_bytes(path.read_bytes()[:-20])
    assert len(read_results(path)) == 1
    run_cases(CASES[:2], to=path)
    assert untrained[2:] == [CASES[1].name]
    assert [r.case for r in read_results(path)] == CASES[:2]


@pytest.mark.parametrize("line", ["[1]", "{}", "no json", '{"case": 1}'])
def test_another_file_is_refused_and_left_alone(tmp_path, untrained, line):
    path = tmp_path / "other.txt"
    path.write_text(line + "\n")
    with pytest.raises(UsageError, match="line 1: not a result"):
        run_cases(CASES, to=path)
    assert path.read_text() == line + "\n"


def test_a_crash_is_a_result_with_its_error(monkeypatch):
    def fail(trial):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(results, "train", fail)
    crashed = try_case(CASE)
    assert crashed.verdict == CRASHED
    assert "ZeroDivisionError: on purpose" in crashed.error
    assert not crashed.is_right
    assert not try_case(CASES[2]).is_right


def test_processes_give_the_same_results_as_one():
    assert run_cases(CASES[:2], jobs=2) == [try_case(case) for case in CASES[:2]]


def test_the_committed_results_are_of_cases_that_are_drawn():
    results = read_results(RESULTS)
    drawn = {(r.case.set, r.case.drawn) for r in results}
    assert {r.case for r in results} <= {case for one in drawn for case in draw(*one)}
    assert RESULTS.stat().st_size < 1_000_000


MISSED = {"weight decay", "random labels"}
"""Faults of the quick set that are not named: the decay of a network without a norm looks like too
high a rate, and a loss that came from above needs more than 60 steps to be called stalled."""


QUICK = [case for case in draw("quick", 0) if case.kind not in MISSED]


@pytest.mark.parametrize("case", QUICK, ids=lambda c: f"{c.kind or c.recipe}-{c.architecture}")
def test_what_the_quick_set_got_right_stays_right(case):
    """The finding and its block; no fault is named in a healthy training."""
    found = try_case(case)
    assert found.is_right or found.harm is False, found
    assert not found.blocks or found.names_the_block
    line = json.dumps(found.to_dict(), allow_nan=False)
    assert Result.from_dict(json.loads(line)) == found


LEARNING = [
    (row.name, optimizer)
    for rows in SETS.values()
    for row in rows
    for optimizer in (["sgd", "adam"] if row.sgd else ["adam"])
]
"""Every architecture with the optimizers that it is trained by."""


@pytest.mark.parametrize("kind", sorted(MISSED))
def test_what_is_missed_is_missed_still(kind):
    """A miss that has become a hit goes to the others."""
    (case,) = (case for case in draw("quick", 0) if case.kind == kind)
    assert not try_case(case).is_right


@pytest.mark.slow
@pytest.mark.parametrize(("name", "optimizer"), LEARNING)
def test_every_architecture_learns_at_its_rate(name, optimizer):
    """The last fifth of the losses lies 2 % below the first, at least."""
    case = replace(CASE, kind="", recipe="Adam", architecture=name, optimizer=optimizer)
    losses = train_unwatched(prepare(case))
    assert sum(losses[-12:]) < 0.98 * sum(losses[:12])


@pytest.mark.slow
@pytest.mark.parametrize(("lr", "name"), [(1e-3, "healthy"), (10.0, "lr_too_high")])
def test_a_resnet_50_is_judged_by_its_learning_rate(lr, name):
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
    with attach(model, optimizer=optimizer) as monitor:
        for _ in range(24):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    assert judge(as_run(monitor)).name == name
