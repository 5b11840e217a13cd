"""Hand-written convolutional networks: residual, plain, U-Net, autoencoder, along time."""

import torch
from torch import Tensor, nn

from resdiag.pathologies.layers import SqueezeExcite, Unit, Words
from resdiag.pathologies.tasks import CLASSES, LENGTH, TOKENS


def _tail(width: int, outputs: int = CLASSES) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, outputs)]


def bottlenecks(blocks: int = 4, width: int = 16) -> nn.Module:
    """Bottlenecks with GroupNorm, ReLU after the addition."""
    inner = width // 2

    def unit() -> Unit:
        layers = [
            *(nn.Conv2d(width, inner, 1), nn.GroupNorm(2, inner), nn.ReLU()),
            *(nn.Conv2d(inner, inner, 3, padding=1), nn.GroupNorm(2, inner), nn.ReLU()),
            *(nn.Conv2d(inner, width, 1), nn.GroupNorm(2, width)),
        ]
        return Unit(nn.Sequential(*layers), nn.ReLU())

    # a norm over space leaves little in the mean over space: keep four places
    tail = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, CLASSES)
    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), *[unit() for _ in range(blocks)], *tail)


def squeeze_excite(blocks: int = 4, width: int = 16, *, outputs: int = CLASSES) -> nn.Module:
    """Basic blocks with BatchNorm and a squeeze-and-excitation gate on the branch."""

    def unit() -> Unit:
        layers = [
            *(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)),
            SqueezeExcite(width),
        ]
        return Unit(nn.Sequential(*layers), nn.ReLU())

    stem = nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()
    return nn.Sequential(*stem, *[unit() for _ in range(blocks)], *_tail(width, outputs))


def pre_activation(
    blocks: int = 4, width: int = 16, activation: type[nn.Module] = nn.ELU
) -> nn.Module:
    """Pre-activation blocks with BatchNorm first and nothing after the addition."""

    def unit() -> Unit:
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.BatchNorm2d(width), activation(), nn.Conv2d(width, width, 3, 1, 1)]
        return Unit(nn.Sequential(*layers))

    tail = nn.BatchNorm2d(width), activation(), *_tail(width)
    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), *[unit() for _ in range(blocks)], *tail)


def bare_residual(blocks: int = 4, width: int = 16) -> nn.Module:
    """Residual convolutions without any norm, branches that begin small (Fixup-like)."""

    def unit() -> Unit:
        first, last = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)
        with torch.no_grad():
            last.weight.mul_(0.3)
        return Unit(nn.Sequential(first, nn.ReLU(), last))

    stem = nn.Conv2d(3, width, 3, 2, 1), nn.ReLU()
    return nn.Sequential(*stem, *[unit() for _ in range(blocks)], *_tail(width))


def plain(
    layers: int = 4, width: int = 16, *, norm: bool = True, dropout: float = 0.0
) -> nn.Module:
    """Convolutions one after the other, each with a ReLU, with or without BatchNorm."""

    def unit() -> nn.Module:
        middle = [nn.BatchNorm2d(width)] if norm else []
        more = [nn.Dropout2d(dropout)] if dropout else []
        convolution = nn.Conv2d(width, width, 3, 1, 1)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        return nn.Sequential(convolution, *middle, nn.ReLU(), *more)

    stem = nn.Conv2d(3, width, 3, 2, 1), nn.ReLU()
    return nn.Sequential(*stem, *[unit() for _ in range(layers)], *_tail(width))


class UNet(nn.Module):
    """Two scales down and up again, the skips are concatenated; predicts the clean image."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down = nn.ModuleList([_pair(3, width), _pair(width, 2 * width)])
        self.middle = _pair(2 * width, 2 * width)
        self.up = nn.ModuleList([_pair(4 * width, width), _pair(2 * width, width)])
        self.head = nn.Conv2d(width, 3, 1)
        self.pool, self.grow = nn.AvgPool2d(2), nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to the same."""
        kept = []
        for layer in self.down:
            x = layer(x)
            kept.append(x)
            x = self.pool(x)
        x = self.middle(x)
        for layer in self.up:
            x = layer(torch.cat([self.grow(x), kept.pop()], dim=1))
        y: Tensor = self.head(x)
        return y


def _pair(inputs: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for entering in (inputs, width):
        layers += [nn.Conv2d(entering, width, 3, 1, 1), nn.GroupNorm(2, width), nn.ReLU()]
    return nn.Sequential(*layers)


def autoencoder(width: int = 16) -> nn.Module:
    """Convolutions to a narrow code and back, BatchNorm; predicts the clean image."""

    def layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, 1)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    grow = nn.Upsample(scale_factor=2)
    down = layer(3, width, 2), layer(width, 2 * width, 2), layer(2 * width, width, 1)
    return nn.Sequential(
        *down,
        grow,
        layer(width, width, 1),
        grow,
        layer(width, width, 1),
        nn.Conv2d(width, 3, 3, 1, 1),
    )


class Along(nn.Module):
    """A module for (N, C, T) applied to (N, T, C)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to (N, C)."""
        y: Tensor = self.inner(x.transpose(1, 2)).mean(2)
        return y


def temporal(blocks: int = 4, width: int = 32) -> nn.Module:
    """Dilated residual convolutions along the words of a sequence, BatchNorm."""

    def unit(dilation: int) -> Unit:
        layers: list[nn.Module] = []
        for _ in range(2):
            convolution = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
            layers += [convolution, nn.BatchNorm1d(width), nn.ReLU()]
        return Unit(nn.Sequential(*layers[:-1]), nn.ReLU())

    units = [unit(1 + i % 2) for i in range(blocks)]
    words = Words(TOKENS, LENGTH, width)
    return nn.Sequential(words, Along(nn.Sequential(*units)), nn.Linear(width, CLASSES))
