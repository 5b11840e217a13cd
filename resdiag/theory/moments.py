"""Gaussian moments of the activations: z ~ N(0, q), closed forms, no fitted constant.

With x = sqrt(q / 2) and Phi the normal distribution function,

    T_k(q) = E[e^{kz}; z < 0] = e^{k^2 q / 2} Phi(-k sqrt(q)) = erfcx(k x) / 2

`erfcx(x) = e^{x^2} erfc(x)` is what keeps T_k finite: the bare exponential overflows near q = 350,
and un-normalised networks reach 1e20. For small q the moments are differences of numbers near 1/2;
there the power series erfcx(x) = sum_n (-x)^n / Gamma(n/2 + 1) is used.

The moments of ELU's powers say how much a layer of few channels scatters; those of its products
with its slope, how a gradient that points along the signal passes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Array: TypeAlias = NDArray[np.float64]
Moment: TypeAlias = Callable[[ArrayLike], Array]

_SMALL = 0.05  # below this x the direct forms lose digits; 20 terms of the series are exact
_ORDERS = np.arange(2, 22)
_LINEAR = 1e-3  # below it the powers lose their digits, and ELU(z) = z + z^2/2 on one side is exact
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(64)


@dataclass(frozen=True, kw_only=True)
class Activation:
    """The Gaussian moments of one activation phi; each a function of q, element by element.

    Attributes:
        mean: E[phi(z)].
        second_moment: E[phi(z)^2].
        slope_sq: E[phi'(z)^2].
        shifted_mean: E[phi(a + sqrt(v) z)] with z ~ N(0, 1), a function of (a, v).
    """

    mean: Moment
    second_moment: Moment
    slope_sq: Moment
    shifted_mean: Callable[[ArrayLike, ArrayLike], Array]

    def variance(self, q: ArrayLike) -> Array:
        """Var[phi(z)] = E[phi^2] - E[phi]^2."""
        return self.second_moment(q) - self.mean(q) ** 2

    def input_variance(self, second_moment: float) -> float:
        """The q at which E[phi(z)^2] is `second_moment`; E[phi^2] rises with q.

        >>> round(ACTIVATIONS["relu"].input_variance(0.5), 6)
        1.0
        """
        # q/2 <= E[phi(z)^2] <= q for ReLU and ELU
        from scipy import optimize  # a quarter of a second that few need

        low, high = 0.5 * second_moment, 2.5 * second_moment

        def excess(q: float) -> float:
            return float(self.second_moment(q)) - second_moment

        return float(optimize.brentq(excess, low, high))


def elu_mean(q: ArrayLike) -> Array:
    """mu(q) = E[ELU(z)] = sqrt(q / 2 pi) + T_1 - 1/2; positive: the source of bias shift.

    Source: closed form; Clevert et al. 2015, arXiv:1511.07289.

    >>> elu_mean([1.0, 16.0]).round(4)
    array([0.1605, 1.1902])
    """
    x = _root(q)
    direct = x / np.sqrt(np.pi) + _tail(1, q) - 0.5
    return _patched(direct, x, lambda n: np.full_like(n, 0.5))


def elu_second_moment(q: ArrayLike) -> Array:
    """M(q) = E[ELU(z)^2] = q/2 + T_2 - 2 T_1 + 1/2, between q/2 (large q) and q (small q).

    A He-initialised convolution followed by ELU multiplies the second moment by 2 M(q) / q: 1.29
    at q = 1, where ReLU has 1. Source: closed form.

    >>> elu_second_moment([0.01, 1.0, 16.0]).round(4)
    array([0.0093, 0.6449, 8.3603])
    """
    x = _root(q)
    direct = x**2 + _tail(2, q) - 2 * _tail(1, q) + 0.5
    return _patched(direct, x, lambda n: 2.0 ** (n - 1) - 1, x**2)


def elu_slope_sq(q: ArrayLike) -> Array:
    """D(q) = E[ELU'(z)^2] = 1/2 + T_2, never above 1.

    Source: closed form; it is V_phi' of Yang & Schoenholz 2017, arXiv:1712.08969.

    >>> elu_slope_sq([1.0, 1e60]).round(3)
    array([0.668, 0.5  ])
    """
    return 0.5 + _tail(2, q)


def elu_shifted_mean(a: ArrayLike, v: ArrayLike) -> Array:
    """E[ELU(a + sqrt(v) z)] for z ~ N(0, 1): what a channel with mean a passes on.

    a Phi(t) + sqrt(v) phi(t) - Phi(-t) + e^{a + v/2} Phi(-t - sqrt(v)), t = a / sqrt(v); the last
    term is e^{-t^2/2} erfcx((t + sqrt(v)) / sqrt 2) / 2, which cannot overflow for t > -sqrt(v).
    """
    a, v = np.broadcast_arrays(np.asarray(a, float), np.asarray(v, float))
    s = np.sqrt(v)
    t = a / s
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.exp(-(t**2) / 2) * special.erfcx((t + s) / np.sqrt(2)) / 2
    plain = np.exp(np.minimum(a + v / 2, 0.0)) * special.ndtr(-t - s)
    tail = np.where(t + s > 0, scaled, plain)
    density = np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi)
    return np.asarray(a * special.ndtr(t) + s * density - special.ndtr(-t) + tail)


def relu_mean(q: ArrayLike) -> Array:
    """E[ReLU(z)] = sqrt(q / 2 pi). Source: He et al. 2015, arXiv:1502.01852."""
    return np.asarray(_root(q) / np.sqrt(np.pi))


def relu_second_moment(q: ArrayLike) -> Array:
    """E[ReLU(z)^2] = q/2: why He's factor is 2. Source: He et al. 2015, arXiv:1502.01852."""
    return _root(q) ** 2


def relu_slope_sq(q: ArrayLike) -> Array:
    """E[ReLU'(z)^2] = 1/2 at every q. Source: He et al. 2015, arXiv:1502.01852."""
    return np.full_like(_root(q), 0.5)


def relu_shifted_mean(a: ArrayLike, v: ArrayLike) -> Array:
    """E[ReLU(a + sqrt(v) z)] = a Phi(t) + sqrt(v) phi(t), t = a / sqrt(v)."""
    a, s = np.asarray(a, float), np.sqrt(np.asarray(v, float))
    t = a / s
    return np.asarray(a * special.ndtr(t) + s * np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi))


ACTIVATIONS = MappingProxyType(
    {
        "elu": Activation(
            mean=elu_mean,
            second_moment=elu_second_moment,
            slope_sq=elu_slope_sq,
            shifted_mean=elu_shifted_mean,
        ),
        "relu": Activation(
            mean=relu_mean,
            second_moment=relu_second_moment,
            slope_sq=relu_slope_sq,
            shifted_mean=relu_shifted_mean,
        ),
    }
)
"""Moments by the activation's name in the variants table."""


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


def _root(q: ArrayLike) -> Array:
    """X = sqrt(q / 2)."""
    return np.asarray(np.sqrt(np.asarray(q, dtype=np.float64) / 2))


def _tail(k: int, q: ArrayLike) -> Array:
    return np.asarray(special.erfcx(k * _root(q)) / 2)


def _patched(
    direct: Array, x: Array, factor: Callable[[Array], Array], before: Array | float = 0.0
) -> Array:
    """`direct`, with `before` + series in its place where x is small."""
    small = x < _SMALL
    if not small.any():
        return direct
    return np.where(small, before + _series(x, factor), direct)


def _series(x: Array, factor: Callable[[Array], Array]) -> Array:
    """Sum over n >= 2 of factor(n) (-x)^n / Gamma(n/2 + 1), accurate for small x."""
    orders = _ORDERS.astype(float)
    powers = (-np.minimum(x, _SMALL)[..., None]) ** _ORDERS
    return np.asarray((factor(orders) * powers / special.gamma(orders / 2 + 1)).sum(axis=-1))
