"""The networks of the transformers' story: a small GPT, with perceptrons or mixtures of experts.

The text is the language reference that Python ships in `pydoc_data.topics`, as characters. Letters
in shapes: N batch, T characters, C channels, H heads.
"""

import pydoc_data.topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 64, 4, 4, 64, 16
EXPERTS = 8
LETTERS = 128


def read_text() -> Tensor:
    """The text as ASCII codes, int64."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    return torch.tensor(list(text), dtype=torch.int64)


def draw_batch(text: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Random windows (N, T), and the characters that follow each: a function of seed and step."""
    generator = torch.Generator().manual_seed(100_000 * seed + step)
    starts = torch.randint(len(text) - LENGTH - 1, (BATCH, 1), generator=generator)
    windows = text[starts + torch.arange(LENGTH + 1)]
    return windows[:, :-1], windows[:, 1:]


class Attention(nn.Module):
    """Causal attention with several heads.

    Attributes:
        qk_norm: Whether queries and keys are divided by their root mean square, head by head.
    """

    def __init__(self, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.qk_norm = qk_norm

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to the same."""
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        if self.qk_norm:
            q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


class Mixture(nn.Module):
    """A mixture of experts of which each character goes to one (Fedus et al. 2021).

    Attributes:
        balance: Step of a bias that only the choice sees, against the load (Wang et al. 2024,
            arXiv:2408.15664); 0 leaves it at zero.
    """

    bias: Tensor

    def __init__(self, *, balance: float) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(perceptron(WIDTH) for _ in range(EXPERTS))
        self.register_buffer("bias", torch.zeros(EXPERTS))
        self.balance = balance

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to the same."""
        tokens = x.flatten(0, 1)
        shares = self.router(tokens).softmax(-1)
        chosen = (shares + self.bias).topk(1, -1).indices
        y = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows = torch.where(chosen[:, 0] == index)[0]
            y = y.index_add(0, rows, expert(tokens[rows]) * shares[rows, index, None])
        if self.training and self.balance:
            counts = chosen.flatten().bincount(minlength=EXPERTS).float()
            self.bias = self.bias + self.balance * (counts.mean() - counts).sign()
        return y.view_as(x)


def perceptron(inner: int) -> nn.Sequential:
    """Linear, GELU, linear."""
    return nn.Sequential(nn.Linear(WIDTH, inner), nn.GELU(), nn.Linear(inner, WIDTH))


class Unit(nn.Module):
    """x + f(norm(x))."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), inner

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to the same."""
        y: Tensor = x + self.inner(self.norm(x))
        return y


class GPT(nn.Module):
    """A GPT of `LAYERS` layers of attention and perceptron, or mixture of experts.

    Args:
        seed: Of the weights.
        qk_norm: See `Attention`.
        balance: See `Mixture`; None for perceptrons.
    """

    def __init__(self, seed: int, *, qk_norm: bool = False, balance: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.letters, self.places = nn.Embedding(LETTERS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        units = []
        for _ in range(LAYERS):
            second = perceptron(2 * WIDTH) if balance is None else Mixture(balance=balance)
            units += [Unit(Attention(qk_norm=qk_norm)), Unit(second)]
        self.units, self.norm = nn.Sequential(*units), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, LETTERS)

    def forward(self, letters: Tensor) -> Tensor:
        """(N, T) whole numbers to logits (N, T, letters)."""
        x = self.letters(letters) + self.places.weight
        logits: Tensor = self.head(self.norm(self.units(x)))
        return logits
