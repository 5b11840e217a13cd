"""Sobol's points are scipy's, bit for bit."""

import numpy as np
import pytest
from scipy import stats

from resdiag.theory.sobol import MOST, sobol_points


@pytest.mark.parametrize("dimensions", [*range(1, MOST + 1), MOST + 1, 100])
@pytest.mark.parametrize("log2", [0, 1, 5, 13])
def test_points_are_those_of_scipy(dimensions, log2):
    wanted = stats.qmc.Sobol(dimensions, scramble=False).random_base2(log2)
    points = sobol_points(dimensions, log2)
    assert points.shape == (2**log2, dimensions)
    np.testing.assert_array_equal(points, wanted)
