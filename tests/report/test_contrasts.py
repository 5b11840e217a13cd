"""Differences between networks: against numbers taken from the committed study by hand."""

from pathlib import Path

import numpy as np
import pytest
from made_studies import make_results
from scipy import stats

from resdiag.report.contrasts import contrast_parts
from resdiag.report.storage import read_results

FOLDER = Path(__file__).parents[2] / "studies" / "results" / "degradation-cpu"


@pytest.fixture(scope="module")
def results():
    return read_results(FOLDER)


def errors_of(results, variant, depth):
    found = {
        item.cell.request.seed: 100 * item.number("test_error")
        for item in results.cells
        if (item.cell.request.variant, item.cell.request.depth) == (variant, depth)
    }
    return np.array([found[seed] for seed in sorted(found)])


def test_each_entry_is_the_t_interval_of_the_differences_in_a_seed(results):
    _, table = contrast_parts(results)
    rows = {str(row[0]): list(map(str, row[1:])) for row in table.rows}
    assert len(rows) == 6  # pairs of four networks
    gaps = {d: errors_of(results, "elu_after", d) - errors_of(results, "elu", d) for d in (20, 56)}
    expected = [gaps[20], gaps[56], gaps[56] - gaps[20]]
    for entry, numbers in zip(rows["elu_after (c) - elu (d)"], expected, strict=True):
        held = stats.ttest_1samp(numbers, 0).confidence_interval(0.95)
        words = f"{numbers.mean():+.2f} [{held.low:.2f}, {held.high:.2f}]"
        assert entry == (f"✓ {words}" if held.low > 0 or held.high < 0 else words)


def test_what_chance_would_mark_is_said(results):
    rule, _ = contrast_parts(results)
    assert "Of 18 intervals, 0.9 would be marked by chance" in rule.text


def test_one_seed_has_no_contrasts():
    only = make_results(missing=tuple(range(1, 8, 2)))
    assert contrast_parts(only) == []
