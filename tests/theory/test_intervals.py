"""Intervals over seeds: against scipy, and by how often they hold the truth."""

import numpy as np
import pytest
from scipy import stats

from resdiag.diagnose.degraded import Depth, compare_depths
from resdiag.theory.intervals import difference, mean_interval


def test_the_intervals_are_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=5), 3 * rng.normal(size=5) + 1
    seeds = [3, 1, 4, 0, 5]
    paired = stats.ttest_rel(a, b).confidence_interval(0.95)
    order = rng.permutation(5)
    found = difference(a, b[order], (seeds, [seeds[i] for i in order]))
    assert (found.low, found.high) == pytest.approx((paired.low, paired.high))
    assert found.is_paired
    welch = stats.ttest_ind(a, b[:4], equal_var=False).confidence_interval(0.95)
    found = difference(a, b[:4], (seeds, seeds[:4]))
    assert (found.low, found.high) == pytest.approx((welch.low, welch.high))
    assert not found.is_paired
    single = stats.ttest_1samp(a, 0).confidence_interval(0.95)
    found = mean_interval(a)
    assert (found.low, found.high) == pytest.approx((single.low, single.high))


@pytest.mark.parametrize("seeds", [([0, 0, 1], [0, 1, 2]), ([0, 1, 2], [0, 1, 3]), ([], [])])
def test_what_is_not_pairs_is_not_paired(seeds):
    assert not difference([1.0, 2.0, 4.0], [2.0, 4.0, 3.0], seeds).is_paired


def test_too_few_values_have_no_interval():
    for found in (difference([1.0], [2.0, 3.0]), mean_interval([1.0]), mean_interval([])):
        assert np.isnan([found.low, found.high]).all()
        assert not found.excludes_zero


def test_at_three_seeds_no_change_is_called_worse_in_one_of_forty_trials():
    """Four depths of equal error; seeds share half of their variance, as they share batches."""
    rng = np.random.default_rng(1)
    trials, depths = 4000, (20, 32, 44, 56)
    worse = 0
    for _ in range(trials):
        shared = rng.normal(size=3)
        made = [0.1 + 0.01 * (shared + rng.normal(size=3)) for _ in depths]
        found = compare_depths(
            "none",
            [
                Depth(depth=depth, train=tuple(errors), test=tuple(errors), seeds=(0, 1, 2))
                for depth, errors in zip(depths, made, strict=True)
            ],
        )
        worse += found.name == "degraded"
    # one side of a 95 % interval: 2.5 %, here within four standard errors of the simulation
    assert worse / trials == pytest.approx(0.025, abs=4 * np.sqrt(0.025 * 0.975 / trials))
