"""Laws of depth and width: closed forms, and the slope's interval against scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from resdiag.theory.scaling import fit_trend

SIZES = [2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ("law", "kind", "slope"),
    [
        (lambda x: 3 * x**0.5, "power", 0.5),
        (lambda x: 3 * x**-1.0, "power", -1.0),
        (lambda x: 0.1 * 1.4**x, "exponential", math.log(1.4)),
        (lambda x: 2.0 + 0 * x, "flat", 0.0),
        (lambda x: x**0.1, "flat", 0.1),
    ],
)
def test_a_law_is_recognised_with_its_exponent(law, kind, slope):
    found = fit_trend(SIZES, [law(float(x)) for x in SIZES])
    assert found.kind == kind
    assert found.slope == pytest.approx(slope, abs=1e-9)
    assert found.at(64) == pytest.approx(law(64.0))


def test_the_interval_is_that_of_linear_regression():
    rng = np.random.default_rng(0)
    sizes = np.repeat(SIZES, 3).astype(float)
    values = sizes**0.7 * np.exp(0.1 * rng.normal(size=sizes.size))
    found = fit_trend(sizes, values)
    fit = stats.linregress(np.log(sizes), np.log(values))
    half = stats.t.ppf(0.975, sizes.size - 2) * fit.stderr
    assert (found.slope, found.low, found.high) == pytest.approx(
        (fit.slope, fit.slope - half, fit.slope + half)
    )


def test_two_sizes_are_a_power_and_have_no_interval():
    found = fit_trend([1, 4], [1.0, 2.0])
    assert (found.kind, found.slope) == ("power", pytest.approx(0.5))
    assert math.isnan(found.low)


@pytest.mark.parametrize("values", [[1.0, 0.0, 2.0], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0]])
def test_what_has_no_logarithm_has_no_law(values):
    assert fit_trend([1, 2, 4], values).kind == "unknown"


def test_a_fit_of_tiny_numbers_keeps_its_digits():
    found = fit_trend([2, 4, 8], [1e-20, 2e-20, 4e-20])
    assert found.at(16) == pytest.approx(8e-20)
