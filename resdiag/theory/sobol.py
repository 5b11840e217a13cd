"""Points of Sobol's sequence in few dimensions, without importing `scipy.stats`.

That import takes a second and a half, which is half of drawing a plot.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

_BITS = 30
_DIRECTIONS = (  # polynomial without its ends, and the first direction numbers, of dimension 2 ...
    (0, (1,)),
    (1, (1, 3)),
    (1, (1, 3, 1)),
    (2, (1, 1, 1)),
    (1, (1, 1, 3, 3)),
    (4, (1, 3, 5, 13)),
    (2, (1, 1, 5, 5, 17)),
    (4, (1, 1, 5, 5, 5)),
    (7, (1, 1, 7, 11, 19)),
)
"""Joe and Kuo 2008, SIAM J. Sci. Comput. 30, 2635-2654, table new-joe-kuo-6.21201."""

MOST = len(_DIRECTIONS) + 1
"""Dimensions that the table holds."""


@cache
def sobol_points(dimensions: int, log2: int) -> NDArray[np.float64]:
    """The first 2^log2 points of the sequence, unscrambled, in [0, 1). Do not change them.

    The same numbers as `scipy.stats.qmc.Sobol(dimensions, scramble=False).random_base2(log2)`,
    which is asked for more than `MOST` dimensions.

    Returns:
        Shape (2^log2, dimensions).

    >>> sobol_points(2, 2).tolist()
    [[0.0, 0.0], [0.5, 0.5], [0.75, 0.25], [0.25, 0.75]]
    """
    if dimensions > MOST:
        from scipy import stats

        points = stats.qmc.Sobol(dimensions, scramble=False).random_base2(log2)
        return np.asarray(points)
    directions = np.array([_directions(at) for at in range(dimensions)], dtype=np.int64)
    steps = np.arange(1, 2**log2)
    # in the order of Gray's code, a point differs from the one before by one direction number
    lowest = np.log2(steps & -steps).astype(int)
    changes = np.concatenate([np.zeros((1, dimensions), np.int64), directions.T[lowest]])
    whole: NDArray[np.int64] = np.bitwise_xor.accumulate(changes, axis=0)
    return whole / 2.0**_BITS


def _directions(at: int) -> list[int]:
    """Direction numbers of one dimension, as fractions of 2^_BITS."""
    if at == 0:
        return [2 ** (_BITS - 1 - bit) for bit in range(_BITS)]
    polynomial, first = _DIRECTIONS[at - 1]
    degree, numbers = len(first), list(first)
    for k in range(degree, _BITS):
        new = numbers[k - degree] ^ (numbers[k - degree] << degree)
        for i in range(1, degree):
            if polynomial >> (degree - 1 - i) & 1:
                new ^= numbers[k - i] << i
        numbers.append(new)
    return [number << (_BITS - 1 - bit) for bit, number in enumerate(numbers)]
