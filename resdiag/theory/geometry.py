"""The blocks of a CIFAR ResNet as theory sees them: resolutions, stage changes, zero padding."""

from dataclasses import dataclass

from resdiag.models.variants import count_blocks

STAGES = 3


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
    """

    stage: int
    transition: bool
    share1: float
    share2: float

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
        """E[z^2] / E[x^2] of the second convolution: 2 p."""
        return 2 * self.share2


def block_shapes(depth: int, width_px: int = 32) -> list[BlockShape]:
    """The 3n blocks of a network of `depth` = 6n+2 on images `width_px` wide.

    Raises:
        UsageError: `depth` is not 6n+2.
    """
    count = count_blocks(depth)
    shapes = []
    for stage in range(STAGES):
        size = max(1, width_px >> stage)
        for position in range(count):
            transition = stage > 0 and position == 0
            share1 = padding_share(2 * size if transition else size)
            shapes.append(
                BlockShape(
                    stage=stage, transition=transition, share1=share1, share2=padding_share(size)
                )
            )
    return shapes
