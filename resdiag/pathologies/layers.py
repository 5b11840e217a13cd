"""Building blocks of the hand-written networks, with the places where faults are planted.

A residual unit adds by its attribute `join`, its shortcut is a module, and attention has a factor
on its logits. Letters in shapes: N batch, T tokens, C channels, H and W height and width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Join = Callable[[Tensor, Tensor], Tensor]


class Unit(nn.Module):
    """A residual unit: join(shortcut(x), branch(x)), then what comes after the addition.

    Attributes:
        join: Takes shortcut and branch; an addition, unless a fault replaces it.
    """

    def __init__(self, branch: nn.Module, after: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Identity()
        self.after = after if after is not None else nn.Identity()
        self.join: Join = torch.add

    def forward(self, x: Tensor) -> Tensor:
        """Any shape that the branch keeps."""
        y: Tensor = self.after(self.join(self.shortcut(x), self.branch(x)))
        return y


class Attention(nn.Module):
    """Softmax attention with several heads.

    Attributes:
        sharpness: Factor on the logits; 1 unless a fault changes it.
    """

    def __init__(self, width: int, heads: int, *, causal: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.heads, self.causal, self.sharpness = heads, causal, 1.0

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to the same."""
        shape = (*x.shape[:2], 3, self.heads, x.shape[2] // self.heads)
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) * (self.sharpness / shape[-1] ** 0.5)
        if self.causal:
            ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            logits = logits.masked_fill(ahead, -torch.inf)
        mixed = logits.softmax(-1) @ v
        y: Tensor = self.out(mixed.transpose(1, 2).reshape(x.shape))
        return y


class Mixture(nn.Module):
    """A mixture of experts: every token goes to the `k` whose logits are largest.

    While it trains, a bias that only the choice sees is lowered for experts that got more tokens
    than the mean, and raised for the others (Wang et al. 2024, arXiv:2408.15664).

    Attributes:
        balance: How far the bias moves in a step; 0.05 unless a fault changes it.
        favour: What is added to the logits, one number per expert; zeros unless a fault adds to it.
    """

    bias: Tensor

    def __init__(self, width: int, experts: int, k: int = 2) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(linear(width, width, nn.GELU) for _ in range(experts))
        self.register_buffer("bias", torch.zeros(experts))
        self.k, self.balance, self.favour = k, 0.05, torch.zeros(experts)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to the same."""
        tokens = x.flatten(0, 1)
        logits = self.router(tokens) + self.favour
        chosen = (logits + self.bias).topk(self.k, -1).indices
        weights = logits.gather(1, chosen).softmax(-1)
        y = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == index)
            y = y.index_add(0, rows, expert(tokens[rows]) * weights[rows, place, None])
        if self.training:
            with torch.no_grad():
                counts = chosen.flatten().bincount(minlength=len(self.experts)).float()
                self.bias = self.bias + self.balance * (counts.mean() - counts).sign()
        return y.view_as(x)


class RMSNorm(nn.Module):
    """Division by the root mean square, and a gain (Zhang and Sennrich 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class SwiGLU(nn.Module):
    """A gated unit, silu(x W) * (x V), and a projection back (Shazeer 2020)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same."""
        y: Tensor = self.down(self.activation(self.gate(x)) * self.up(x))
        return y


class Scale(nn.Module):
    """A learned factor per channel, or one for all: LayerScale, ReZero."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C), or any shape where there is one factor."""
        return x * self.factor


class SqueezeExcite(nn.Module):
    """Channels times a gate that is computed from their means (Hu et al. 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, width), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        gate: Tensor = self.gate(x.mean((2, 3)))
        return x * gate[..., None, None]


class DropPath(nn.Module):
    """Stochastic depth: a sample's branch is left out with probability p (Huang et al. 2016)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Any shape with the batch first."""
        if not self.training:
            return x
        shape = (len(x), *[1] * (x.dim() - 1))
        kept = (torch.rand(shape) >= self.p).to(x.dtype)
        return x * kept / (1 - self.p)


class Mixing(nn.Module):
    """A module applied along the tokens instead of the channels."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to the same."""
        y: Tensor = self.inner(x.transpose(1, 2))
        return y.transpose(1, 2)


class Patches(nn.Module):
    """Image to tokens: patches, a linear map, learned positions."""

    def __init__(self, width: int, size: int = 16, patch: int = 4) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, T, C)."""
        tokens: Tensor = self.project(x).flatten(2).transpose(1, 2)
        return tokens + self.position


class Words(nn.Module):
    """Words to vectors, with learned positions."""

    def __init__(self, words: int, length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        nn.init.normal_(self.table.weight, std=0.3)

    def forward(self, words: Tensor) -> Tensor:
        """(N, T) to (N, T, C)."""
        vectors: Tensor = self.table(words)
        return vectors + self.position[: words.shape[1]]


class Mean(nn.Module):
    """Mean over the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to (N, C)."""
        return x.mean(1)


class Tied(nn.Module):
    """Logits by the embedding's own weights (Press and Wolf 2017)."""

    def __init__(self, words: Words) -> None:
        super().__init__()
        self.weight = words.table.weight

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to (N, T, words)."""
        return F.linear(x, self.weight)


def linear(width: int, inner: int, activation: type[nn.Module], *more: nn.Module) -> nn.Sequential:
    """Linear, activation, linear: the branch of a perceptron."""
    return nn.Sequential(nn.Linear(width, inner), activation(), nn.Linear(inner, width), *more)
