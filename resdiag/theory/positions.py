"""Positions of an image under 3x3 convolutions with zero padding: energy maps, forward and back.

Near the border some taps see zeros, so signal and gradient concentrate in the interior, and more so
with every block: the growth rate of a deep stage is that of the interior, not the average p_W of
`geometry.padding_share` (8 x 8, un-normalised, large signals: x1.85 per block against x1.71).
"""

from dataclasses import dataclass

import numpy as np

from resdiag.theory.geometry import padding_share
from resdiag.theory.moments import Array

_LARGEST = 128  # wider images are taken as uniform: their border is a percent of them


def uniform(size: int, value: float) -> Array:
    """A map of `size` x `size` positions, or of one that stands for all of a very wide image."""
    side = size if size <= _LARGEST else 1
    return np.full((side, side), value)


@dataclass(frozen=True, kw_only=True)
class ConvTaps:
    """The nine taps of a convolution from `size` x `size` positions, with zero padding 1.

    Attributes:
        size: Width of the input.
        stride: 1 or 2.
    """

    size: int
    stride: int = 1

    def gather(self, x: Array) -> Array:
        """Mean over the taps of what each output position sees, zeros outside included.

        >>> ConvTaps(size=2).gather(np.ones((2, 2)))[0, 0].round(3)
        np.float64(0.444)
        """
        if len(x) == 1:
            return x * padding_share(self.size)
        return _box(x)[:: self.stride, :: self.stride]

    def seen(self, x: Array) -> list[Array]:
        """What each tap sees, nine maps over output positions; `gather` is their mean."""
        if len(x) == 1:
            return [self.gather(x)] * 9
        padded, step = np.pad(x, 1), self.stride
        size = len(x)
        return [
            padded[i : i + size : step, j : j + size : step] for i in range(3) for j in range(3)
        ]

    def scatter(self, y: Array) -> Array:
        """The adjoint: mean over the taps of the outputs that see each input position."""
        if len(y) == 1 and self.size > _LARGEST:
            return y * padding_share(self.size) / self.stride**2
        return _box(self.place(y))

    def place(self, y: Array) -> Array:
        """Outputs at the input positions that a subsampling shortcut keeps, zeros elsewhere."""
        if self.stride == 1:
            return y
        if len(y) == 1 and self.size > _LARGEST:
            return y / self.stride**2
        placed = np.zeros((self.size, self.size))
        placed[:: self.stride, :: self.stride] = y
        return placed


def _box(x: Array) -> Array:
    """Mean of each 3x3 window; outside is zero."""
    padded = np.pad(x, 1)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return np.asarray((rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9)
