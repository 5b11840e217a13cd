"""How attention spreads: logits, entropy and the first key, head by head, on a sample of queries.

The logits are those that the softmax sees: scaled, with biases and masks. Letters in shapes: N
batch, H heads, T queries, S keys, E width of a head.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUERIES = 64
"""Most queries of a sample that attention is measured on, evenly spaced from first to last."""

SAMPLES = 4
"""Samples of the batch that it is measured on unless told otherwise."""

MASKED = -9e3
"""A logit up to which its key is masked: libraries add -10,000 (BERT), -1e9, the least number of
the type, or minus infinity."""


class Unreadable(Exception):
    """An attention whose logits cannot be computed again, and why."""


@dataclass(frozen=True, eq=False)
class Heads:
    """Statistics of an attention by head, float tensors (H,).

    Queries that see one key only have no choice, and do not count but for `logit`; a head without
    any other has NaN.

    Attributes:
        logit: Largest logit of a visible key.
        entropy: Mean over queries of the entropy, in nats.
        share: The same, each divided by ln of the number of visible keys.
        first: Mean over queries of the weight on the first key.
    """

    logit: Tensor
    entropy: Tensor
    share: Tensor
    first: Tensor


def describe(logits: Tensor) -> Heads:
    """The statistics of logits (N, H, T, S), those of masked keys at most `MASKED`.

    >>> heads = describe(torch.tensor([[[[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]]]]))
    >>> heads.logit.item(), heads.share.item(), round(heads.first.item(), 4)
    (0.0, 1.0, 0.4167)
    """
    visible = ~(logits <= MASKED)  # so that NaN is visible, and makes NaN
    count = visible.sum(-1)
    several = count > 1
    z = logits.masked_fill(~visible, -math.inf)
    log = z.log_softmax(-1)
    weights = log.exp()
    entropy = -torch.where(visible, weights * log, 0.0).sum(-1)
    share = entropy / count.clamp_min(2).to(z.dtype).log()

    def mean(values: Tensor) -> Tensor:
        return torch.where(several, values, 0.0).sum((0, 2)) / several.sum((0, 2))

    most = z.amax((0, 2, 3))
    return Heads(
        torch.where(most == -math.inf, math.nan, most),
        mean(entropy),
        mean(share),
        mean(weights[..., 0]),
    )


def spread(logits: Tensor) -> Tensor:
    """Mean over queries of the largest visible logit minus the smallest, 0-d."""
    visible = ~(logits <= MASKED)
    most = logits.masked_fill(~visible, -math.inf).amax(-1)
    least = logits.masked_fill(~visible, math.inf).amin(-1)
    several = visible.sum(-1) > 1
    return torch.where(several, most - least, 0.0).sum() / several.sum()


def read_logits(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], samples: int | None = SAMPLES
) -> Tensor:
    """Logits (N, H, T, S) of a call of attention, on some samples and queries, without a graph.

    Args:
        name: A key of `READERS`.
        args: Of the call.
        kwargs: Of the call.
        samples: First samples of the batch to read; None for all. Where samples and heads are one
            dimension, all are read, as if they were samples of one head.

    Raises:
        Unreadable: They cannot be computed again.
    """
    names, read = READERS[name]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    # autocast would round what float32 keeps
    with torch.no_grad(), torch.autocast(given[names[0]].device.type, enabled=False):
        return read(given, samples)


def softmax_dimension(x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """The dimension that a softmax of `x` sums over, counted from the end; None if not said."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return dim - x.dim() if isinstance(dim, int) and dim >= 0 else dim


