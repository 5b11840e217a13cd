"""The networks that faults are planted in: small, of several makes, each with a task it can learn.

Images are the embedded digits at 16x16; sequences follow a fixed rule of the token before.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resdiag.data.dataset import open_data
from resdiag.models.resnet import build_model

Batch = tuple[Tensor, Tensor]

_TOKENS, _LENGTH = 32, 16


@dataclass(frozen=True)
class SmallNetwork:
    """One network and how it is trained.

    Attributes:
        name: What it is called in tables.
        build: Makes it from the global random state.
        task: "images" or "tokens".
        lr: Learning rate at which it learns.
        optimizer: "sgd" (momentum 0.9) or "adam".
        batch_size: Samples per step.
        units: Patterns of modules taken as blocks where there is no addition.
    """

    name: str
    build: Callable[[], nn.Module]
    task: str = "images"
    lr: float = 0.05
    optimizer: str = "sgd"
    batch_size: int = 32
    units: tuple[str, ...] = ()


def draw(network: SmallNetwork, seed: int, step: int) -> Batch:
    """The batch of a step: a function of seed and step."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    if network.task == "tokens":
        first = torch.randint(0, _TOKENS, (network.batch_size, 1), generator=generator)
        steps = torch.arange(_LENGTH + 1)
        tokens = (first * 5 ** (steps % 2) + 3 * steps) % _TOKENS
        return tokens[:, :-1], tokens[:, 1:]
    images, labels = _digits()
    chosen = torch.randint(0, len(labels), (network.batch_size,), generator=generator)
    return images[chosen], labels[chosen]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the model's logits, whatever it returns."""
    output = model(batch[0])
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), batch[1].reshape(-1))


@functools.cache
def _digits() -> Batch:
    """All digits at 16x16, standardised."""
    data = open_data("digits")
    images = F.avg_pool2d(data.train_images.float(), 2)
    return (images - images.mean()) / images.std(), data.train_labels.long()


# -- networks ----------------------------------------------------------------------------------


class Residual(nn.Module):
    """x + F(x) on vectors, with or without a normalisation: a residual perceptron's unit."""

    def __init__(self, width: int, activation: type[nn.Module], *, norm: bool) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.LayerNorm(width) if norm else nn.Identity(),
            nn.Linear(width, 2 * width),
            activation(),
            nn.Linear(2 * width, width),
        )
        self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, width) to (N, width)."""
        y: Tensor = self.shortcut(x) + self.branch(x)
        return y


class Bottleneck(nn.Module):
    """A bottleneck with GroupNorm, ReLU after the addition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width // 2
        self.branch = nn.Sequential(
            *(nn.Conv2d(width, inner, 1), nn.GroupNorm(2, inner), nn.ReLU()),
            *(nn.Conv2d(inner, inner, 3, padding=1), nn.GroupNorm(2, inner), nn.ReLU()),
            *(nn.Conv2d(inner, width, 1), nn.GroupNorm(2, width)),
        )
        self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) to the same."""
        return torch.relu(self.shortcut(x) + self.branch(x))


def variant(name: str, depth: int = 20) -> Callable[[], nn.Module]:
    """One of our variants at a quarter of the width."""
    return lambda: build_model(name, depth, width=0.25)


def residual_perceptron(
    blocks: int, activation: type[nn.Module] = nn.ReLU, *, norm: bool = True, width: int = 48
) -> nn.Module:
    """A perceptron of residual units on pixels."""
    units = [Residual(width, activation, norm=norm) for _ in range(blocks)]
    return nn.Sequential(nn.Flatten(), nn.Linear(768, width), *units, nn.Linear(width, 10))


def plain(
    layers: int, activation: type[nn.Module], gain: float, *, norm: bool = False
) -> nn.Module:
    """A perceptron without shortcuts whose weights have the variance gain^2 / fan-in."""
    width = 64
    units = [
        nn.Sequential(nn.Linear(width, width), *[nn.BatchNorm1d(width)] * norm, activation())
        for _ in range(layers)
    ]
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, width), *units, nn.Linear(width, 10))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=gain / module.in_features**0.5)
            nn.init.zeros_(module.bias)
    return model


def bottlenecks(blocks: int = 5, width: int = 16) -> nn.Module:
    """A convolutional network of GroupNorm bottlenecks."""
    units = [Bottleneck(width) for _ in range(blocks)]
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), *units, *tail)


def vision_transformer(layers: int = 4) -> nn.Module:
    """The VisionTransformer of torchvision, small."""
    from torchvision.models import VisionTransformer

    model: nn.Module = VisionTransformer(16, 4, layers, 2, 32, 64, num_classes=10)
    return model


def from_torchvision(name: str, **options: Any) -> nn.Module:  # noqa: ANN401
    """Any of torchvision's, for ten classes."""
    import torchvision

    model: nn.Module = getattr(torchvision.models, name)(num_classes=10, **options)
    return model


