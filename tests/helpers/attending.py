"""Small networks with attention in every spelling, and slow twins of what is recorded of them."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from resdiag.watch.measure.attention import queries_of

WIDTH, HEADS, LENGTH, BATCH, CLASSES = 8, 2, 70, 6, 5
SPELLINGS = (
    *("product", "causal", "shown", "biased", "written", "einsum", "old", "grouped", "merged"),
    *("module", "module causal", "module padded", "cross"),
)
"""Ways to write attention down; see `Attend.forward`."""


def ahead(length=LENGTH):
    """True where a key comes after its query."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def bias(length=LENGTH):
    """What ALiBi adds: minus the distance times a slope per head."""
    place = torch.arange(length)
    distance = (place[:, None] - place[None]).abs().float()
    return -distance * torch.tensor([0.5, 0.05]).view(HEADS, 1, 1)


def padding(n, length=LENGTH):
    """True for the last keys, of every sample some more; of the first sample none."""
    return torch.arange(length)[None] >= length - 3 * torch.arange(n)[:, None]


class Attend(nn.Module):
    """Attention in one of `SPELLINGS`; keeps its logits (N, H, T, S) as a twin computes them."""

    def __init__(self, spelling):
        super().__init__()
        self.spelling = spelling
        if spelling.startswith("module"):
            self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        else:
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.logits = None

    def forward(self, x):
        if self.spelling.startswith("module"):
            return self.by_module(x)
        q, k, v = self.split(self.qkv(x))
        if self.spelling == "cross":
            k, v = k[:, :, : LENGTH // 2], v[:, :, : LENGTH // 2]
        if self.spelling == "grouped":
            k, v = k[:, :1], v[:, :1]
        self.logits = self.twin(q, k)
        y = self.merged(q, k, v) if self.spelling == "merged" else self.mix(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))

    def split(self, packed):
        return (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in packed.chunk(3, -1))

    @torch.no_grad()
    def twin(self, q, k):
        """The same in float64, written out."""
        k = k.expand(-1, HEADS, -1, -1)
        logits = q.double() @ k.double().transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
        if self.spelling in ("causal", "written", "old", "module causal"):
            logits = logits.masked_fill(ahead(), -math.inf)
        if self.spelling in ("shown", "module padded"):
            logits = logits.masked_fill(padding(len(q))[:, None, None], -math.inf)
        return logits + bias().double() if self.spelling == "biased" else logits

    def mix(self, q, k, v):
        product = F.scaled_dot_product_attention
        scores = q.shape[-1] ** -0.5
        if self.spelling == "causal":
            return product(q, k, v, is_causal=True)
        if self.spelling == "shown":
            return product(q, k, v, attn_mask=~padding(len(q))[:, None, None])
        if self.spelling == "biased":
            return product(q, k, v, bias())
        if self.spelling == "grouped":
            return product(q, k, v, enable_gqa=True)
        if self.spelling == "written":
            logits = (q @ k.transpose(-2, -1) * scores).masked_fill(ahead(), -math.inf)
            return F.dropout(F.softmax(logits, dim=-1), 0.1) @ v
        if self.spelling == "old":  # BERT's mask, and a softmax by the tensor's own method
            logits = torch.matmul(q, k.transpose(-2, -1)).div(math.sqrt(q.shape[-1]))
            return torch.matmul((logits - 10_000.0 * ahead().float()).softmax(3).to(v.dtype), v)
        if self.spelling == "einsum":
            weights = (torch.einsum("nhtc,nhsc->nhts", q, k) * scores).softmax(-1)
            return torch.einsum("nhts,nhsc->nhtc", weights, v)
        return product(query=q, key=k, value=v)

    def merged(self, q, k, v):
        """Samples and heads in one dimension."""
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        weights = (torch.bmm(q, k.transpose(1, 2)) / math.sqrt(q.shape[-1])).softmax(-1)
        return torch.bmm(weights, v).unflatten(0, (-1, HEADS))

    def by_module(self, x):
        packed = F.linear(x, self.inner.in_proj_weight, self.inner.in_proj_bias)
        q, k, _ = self.split(packed)
        self.logits = self.twin(q, k)
        options = {}
        if self.spelling == "module causal":
            options = {"attn_mask": ahead(), "need_weights": False}
        if self.spelling == "module padded":
            options = {"key_padding_mask": padding(len(x))}
        return self.inner(x, x, x, **options)[0]


class Unit(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(WIDTH), branch

    def forward(self, x):
        return x + self.branch(self.norm(x))


def network(*spellings, seed=0):
    """A unit with attention for each spelling, a perceptron after each, and a classifier."""
    torch.manual_seed(seed)
    units = []
    for spelling in spellings:
        inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        units += [Unit(Attend(spelling)), Unit(inner)]
    return nn.Sequential(nn.Linear(3, WIDTH), *units, nn.Linear(WIDTH, CLASSES))


def batch(n=BATCH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(n, LENGTH, 3, generator=generator)
    return x, torch.randint(CLASSES, (n, LENGTH), generator=generator)


def attentions(model):
    return [module for module in model.modules() if isinstance(module, Attend)]


def slow_heads(logits, samples):
    """By head: largest logit, entropy, its share of uniform weights', weight on the first key."""
    n, heads, length, _ = logits.shape
    found = []
    for head in range(heads):
        most, rows = -math.inf, []
        for sample in range(min(n, samples)):
            for query in queries_of(length):
                z = logits[sample, head, query].tolist()
                seen = [value for value in z if value > -9000]
                most = max([most, *seen])
                if len(seen) < 2:
                    continue
                weights = [math.exp(value - max(seen)) for value in z if value > -9000]
                weights = [weight / math.fsum(weights) for weight in weights]
                entropy = -math.fsum(p * math.log(p) for p in weights if p)
                first = weights[0] if z[0] > -9000 else 0.0
                rows.append((entropy, entropy / math.log(len(seen)), first))
        found.append((most, *(math.fsum(column) / len(rows) for column in zip(*rows, strict=True))))
    return found


def slow_columns(logits, samples=4):
    """The columns of a block with one attention."""
    most, entropy, share, first = zip(*slow_heads(logits, samples), strict=True)
    return {
        "attention_logit": max(most),
        "attention_logit_head": most.index(max(most)),
        "attention_entropy": sum(entropy) / len(entropy),
        "attention_entropy_share": sum(share) / len(share),
        "attention_entropy_least": min(share),
        "attention_entropy_head": share.index(min(share)),
        "attention_first": sum(first) / len(first),
    }
