"""Every recorded metric in every mode: eager, compiled, DDP and FSDP2, against its slow twin."""

from pathlib import Path

import pytest
from metric_tester import METRICS, MODES, MetricTester

from resdiag.catalog.set_metrics import OF_BLOCKS, OF_STEPS, ON_CADENCE
from resdiag.catalog.table import METRICS as CATALOGUE

TWINS = {
    "attention": "helpers/attending.py", "experts": "watch/test_experts_set.py",
    "optimizer": "watch/test_optimizer_and_extremes.py",
    "extremes": "watch/test_optimizer_and_extremes.py",
}  # fmt: skip
"""Where the sets are computed again, slowly; they are recorded eagerly and on one rank only."""

pytestmark = pytest.mark.timeout(900)  # the first one starts the ranks


@pytest.fixture(scope="module")
def tester(request):
    return MetricTester(lambda: request.getfixturevalue("ranks"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_equals_its_twin(tester, metric, mode):
    tester.assert_metric_equals_its_twin(metric, mode)


def test_the_metrics_tested_are_all_that_a_monitor_records():
    told_by_the_loop = {"loss"}
    recorded = {name for name, metric in CATALOGUE.items() if metric.derive is None}
    assert recorded - told_by_the_loop - {*OF_BLOCKS, *OF_STEPS} == set(METRICS) - {"lr"}


@pytest.mark.parametrize(("group", "file"), TWINS.items())
def test_each_set_with_a_cadence_of_its_own_has_a_slow_twin_of_each_column(group, file):
    text = (Path(__file__).parents[1] / file).read_text()
    for metric in ON_CADENCE[group]:
        name = metric.id if metric.site in ("block", "run") else metric.id.rpartition("_")[2]
        assert name in text


def test_a_metric_without_a_twin_fails_by_its_name(tester, monkeypatch):
    for per_block, _ in tester.twins:
        monkeypatch.delitem(per_block, "grad_sum")
    with pytest.raises(AssertionError, match="grad_sum has no twin"):
        tester.assert_metric_equals_its_twin("grad_sum", "eager")
