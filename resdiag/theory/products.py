"""Gaussian moments of ELU's powers and of products with its slope, z ~ N(0, q); closed forms.

With T_k(q) = E[e^{kz}; z < 0] = erfcx(k sqrt(q/2)) / 2, as in `resdiag.theory.moments`. They say
how a gradient that points along the signal passes an activation, and how much a layer of few
channels scatters.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from resdiag.theory.moments import Array, elu_shifted_mean

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(64)
_LINEAR = 1e-3  # below it the powers lose their digits, and ELU(z) = z + z^2/2 on one side is exact


def elu_cubed(q: ArrayLike) -> Array:
    """E[ELU(z)^3]."""
    q = np.asarray(q, float)
    direct = 2 * q * _half(q) + _tail(3, q) - 3 * _tail(2, q) + 3 * _tail(1, q) - 0.5
    return np.where(q < _LINEAR, 2.25 * q**2, direct)


def elu_fourth(q: ArrayLike) -> Array:
    """E[ELU(z)^4]."""
    q = np.asarray(q, float)
    negative = _tail(4, q) - 4 * _tail(3, q) + 6 * _tail(2, q) - 4 * _tail(1, q) + 0.5
    return np.where(q < _LINEAR, 3 * q**2, 1.5 * q**2 + negative)


def elu_times_slope(q: ArrayLike) -> Array:
    """E[ELU(z) ELU'(z)], the coefficient of 1 in ELU(z) ELU'(z)."""
    return _half(q) + _tail(2, q) - _tail(1, q)


def elu_times_slope_along(q: ArrayLike) -> Array:
    """E[ELU(z) ELU'(z) z] / q, the coefficient of z in ELU(z) ELU'(z)."""
    # by parts: E[e^{kz} z; z < 0] = k q T_k - sqrt(q / 2 pi)
    return 0.5 + 2 * _tail(2, q) - _tail(1, q)


def elu_times_slope_sq(q: ArrayLike) -> Array:
    """E[ELU(z) ELU'(z)^2]."""
    return _half(q) + _tail(3, q) - _tail(2, q)


def elu_sq_times_slope_sq(q: ArrayLike) -> Array:
    """E[ELU(z)^2 ELU'(z)^2]."""
    return np.asarray(np.asarray(q) / 2 + _tail(4, q) - 2 * _tail(3, q) + _tail(2, q))


def elu_kernel(q: float, shared: float) -> float:
    """E[ELU(z) ELU(z')] of two units of variance q and covariance `shared`."""
    shared = min(max(shared, 0.0), q * (1 - 1e-9))
    means = elu_shifted_mean(np.sqrt(shared) * _NODES, q - shared)
    return float((_WEIGHTS * means**2).sum() / _WEIGHTS.sum())


def _half(q: ArrayLike) -> Array:
    """E[z; z > 0]."""
    return np.asarray(np.sqrt(np.asarray(q, float) / (2 * np.pi)))


def _tail(k: int, q: ArrayLike) -> Array:
    return np.asarray(special.erfcx(k * np.sqrt(np.asarray(q, float) / 2)) / 2)
