"""The suite of planted faults: its score by hand, a few real cases, the committed results."""

import json
import math
from pathlib import Path

import planted_faults
import pytest
import torch
import torchvision
from planted.calibration import (
    SETS,
    Result,
    cases,
    count_blocks_named,
    count_false_alarms,
    score,
)
from planted.networks import DEVELOPMENT, HEALTHY, HELD_OUT

from resdiag.diagnose.verdict import judge
from resdiag.runs.watched import as_run
from resdiag.watch.loop.attach import attach

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "pathologies.json"


def result(wanted, verdict, block=None, named=None):
    fault = "" if wanted == "healthy" else "planted"
    findings = () if verdict == "healthy" else (verdict,)
    return Result("name", "quick", fault, wanted, block, verdict, named, findings, "")


def test_precision_and_recall_by_hand():
    results = [
        result("a", "a", 1, 1),
        result("a", "a", 1, 2),
        result("a", "b", 1, 1),
        result("b", "b"),
        result("healthy", "healthy"),
        result("healthy", "a"),
        result("b", "healthy"),
    ]
    rows = {row.finding: row for row in score(results)}
    assert (rows["a"].precision, rows["a"].recall) == pytest.approx((2 / 3, 2 / 3))
    assert (rows["b"].precision, rows["b"].recall) == pytest.approx((1 / 2, 1 / 2))
    assert (rows["healthy"].precision, rows["healthy"].recall) == (0.5, 0.5)
    assert (rows["all findings"].planted, rows["all findings"].given) == (5, 5)
    assert rows["all findings"].precision == pytest.approx(3 / 5)
    assert count_blocks_named(results) == (1, 3)
    assert count_false_alarms(results) == (1, 2)
    assert math.isnan(score([result("healthy", "healthy")])[-1].precision)


def test_the_sets_share_no_network_and_are_large_enough():
    names = [network.name for network in (*DEVELOPMENT, *HELD_OUT, *HEALTHY)]
    assert len(set(names)) == len(names)
    development, held = cases("development"), cases("held-out")
    assert {c.seed for c in development}.isdisjoint(c.seed for c in held)
    for of in (development, held):
        assert len({c.fault.name for c in of if c.fault}) >= 20
        assert len({c.name for c in of}) == len(of)
    assert sum(c.fault is None for c in held) >= 20


def test_the_quick_set_is_judged_right(capsys, tmp_path):
    """Real trainings of the cheapest networks: every verdict and block, no word on the healthy."""
    to = tmp_path / "cases.json"
    planted_faults.main(["--json", "--to", str(to)])
    said = json.loads(capsys.readouterr().out)
    written = [Result.from_dict(case) for case in json.loads(to.read_text())["cases"]]
    assert written == [Result.from_dict(case) for case in said["cases"]]
    wrong = [(r.name, r.verdict) for r in written if r.verdict != r.wanted]
    # a known miss, on the page too: the loss is still on its way down to that of guessing
    assert wrong == [("random labels | residual-mlp | 0", "undetermined")]
    counts = said["scores"]["quick"]
    assert counts["healthy"]["alarms"] == 0
    assert counts["healthy"]["trainings"] >= 3
    assert counts["blocks"]["named"] == counts["blocks"]["planted"] >= 8


def test_an_unknown_set_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        planted_faults.main(["--set", "held_out"])
    assert "held-out" in capsys.readouterr().err


def test_the_committed_results_are_of_these_cases():
    document = json.loads(RESULTS.read_text("utf-8"))
    for name in SETS:
        done = [case["name"] for case in document["cases"] if case["set"] == name]
        known = [case.name for case in cases(name)]
        assert len(set(done)) == len(done)
        assert set(done) <= set(known)
        assert len(done) >= 0.98 * len(known), name


@pytest.mark.slow
@pytest.mark.parametrize(("lr", "name"), [(1e-3, "healthy"), (10.0, "lr_too_high")])
def test_a_resnet_50_is_judged_by_its_learning_rate(lr, name):
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
    with attach(model, optimizer=optimizer) as monitor:
        for _ in range(12):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    assert judge(as_run(monitor)).name == name
