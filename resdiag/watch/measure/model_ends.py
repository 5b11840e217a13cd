"""What a batch shows of the data: moments of the input, and labels and loss read off the logits.

The loss is computed outside the model, where no hook is. But the gradient of a cross-entropy at
the logits, g = (p - y) / N with p their softmax, tells the labels y, and with them the loss.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from resdiag.watch.measure import moments

_KEPT = 2**17
_LEAST_KEPT = 16
_LEAST_ROWS = 8
_CLEAR = 0.05
_MOMENTS = ("mean", "channel_std", "nonfinite")


def describe_input(inputs: Sequence[Tensor]) -> Tensor | None:
    """Mean, standard deviation and non-finite share of the first floating-point input.

    Returns a float64 tensor (3,), on the input's device; None where there is no such input, as of
    language models, whose inputs are whole numbers.
    """
    x = next((t for t in inputs if t.is_floating_point() and t.dim() > 1 and t.numel() > 1), None)
    if x is None:
        return None
    x = x.detach()
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    # as one channel: on the CPU a sum and a norm take a tenth of the time of `torch.std_mean`
    values = moments.combine([moments.reduce(wide.unsqueeze(1), None, 1)])[0]
    mean, std, broken = (values[moments.STATISTICS.index(name)] for name in _MOMENTS)
    return torch.stack([mean, std * math.sqrt(x.numel() / (x.numel() - 1)), broken])


class Logits:
    """The logits (..., K) of a pass until their gradient comes.

    Of many rows only the first are kept, 2^17 numbers or 16 rows.
    """

    def __init__(self, logits: Tensor) -> None:
        self.classes = logits.shape[-1] if logits.dim() else 0
        rows = logits.detach().reshape(-1, max(1, self.classes))
        self._rows = min(len(rows), max(_LEAST_KEPT, _KEPT // max(1, self.classes)))
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

        Returns a float64 tensor (2,); NaN where half of the rows or more do not fit a cross-entropy
        with one label each, and the share where they are fewer than 8. None without classes.
        """
        if self.classes < 2 or self._kept._version != self._version:
            return None
        z = self._kept.double()
        g = g.detach().reshape(-1, self.classes)[: self._rows].double()
        p = z.softmax(1)
        sign = torch.where((g > 0).sum() < (g < 0).sum(), -1.0, 1.0) if self.classes > 2 else 1.0
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
        clear = (known * 2 > (g != 0).any(1).sum()) & (known > 0)
        loss = torch.where(clear, loss, nan)
        share = torch.where(clear & (known >= _LEAST_ROWS), share, nan)
        return torch.stack([loss, share])