def has_heads(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call has its heads in a dimension of their own."""
    first = args[0] if args else kwargs[READERS[name][0][0]]
    return name == "multi_head_attention_forward" or first.dim() > 3


def queries_of(count: int) -> list[int]:
    """The queries that are looked at, of so many.

    >>> queries_of(3), queries_of(1000)[:3], len(queries_of(1000)), queries_of(1000)[-1]
    ([0, 1, 2], [0, 15, 31], 64, 999)
    """
    most = min(count, QUERIES)
    return [i * (count - 1) // max(1, most - 1) for i in range(most)]


def _of_softmax(given: Mapping[str, Any], samples: int | None) -> Tensor:
    return _as_heads(_rows(_some(given["input"], samples)))


def _of_product(given: Mapping[str, Any], samples: int | None) -> Tensor:
    query, key, mask = given["query"], given["key"], given.get("attn_mask")
    if query.is_nested or key.is_nested:
        raise Unreadable("attention over nested tensors, whose masks are in no tensor")
    if mask is not None and type(mask) not in (Tensor, nn.Parameter):
        raise Unreadable(f"attention with a mask of type {type(mask).__name__}")
    q, k = _rows(_some(query, samples)), _some(key, samples)
    if k.dim() > 3 and k.shape[-3] != q.shape[-3]:  # grouped queries share a key
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scale = given.get("scale")
    logits = q @ k.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if given.get("is_causal"):
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=q.device).tril()
        logits = _masked(logits, _rows(seen))
    if mask is not None:
        mask = mask[:samples] if mask.dim() == query.dim() > 3 else mask
        mask = _rows(mask) if mask.dim() > 1 and mask.shape[-2] == query.shape[-2] else mask
        logits = _masked(logits, mask)
    return _as_heads(logits)


def _of_module(given: Mapping[str, Any], samples: int | None) -> Tensor:
    """Of `multi_head_attention_forward`, whose tensors are (T, N, C), or (T, C) of one sample."""
    longer = given.get("bias_k") is not None or given.get("add_zero_attn")
    if longer or given.get("static_k") is not None:
        raise Unreadable("attention with keys that its module adds: bias_k, add_zero_attn")
    query, key, heads = given["query"], given["key"], int(given["num_heads"])
    if query.dim() == 2:
        query, key = query.unsqueeze(1), key.unsqueeze(1)
    width, bias = query.shape[-1], given.get("in_proj_bias")
    if given.get("use_separate_proj_weight"):
        weights = given["q_proj_weight"], given["k_proj_weight"]
    else:
        weights = given["in_proj_weight"].split(width)[:2]
    biases = (None, None) if bias is None else bias.split(width)[:2]
    rows = query[:, :samples][queries_of(len(query))], key[:, :samples]
    q, k = (
        _wide(F.linear(x.to(w.dtype), w, b)).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
        for x, w, b in zip(rows, weights, biases, strict=True)
    )
    logits: Tensor = q @ k.mT / math.sqrt(width // heads)
    # in this function True hides a key
    if (mask := given.get("attn_mask")) is not None:
        mask = mask.unflatten(0, (-1, heads))[:samples] if mask.dim() == 3 else mask
        logits = _masked(logits, _rows(~mask if mask.dtype == torch.bool else mask))
    if (mask := given.get("key_padding_mask")) is not None:
        mask = (mask if mask.dim() == 2 else mask.unsqueeze(0))[:samples, None, None]
        logits = _masked(logits, ~mask if mask.dtype == torch.bool else mask)
    return logits


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    """With a mask of `scaled_dot_product_attention`: True shows a key, numbers are added."""
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, -math.inf)
    return logits + _wide(mask)


def _wide(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.dtype == torch.float64 else x.float()


def _rows(x: Tensor) -> Tensor:
    """The queries that are looked at, dimension -2."""
    return x if x.shape[-2] <= QUERIES else x[..., queries_of(x.shape[-2]), :]


def _some(x: Tensor, samples: int | None) -> Tensor:
    return _wide(x[:samples] if x.dim() > 3 else x)


def _as_heads(logits: Tensor) -> Tensor:
    """Logits of any number of dimensions as (N, H, T, S)."""
    if logits.dim() < 4:
        return logits.reshape(-1, 1, *logits.shape[-2:])
    return logits.flatten(1, -3)


READERS: Mapping[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any], int | None], Tensor]]] = {
    "softmax": (("input", "dim"), _of_softmax),
    "scaled_dot_product_attention": (
        ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
        _of_product,
    ),
    "multi_head_attention_forward": (
        (
            *("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight"),
            *("in_proj_bias", "bias_k", "bias_v", "add_zero_attn"),
        ),
        _of_module,
    ),
}
"""Positional arguments of each function of attention, and what reads its logits."""
