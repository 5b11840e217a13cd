"""The networks of the gallery that are not the paper's: small ones, trained for a few steps."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import resdiag


class Layer(nn.Module):
    """A transformer's layer with the norm first: attention and MLP, two additions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to the same; a position attends to those before it."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        normed = self.norm1(x)
        x = x + self.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class LanguageModel(nn.Module):
    """A GPT-like language model of four layers for sequences of 16 of 32 tokens."""

    def __init__(self, layers: int = 4, width: int = 32) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(32, width), nn.Parameter(torch.zeros(16, width))
        self.layers = nn.ModuleList(Layer(width, 4) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 32, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        """(N, T) to (N, T, 32)."""
        x = self.tokens(words) + self.places
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(self.norm(x))
        return y


class ResidualPair(nn.Module):
    """Two convolutions with a residual addition; a projection where the channels change."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(3 if inputs == 3 else 4, inputs), nn.SiLU(),
            nn.Conv2d(inputs, width, 3, padding=1),
            nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip
        self.skip = nn.Identity() if inputs == width else nn.Conv2d(inputs, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, width, H, W)."""
        y: Tensor = self.skip(x) + self.body(x)
        return y


class UNet(nn.Module):
    """Two scales down and up again, skips concatenated, residual blocks as in diffusion models."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList([ResidualPair(width, width), ResidualPair(width, 2 * width)])
        self.middle = ResidualPair(2 * width, 2 * width)
        self.up = nn.ModuleList([ResidualPair(4 * width, width), ResidualPair(2 * width, width)])
        self.leave = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to the same."""
        x, kept = self.enter(x), []
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = nn.functional.avg_pool2d(x, 2)
        x = self.middle(x)
        for block in self.up:
            x = torch.cat([nn.functional.interpolate(x, scale_factor=2), kept.pop()], dim=1)
            x = block(x)
        y: Tensor = self.leave(x)
        return y


Loss = Callable[[nn.Module], Tensor]


def train_transformer(folder: Path) -> None:
    """Learn sequences that go on in equal strides: 60 steps of AdamW."""
    torch.manual_seed(0)
    model = LanguageModel()

    def loss(model: nn.Module) -> Tensor:
        starts, strides = torch.randint(32, (16, 1)), torch.randint(1, 5, (16, 1))
        words = (starts + strides * torch.arange(17)) % 32
        return nn.functional.cross_entropy(
            model(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten()
        )

    _train(model, torch.optim.AdamW(model.parameters(), 3e-3), loss, folder, "strides", steps=60)


def train_unet(folder: Path) -> None:
    """Take the noise out of smooth pictures: 40 steps of AdamW."""
    torch.manual_seed(0)
    model = UNet()

    def loss(model: nn.Module) -> Tensor:
        coarse = torch.randn(8, 3, 4, 4)
        clean = nn.functional.interpolate(coarse, size=32, mode="bilinear")
        return nn.functional.mse_loss(model(clean + 0.3 * torch.randn_like(clean)), clean)

    _train(model, torch.optim.AdamW(model.parameters(), 2e-3), loss, folder, "smooth", steps=40)


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, folder: Path, data: str, *,
    steps: int,
) -> None:  # fmt: skip
    """The loop of the gallery: the three lines of resdiag are `attach`, `step` and `save`."""
    losses = []
    with resdiag.attach(model, optimizer=optimizer) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            value = loss(model)
            value.backward()
            optimizer.step()
            monitor.step()
            losses.append(float(value.detach()))
    resdiag.save(monitor, folder, data=data, curve={"loss": losses}, overwrite=True)