def convnext() -> nn.Module:
    """The ConvNeXt of torchvision, small."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    setting = [CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)]
    model: nn.Module = ConvNeXt(setting, layer_scale=1e-2, num_classes=10)
    return model


def gpt2(layers: int = 3) -> nn.Module:
    """The GPT-2 of transformers, small."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=_TOKENS, n_embd=32, n_layer=layers, n_head=2, n_positions=32,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def llama() -> nn.Module:
    """The Llama of transformers, small."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_TOKENS, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    return model


def bert() -> nn.Module:
    """The BERT of transformers with its masked-language head, small: post-norm."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=_TOKENS, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=2,
    )  # fmt: skip
    return BertForMaskedLM(config)


def zero_gamma() -> nn.Module:
    """Our original with the last BatchNorm's weight of each branch at zero (Goyal et al. 2017)."""
    model = build_model("original", 20, width=0.25)
    for name in model.unit_names:
        norm = model.get_submodule(f"{name}.branch.4")
        assert isinstance(norm, nn.BatchNorm2d)
        nn.init.zeros_(norm.weight)
    return model


def dropping(blocks: int = 6) -> nn.Module:
    """A residual perceptron with dropout before its head and at its input."""
    model = residual_perceptron(blocks)
    layers = list(model.children())
    return nn.Sequential(*layers[:2], nn.Dropout(0.2), *layers[2:-1], nn.Dropout(0.3), layers[-1])


def half_frozen() -> nn.Module:
    """A residual perceptron whose first layers are frozen, as in a fine-tuning."""
    model = residual_perceptron(6)
    for layer in list(model.children())[:4]:
        for parameter in layer.parameters():
            parameter.requires_grad = False
    return model


def _ours(name: str, depth: int, lr: float = 0.05) -> SmallNetwork:
    return SmallNetwork(f"{name}-{depth}", variant(name, depth), lr=lr)


def _perceptron(
    name: str,
    blocks: int,
    activation: type[nn.Module],
    **options: Any,  # noqa: ANN401
) -> SmallNetwork:
    norm = options.pop("norm", True)
    build = functools.partial(residual_perceptron, blocks, activation, norm=norm)
    return SmallNetwork(name, build, **options)


def _plain(
    name: str,
    layers: int,
    activation: type[nn.Module],
    gain: float,
    **options: Any,  # noqa: ANN401
) -> SmallNetwork:
    norm = options.pop("norm", False)
    build = functools.partial(plain, layers, activation, gain, norm=norm)
    return SmallNetwork(name, build, units=tuple(str(i + 2) for i in range(layers)), **options)


def _stock(name: str) -> SmallNetwork:
    return SmallNetwork(name, functools.partial(from_torchvision, name), lr=0.01, batch_size=8)


DEVELOPMENT = (
    _ours("original", 20),
    _ours("elu", 20),
    _ours("relu_pre", 20),
    _perceptron("residual-mlp", 6, nn.ReLU, lr=0.02),
    SmallNetwork("vit", vision_transformer, lr=1e-3, optimizer="adam"),
    SmallNetwork("gpt2", gpt2, "tokens", lr=3e-3, optimizer="adam"),
    _plain("plain-bn", 5, nn.ReLU, 1.41, norm=True),
    _plain("bare-plain", 8, nn.ReLU, 1.41, lr=0.02),
    _perceptron("bare-residual", 4, nn.ReLU, norm=False, lr=0.01),
)
"""Faults are planted in these; thresholds may be set on them."""

HELD_OUT = (
    _ours("elu_after", 20),
    _ours("no_relu", 32),
    _ours("original", 32),
    SmallNetwork("bottlenecks-gn", bottlenecks),
    _perceptron("residual-mlp-gelu", 8, nn.GELU, lr=1e-3, optimizer="adam"),
    SmallNetwork("convnext", convnext, lr=2e-3, optimizer="adam"),
    SmallNetwork("llama", llama, "tokens", lr=3e-3, optimizer="adam"),
    _plain("plain-bn-elu", 7, nn.ELU, 1.2, norm=True, lr=0.02),
    _plain("bare-plain-tanh", 6, nn.Tanh, 1.0, lr=0.02),
    _perceptron("bare-residual-elu", 5, nn.ELU, norm=False, lr=0.005),
)
"""Faults are planted in these too; no threshold has been set on them."""

HEALTHY = (
    _ours("elu_after", 14),
    _ours("no_relu", 20),
    SmallNetwork("plain-14", variant("plain", 14), units=("stages.*.*",)),
    SmallNetwork("zero-gamma", zero_gamma),
    SmallNetwork("dropout", dropping, lr=0.02),
    SmallNetwork("half-frozen", half_frozen, lr=0.02),
    SmallNetwork("bert", bert, "tokens", lr=3e-3, optimizer="adam"),
    _stock("resnet18"),
    _stock("mobilenet_v3_small"),
)
"""Healthy trainings only, beside those of the others."""
