"""What a batch shows of the data: moments of the input, and labels and loss read off the logits.

The loss is computed outside the model, where no hook is. But the gradient of a cross-entropy at
the logits, g = (p - y) / N with p their softmax, tells the labels y, and with them the loss.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from resdiag.watch.measure import moments

_SAMPLES = 8
"""Samples among which the spread between samples is measured."""

_KEPT = 2**17
_LEAST_KEPT = 16
_LEAST_ROWS = 8
_CLEAR = 0.05
_PARALLEL = 0.01
"""Part of a gradient that may stand across the expected direction."""
_BETTER = 0.1
_ROUNDED = 1e-5
"""Part that rounding to float32 does not reach: with two classes there is one direction only."""

_MOMENTS = ("mean", "channel_std", "nonfinite")


def describe_input(inputs: Sequence[Tensor]) -> Tensor | None:
    """Mean, standard deviation, non-finite share, and spread between the first samples.

    Of the first floating-point input; without one, as of language models, whose inputs are whole
    numbers, the first three are NaN, and the spread is the largest share of numbers of one input
    that differ from the first sample's.

    Returns a float64 tensor (4,), on the input's device; None where there is no such input.
    """
    x = next((t for t in inputs if t.is_floating_point() and t.dim() > 1 and t.numel() > 1), None)
    if x is None:
        return _describe_tokens(inputs)
    x = x.detach()
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    # as one channel: on the CPU a sum and a norm take a tenth of the time of `torch.std_mean`
    values = moments.combine([moments.reduce(wide.unsqueeze(1), None, 1)])[0]
    mean, std, broken = (values[moments.STATISTICS.index(name)] for name in _MOMENTS)
    std = std * math.sqrt(x.numel() / (x.numel() - 1))
    first = wide[:_SAMPLES]
    between = (first - first.mean(0)).square().mean().sqrt().double() / std
    between = between if len(first) > 1 else torch.full_like(std, math.nan)
    return torch.stack([mean, std, broken, between])


def _describe_tokens(inputs: Sequence[Tensor]) -> Tensor | None:
    tokens = [x for x in inputs if is_tokens(x) and len(x) > 1]
    if not tokens:
        return None
    shares = [(x[1:_SAMPLES] != x[:1]).double().mean() for x in tokens]
    return torch.stack([*shares[0].new_full((3,), math.nan), torch.stack(shares).amax()])


def is_tokens(x: Tensor) -> bool:
    """Whether a tensor is a batch of whole numbers: token ids, positions, masks."""
    return not x.is_floating_point() and not x.is_complex() and x.dim() > 1 and x.numel() > 1


_ACTIVATIONS = frozenset(
    {"softmax", "relu", "tanh", "sigmoid", "elu", "gelu", "silu", "leakyrelu", "softplus", "selu"}
)
_PASSED_ON = ("view", "reshapealias", "unsafeview", "tocopy", "alias", "clone", "transpose",
              "permute", "squeeze", "unsqueeze")  # fmt: skip


def activation_of(output: Tensor) -> str:
    """Name of the activation that made a tensor, "" if something else did.

    >>> activation_of(torch.ones(2, 3, requires_grad=True).softmax(1).view(3, 2))
    'softmax'
    >>> activation_of(torch.ones(2, 3, requires_grad=True).relu() * 30)
    ''
    """
    node = output.grad_fn
    for _ in range(8):
        name = "" if node is None else node.name().lower().rstrip("0123456789")
        name = name.removesuffix("backward")
        if node is None or name not in _PASSED_ON:
            return name if name in _ACTIVATIONS else ""
        node = node.next_functions[0][0]
    return ""


class Logits:
    """The logits (..., K) of a pass until their gradient comes.

    Of many rows only the first are kept, 2^17 numbers or 16 rows. `tokens` are the model's inputs
    at the same places, if they are whole numbers.
    """

    def __init__(self, logits: Tensor, tokens: Tensor | None = None) -> None:
        self.classes = logits.shape[-1] if logits.dim() else 0
        rows = logits.detach().reshape(-1, max(1, self.classes))
        self._rows = min(len(rows), max(_LEAST_KEPT, _KEPT // max(1, self.classes)))
        self._total = len(rows)
        if tokens is not None and tokens.numel() == len(rows):
            self._tokens: Tensor | None = tokens.reshape(-1)[: self._rows].clone()
        else:
            self._tokens = None
        # detached: a hook that held the logits themselves would keep their graph alive
        self._kept = rows if self._rows == len(rows) else rows[: self._rows].clone()
        self._version = self._kept._version

    def read(self, g: Tensor) -> Tensor | None:
        """The cross-entropy, and the share of the most frequent label, from dL/dlogits.

        In a row of label k, g_j = p_j / N for every j but k: so N is the quotient of the sums of
        p_j and g_j over positive g_j, row by row, whatever the reduction, the weights of the
        classes or the scale of the loss; and k is where g is least. A loop that maximises its loss
        shows by the signs: K - 1 of K are negative then, and the loss is given as minus the
        cross-entropy (of two classes the signs say nothing). Rows that do not fit, or have
        no gradient (labels that are ignored), do not count.

        Returns a float64 tensor with `catalog.HEAD_LOSS`: the first two and the last are NaN where
        half of the rows or more do not fit a cross-entropy with one label each, and the second
        where they are fewer than 8. None without classes.
        """
        if self.classes < 2 or self._kept._version != self._version:
            return None
        z = self._kept.double()
        g = g.detach().reshape(-1, self.classes)[: self._rows].double()
        p = z.softmax(1)
        sign = torch.where((g > 0).sum() < (g < 0).sum(), -1.0, 1.0) if self.classes > 2 else 1.0
        twice = _fits_twice(p, g)
        g = g * sign
        positive = (g > 0).double()
        scale = (p * positive).sum(1) / (g * positive).sum(1)
        label = g.argmin(1, keepdim=True)
        one_hot = torch.zeros_like(p).scatter_(1, label, 1.0)
        fits = ((p - scale[:, None] * g - one_hot).abs().amax(1) < _CLEAR).double()
        known = fits.sum()
        losses = z.logsumexp(1) - z.gather(1, label)[:, 0]
        loss = sign * torch.where(fits > 0, losses, 0).sum() / known
        share = (one_hot * fits[:, None]).sum(0).amax() / known
        nan = torch.full_like(loss, math.nan)
        counts = (g != 0).any(1)
        clear = (known * 2 > counts.sum()) & (known > 0)
        loss = torch.where(clear, loss, nan)
        share = torch.where(clear & (known >= _LEAST_ROWS), share, nan)
        ignored = 1 - counts.double().mean()
        # of a mean over the rows that count, `scale` is their number
        middle = torch.where(fits > 0, scale, nan).nanmedian()
        factor = torch.where(clear, (1 - ignored) * self._total / middle, nan)
        copies = nan
        if self._tokens is not None:
            same = (self._tokens == label[:, 0]).double()
            copies = torch.where(clear, (same * fits).sum() / known, nan)
        return torch.stack([loss, share, factor, ignored, twice, copies])


def _fits_twice(p: Tensor, g: Tensor) -> Tensor:
    """Share of rows whose gradient is that of a cross-entropy of the softmax of the logits.

    With p = softmax(z) taken for logits, dL/dz = J (q - y), q = softmax(p), J = diag(p) - p p^T.
    So dL/dz / p is least at the label. Of equal logits both gradients have one direction: the
    better fit has to be far better.
    """
    label = (g / p).argmin(1, keepdim=True)
    one_hot, counts = torch.zeros_like(p).scatter_(1, label, 1.0), (g != 0).any(1)
    error = p.softmax(1) - one_hot
    twice = _off(g, p * (error - (p * error).sum(1, keepdim=True)))
    once = _off(g, p - one_hot)
    fits = (twice < _PARALLEL) & (twice < _BETTER * once) & (once > _ROUNDED) & counts
    share: Tensor = fits.double().sum() / counts.double().sum()
    return share


def _off(g: Tensor, direction: Tensor) -> Tensor:
    """Share of each row of a gradient that stands across a direction."""
    along = (g * direction).sum(1, keepdim=True) / direction.square().sum(1, keepdim=True)
    across = torch.linalg.vector_norm(g - along * direction, dim=1)
    share: Tensor = across / torch.linalg.vector_norm(g, dim=1)
    return share
