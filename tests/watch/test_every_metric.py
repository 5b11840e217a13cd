"""Every recorded metric in every mode: eager, compiled, DDP and FSDP2, against its slow twin."""

import pytest
from metric_tester import METRICS, MODES, MetricTester

from resdiag.catalog.table import METRICS as CATALOGUE

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
    assert recorded - told_by_the_loop == set(METRICS) - {"lr"}


def test_a_metric_without_a_twin_fails_by_its_name(tester, monkeypatch):
    for per_block, _ in tester.twins:
        monkeypatch.delitem(per_block, "grad_sum")
    with pytest.raises(AssertionError, match="grad_sum has no twin"):
        tester.assert_metric_equals_its_twin("grad_sum", "eager")
