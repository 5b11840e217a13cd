"""Hand-written transformers: encoders with the norm first or last, decoders, CaiT's LayerScale."""

from torch import Tensor, nn

from resdiag.pathologies.layers import (
    Attention,
    Mean,
    Mixture,
    Patches,
    RMSNorm,
    Scale,
    SwiGLU,
    Tied,
    Unit,
    Words,
    linear,
)
from resdiag.pathologies.tasks import CLASSES, LENGTH, TOKENS


def _before(
    width: int, heads: int, *, causal: bool = False, dropout: float = 0.0, scale: float = 0.0
) -> list[Unit]:
    """One layer with the norm first: attention, perceptron."""
    branches = [Attention(width, heads, causal=causal)], [*linear(width, 2 * width, nn.GELU)]
    more = [nn.Dropout(dropout)] if dropout else []
    return [
        Unit(
            nn.Sequential(
                nn.LayerNorm(width), *branch, *more, *([Scale(width, scale)] if scale else [])
            )
        )
        for branch in branches
    ]


def _after(width: int, heads: int, dropout: float) -> list[Unit]:
    """One layer with the norm after the addition."""
    branches = [Attention(width, heads)], [*linear(width, 2 * width, nn.GELU)]
    return [
        Unit(nn.Sequential(*branch, nn.Dropout(dropout)), nn.LayerNorm(width))
        for branch in branches
    ]


def encoder(layers: int = 3, width: int = 32, *, dropout: float = 0.1) -> nn.Module:
    """A pre-norm encoder that classifies sequences of words."""
    units = [unit for _ in range(layers) for unit in _before(width, 2, dropout=dropout)]
    tail = nn.LayerNorm(width), Mean(), nn.Linear(width, CLASSES)
    return nn.Sequential(Words(TOKENS, LENGTH, width), *units, *tail)


def decoder(layers: int = 3, width: int = 32, *, tied: bool = False) -> nn.Module:
    """A GPT-like language model: pre-norm, causal, dropout 0.1."""
    units = [u for _ in range(layers) for u in _before(width, 2, causal=True, dropout=0.1)]
    words = Words(TOKENS, LENGTH, width)
    head = Tied(words) if tied else nn.Linear(width, TOKENS, bias=False)
    return nn.Sequential(words, *units, nn.LayerNorm(width), head)


def mixture_decoder(layers: int = 2, width: int = 32, experts: int = 8) -> nn.Module:
    """A GPT-like language model with a mixture of experts in the place of each perceptron."""
    units = []
    for _ in range(layers):
        for branch in (Attention(width, 2, causal=True), Mixture(width, experts)):
            units.append(Unit(nn.Sequential(nn.LayerNorm(width), branch)))
    head = nn.Linear(width, TOKENS, bias=False)
    return nn.Sequential(Words(TOKENS, LENGTH, width), *units, nn.LayerNorm(width), head)


def llama(layers: int = 3, width: int = 32) -> nn.Module:
    """A Llama-like language model: RMSNorm first, SwiGLU, no biases."""
    units = []
    for _ in range(layers):
        attention = Attention(width, 2, causal=True, bias=False)
        units.append(Unit(nn.Sequential(RMSNorm(width), attention)))
        units.append(Unit(nn.Sequential(RMSNorm(width), SwiGLU(width, 2 * width))))
    head = nn.Linear(width, TOKENS, bias=False)
    return nn.Sequential(Words(TOKENS, LENGTH, width), *units, RMSNorm(width), head)


class Parallel(nn.Module):
    """One addition of attention and perceptron together, behind one norm (GPT-J)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, 2, causal=True)
        self.perceptron = linear(width, 2 * width, nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to the same."""
        normed = self.norm(x)
        y: Tensor = self.attention(normed) + self.perceptron(normed)
        return y


def parallel_decoder(layers: int = 4, width: int = 32) -> nn.Module:
    """A GPT-J-like language model: attention and perceptron side by side."""
    units = [Unit(Parallel(width)) for _ in range(layers)]
    head = nn.Linear(width, TOKENS)
    return nn.Sequential(Words(TOKENS, LENGTH, width), *units, nn.LayerNorm(width), head)


def masked_encoder(layers: int = 3, width: int = 32) -> nn.Module:
    """A BERT-like masked language model: post-norm, dropout 0.1."""
    units = [unit for _ in range(layers) for unit in _after(width, 2, 0.1)]
    words = Words(TOKENS, LENGTH, width)
    tail = nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, TOKENS)
    return nn.Sequential(words, nn.LayerNorm(width), *units, *tail)


def post_norm_classifier(layers: int = 2, width: int = 32) -> nn.Module:
    """A post-norm encoder that classifies sequences of words."""
    units = [unit for _ in range(layers) for unit in _after(width, 2, 0.1)]
    return nn.Sequential(Words(TOKENS, LENGTH, width), *units, Mean(), nn.Linear(width, CLASSES))


def vision_encoder(layers: int = 3, width: int = 32, *, scale: float = 0.0) -> nn.Module:
    """A ViT without class token; with LayerScale where `scale` is its start (CaiT: 1e-4)."""
    units = [unit for _ in range(layers) for unit in _before(width, 2, scale=scale)]
    return nn.Sequential(
        Patches(width), *units, nn.LayerNorm(width), Mean(), nn.Linear(width, CLASSES)
    )
