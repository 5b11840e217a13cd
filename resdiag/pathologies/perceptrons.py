"""Networks of linear layers and recurrent cells: on vectors, flattened images and sequences."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from resdiag.pathologies.layers import (
    DropPath,
    Mean,
    Mixing,
    Patches,
    Scale,
    Unit,
    Words,
    linear,
)
from resdiag.pathologies.tasks import CLASSES, FEATURES, LENGTH, TOKENS

_PIXELS = 768


def residual_perceptron(
    blocks: int,
    activation: type[nn.Module] = nn.ReLU,
    *,
    norm: bool = True,
    inputs: int = FEATURES,
    outputs: int = CLASSES,
    width: int = 48,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    rezero: float | None = None,
) -> nn.Module:
    """A perceptron of residual units; with a LayerNorm first, or a factor last, on each branch."""

    def unit() -> Unit:
        layers: list[nn.Module] = [nn.LayerNorm(width)] if norm else []
        layers += [*linear(width, 2 * width, activation)]
        layers += [nn.Dropout(dropout)] if dropout else []
        layers += [DropPath(drop_path)] if drop_path else []
        layers += [Scale(1, rezero)] if rezero is not None else []
        return Unit(nn.Sequential(*layers))

    first = [nn.Flatten(), nn.Linear(inputs, width)]
    last = [nn.LayerNorm(width)] if norm else []
    return nn.Sequential(*first, *[unit() for _ in range(blocks)], *last, nn.Linear(width, outputs))


def plain_perceptron(
    layers: int,
    activation: type[nn.Module],
    gain: float,
    *,
    norm: bool = False,
    inputs: int = FEATURES,
    width: int = 64,
) -> nn.Module:
    """A perceptron without shortcuts whose weights have the variance gain^2 / fan-in."""
    units = [
        nn.Sequential(nn.Linear(width, width), *[nn.BatchNorm1d(width)] * norm, activation())
        for _ in range(layers)
    ]
    model = nn.Sequential(nn.Linear(inputs, width), *units, nn.Linear(width, CLASSES))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=gain / module.in_features**0.5)
            nn.init.zeros_(module.bias)
    return nn.Sequential(nn.Flatten(), *model)


def mixer(blocks: int, width: int = 32) -> nn.Module:
    """MLP-Mixer: perceptrons along the tokens and along the channels, in turn."""
    units: list[nn.Module] = []
    for _ in range(blocks):
        along = nn.Sequential(nn.LayerNorm(width), Mixing(linear(16, 32, nn.GELU)))
        across = nn.Sequential(nn.LayerNorm(width), *linear(width, 2 * width, nn.GELU))
        units += [Unit(along), Unit(across)]
    return nn.Sequential(
        Patches(width), *units, nn.LayerNorm(width), Mean(), nn.Linear(width, CLASSES)
    )


class GraphLayer(nn.Module):
    """Means over neighbours on a ring of tokens, and a linear map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to the same."""
        around = (x.roll(1, 1) + x.roll(-1, 1)) / 2
        y: Tensor = self.map(torch.cat([x, around], dim=-1))
        return y


def graph_network(blocks: int, width: int = 32) -> nn.Module:
    """Residual message passing on a ring of patches, BatchNorm-free, LayerNorm first."""

    def unit() -> Unit:
        layers = nn.LayerNorm(width), GraphLayer(width), nn.ReLU(), nn.Linear(width, width)
        return Unit(nn.Sequential(*layers))

    units = [unit() for _ in range(blocks)]
    return nn.Sequential(
        Patches(width), *units, nn.LayerNorm(width), Mean(), nn.Linear(width, CLASSES)
    )


class Highway(nn.Module):
    """A highway unit: t * H(x) + (1 - t) * x (Srivastava et al. 2015)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.transform = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.gate = nn.Linear(width, width)
        nn.init.constant_(self.gate.bias, -1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) to the same."""
        t = torch.sigmoid(self.gate(x))
        y: Tensor = t * self.transform(x) + (1 - t) * x
        return y


def highway(blocks: int, width: int = 48) -> nn.Module:
    """A highway network on vectors."""
    units = [Highway(width) for _ in range(blocks)]
    return nn.Sequential(nn.Linear(FEATURES, width), *units, nn.Linear(width, CLASSES))


class Recurrent(nn.Module):
    """Recurrent layers over words; the state after the last word is classified."""

    def __init__(self, kind: Callable[..., nn.Module], layers: int, width: int) -> None:
        super().__init__()
        self.words = Words(TOKENS, LENGTH, width)
        self.layers = nn.ModuleList([kind(width, width, batch_first=True) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        """(N, T) to (N, classes)."""
        x: Tensor = self.words(words)
        for layer in self.layers:
            x = layer(x)[0]
        y: Tensor = self.head(self.dropout(self.norm(x.mean(1))))
        return y


gru = functools.partial(Recurrent, nn.GRU, 2, 32)
"""Two layers of gated recurrent units."""
lstm = functools.partial(Recurrent, nn.LSTM, 2, 32)
"""Two layers of long short-term memory."""


def residual_on_pixels(blocks: int, activation: type[nn.Module]) -> nn.Module:
    """The residual perceptron on images of 16 x 16 pixels."""
    return residual_perceptron(blocks, activation, inputs=_PIXELS)
