"""Where the blocks of a CIFAR ResNet are: resolutions, stage changes, positions, zero padding.

Near the border some taps of a 3x3 convolution see zeros, so signal and gradient concentrate in the
interior, and more so with every block: the growth rate of a deep stage is that of the interior, not
that of the average share p_W (8 x 8, un-normalised, large signals: x1.85 per block against x1.71).
"""

from dataclasses import dataclass

import numpy as np

from resdiag.models.variants import STAGE_CHANNELS, count_blocks
from resdiag.theory.moments import Array

_LARGEST = 128  # wider images are taken as uniform: their border is a percent of them


def padding_share(size: int) -> float:
    """p_W = (1 - 2 / (3 W))^2: share of a 3x3 convolution's taps that fall inside a W x W image.

    The others see zeros, so a convolution under He's initialisation multiplies the second moment by
    2 p_W and not by 2. Leaving it out makes E[H_L^2] 200-400 times too high at depth 110. It holds
    for stride 1 and padding 1, and for stride 2 if the input's W is even. Source: taps
    counted, 3W - 2 of 3W per dimension with stride 1, 3W/2 - 1 of 3W/2 with stride 2.

    >>> [round(padding_share(size), 3) for size in (32, 16, 8)]
    [0.959, 0.918, 0.84]
    """
    return (1 - 2 / (3 * size)) ** 2


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What theory needs to know of one block.

    Attributes:
        stage: 0, 1, 2.
        transition: Whether it halves the resolution and doubles the channels.
        share1: Padding share of the first convolution, at the block's input resolution.
        share2: Padding share of the second convolution, at the output resolution.
        dose: Variance of the second convolution's weights over He's: the branch scale, squared.
    """

    stage: int
    transition: bool
    share1: float
    share2: float
    dose: float = 1.0

    @property
    def kept(self) -> float:
        """Channels of the input over channels of the output: 1, or 1/2 at a transition.

        With fan_out initialisation it multiplies the first convolution's gain of 2, forward and
        (as a share of the total gradient) backward; with option A it is the share of the
        shortcut's channels that are not appended zeros.
        """
        return 0.5 if self.transition else 1.0

    @property
    def gain1(self) -> float:
        """E[z^2] / E[x^2] of the first convolution: 2 p, or p at a transition."""
        return 2 * self.kept * self.share1

    @property
    def gain2(self) -> float:
        """E[z^2] / E[x^2] of the second convolution: 2 p times the dose."""
        return 2 * self.share2 * self.dose


def block_shapes(depth: int, width_px: int = 32, *, branch_scale: float = 1.0) -> list[BlockShape]:
    """The 3n blocks of a network of `depth` = 6n+2 on images `width_px` wide.

    Args:
        depth: 6n+2.
        width_px: Width of the images.
        branch_scale: Factor on the second convolution's weights.

    Raises:
        UsageError: `depth` is not 6n+2.
    """
    count = count_blocks(depth)
    shapes = []
    for stage in range(len(STAGE_CHANNELS)):
        size = max(1, width_px >> stage)
        for position in range(count):
            transition = stage > 0 and position == 0
            share1 = padding_share(2 * size if transition else size)
            shape = BlockShape(
                stage=stage,
                transition=transition,
                share1=share1,
                share2=padding_share(size),
                dose=branch_scale**2,
            )
            shapes.append(shape)
    return shapes


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
