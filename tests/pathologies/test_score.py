"""The score by hand: intervals against their definition, rates, the confusion matrix, misses."""

import json
import math
from dataclasses import replace

import pytest
from scipy.stats import binomtest

from resdiag.diagnose.registry import FINDINGS
from resdiag.pathologies.grammar import Case
from resdiag.pathologies.result import CRASHED, Result
from resdiag.pathologies.score import Score, explain_miss, order, wilson

CASE = Case(set="quick", drawn=0, architecture="residual-mlp", optimizer="sgd", seed=1)


def result(wanted, verdict, *, blocks=(), block=None, onset=0, step=None, **more):
    kind, recipe = ("", "Adam") if wanted == "healthy" else ("branch zeroed", "")
    case = replace(CASE, kind=kind, recipe=recipe, onset=onset)
    named = verdict in FINDINGS
    return Result(
        case=case,
        family="f",
        wanted=wanted,
        verdict=verdict,
        blocks=blocks,
        block=block,
        step=step,
        findings=((verdict, "", block, step),) if named else (),
        **more,
    )


@pytest.mark.parametrize(
    ("successes", "trials"), [(0, 1), (1, 1), (0, 50), (50, 50), (7, 20), (193, 200), (1, 1000)]
)
def test_wilsons_interval_is_scipys(successes, trials):
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "trials"), [(3, 17), (120, 130), (1, 2)])
def test_the_bounds_solve_the_equation_that_defines_them(successes, trials):
    """(p - k/n)^2 = z^2 p (1 - p) / n at both bounds."""
    z = 1.7
    for p in wilson(successes, trials, z):
        assert (p - successes / trials) ** 2 == pytest.approx(z * z * p * (1 - p) / trials)


def test_nothing_is_known_without_trials():
    assert wilson(0, 0) == (0.0, 1.0)
    assert math.isnan(Score([]).recall.value)
    assert math.isnan(Score([]).date_error)
    assert str(Score([]).recall) == "-"


RESULTS = [
    result("dead_block", "dead_block", blocks=(1,), block=1, onset=20, step=22),
    result("dead_block", "dead_block", blocks=(1,), block=2, onset=20, step=20),
    result("dead_block", "exploded", blocks=(1,), block=1, step=3),
    result("loss_fault", "loss_fault", cause="wrong sign of the loss", wanted_cause="wrong sign"),
    result("loss_fault", "loss_fault", cause="softmax twice", wanted_cause="wrong sign"),
    result("lr_too_high", "healthy", harm=False),
    result("lr_too_high", "lr_too_high", harm=True, onset=20, step=26),
    result("missing_norm", "stalled", also=("stalled",)),
    result("stalled", CRASHED, error="ValueError: no"),
    result("healthy", "healthy"),
    result("healthy", "undetermined"),
    result("healthy", "exploded", step=4),
]


def test_every_rate_by_hand():
    score = Score(RESULTS)
    assert (score.recall.count, score.recall.of) == (5, 8)
    assert (score.precision.count, score.precision.of) == (5, 8)
    assert (score.block_named.count, score.block_named.of) == (1, 2)
    # errors of the date: 2, 0, 0 (covers the run), 6, 0
    assert (score.date_near.count, score.date_near.of) == (4, 5)
    assert score.date_error == 0
    assert (score.false_alarms.count, score.false_alarms.of) == (1, 3)
    assert (score.called_healthy.count, score.called_healthy.of) == (1, 3)
    assert (score.any_finding.count, score.any_finding.of) == (1, 3)
    assert (score.harmless.count, score.harmless.of) == (1, 2)
    assert (score.crashed.count, score.crashed.of) == (1, 12)


def test_the_document_has_every_rate_with_its_interval():
    document = Score(RESULTS).to_dict()
    assert document["cases"] == 12
    assert document["recall"]["value"] == pytest.approx(5 / 8)
    assert document["recall"]["interval"] == pytest.approx(list(wilson(5, 8)))
    assert Score([]).to_dict()["recall"]["value"] is None


def test_the_confusion_matrix_by_hand():
    matrix = Score(RESULTS).confusion()
    assert {name: dict(row) for name, row in matrix.items()} == {
        "healthy": {"healthy": 1, "undetermined": 1, "exploded": 1},
        "loss_fault": {"loss_fault": 2},
        "missing_norm": {"stalled": 1},
        "dead_block": {"dead_block": 2, "exploded": 1},
        "lr_too_high": {"lr_too_high": 1},
        "stalled": {CRASHED: 1},
    }
    assert list(matrix) == sorted(matrix, key=order)
    assert next(iter(matrix)) == "healthy"


def test_scores_of_parts_add_up():
    whole = Score(RESULTS)
    parts = whole.by(lambda r: r.wanted).values()
    for name in ("recall", "false_alarms", "block_named", "date_near"):
        rates = [getattr(part, name) for part in parts]
        assert sum(r.count for r in rates) == getattr(whole, name).count
        assert sum(r.of for r in rates) == getattr(whole, name).of


def test_every_miss_has_its_reason():
    reasons = [explain_miss(miss) for miss in Score(RESULTS).misses()]
    assert reasons == [
        "named block 2",
        "named exploded",
        "cause is 'softmax twice'",
        "crashed: ValueError: no",
        "named exploded",
    ]
    unknown = result("no_such_rule", "healthy")
    assert explain_miss(unknown).startswith("there is no such rule")
    behind = replace(
        result("stalled", "exploded"),
        findings=(("exploded", "", None, 1), ("stalled", "", None, 1)),
    )
    assert explain_miss(behind) == "ranked behind exploded"
    condition = replace(behind, verdict="healthy", cause="")
    assert explain_miss(condition).startswith("reported as a condition")
    assert explain_miss(result("stalled", "healthy")).startswith("no finding")
    doubtful = result("stalled", "undetermined", doubts=("the loss is not known",))
    assert explain_miss(doubtful) == "no finding; the loss is not known"


@pytest.mark.parametrize("of", RESULTS, ids=lambda r: f"{r.wanted}-{r.verdict}")
def test_a_result_comes_back_from_json(of):
    assert Result.from_dict(json.loads(json.dumps(of.to_dict(), allow_nan=False))) == of
