"""The skip path of one forward pass: what the after-adds do to it, block after block.

Everything here is measured on the first samples of a batch: the definitions are averages over units
(sample, channel, position), and carrying one number per unit through all blocks costs as much as a
batch of activations.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from resdiag.watch.calls import Call, compose
from resdiag.watch.metrics import relative_change, slope

COLUMNS = (
    "perturbation",
    "identity_defect",
    "skip_gain_stage",
    "skip_gain",
    "identity_drift",
    "branch_ratio",
    "negative_fraction",
    "slope_mean",
    "slope_mean_sq",
)
"""What `SkipPath.close` returns, in order; the branch ratio is filled in elsewhere."""

NOT_ELEMENTWISE = "the after-add is a normalisation: it has no slope per unit"
MIXED = "a projection shortcut mixes units: no unit gradient leads through it"


class SkipPath:
    """Running products of after-add slopes (P3) and iterates of the after-add (P4).

    Args:
        samples: Samples at the head of the batch to look at; None for all.
    """

    def __init__(self, samples: int | None) -> None:
        self._samples = samples
        self.reset()

    def reset(self) -> None:
        """Begin a forward pass."""
        self._gain: tuple[Tensor, Tensor] | None = None  # product and mask of traceable units
        self._lost = False
        self._stage_gain: Tensor | None = None
        self._drift: tuple[Tensor, Tensor] | None = None  # h at the stage's first block, iterate
        self._h: Tensor | None = None

    def head(self, x: Tensor) -> Tensor:
        """The samples looked at, detached."""
        return x.detach()[: self._samples]

    def open(self, x: Tensor | None, h: Tensor, path: tuple[Call, ...] | None, new: bool) -> None:
        """Pass a block's shortcut.

        Args:
            x: Block input, None if unknown.
            h: Shortcut output.
            path: Calls of a parameter-free shortcut, () for the identity, None for a projection.
            new: Whether a stage begins: the per-stage products start again.
        """
        self._h = self.head(h).clone()
        if new:
            self._stage_gain, self._drift = None, None
        if path is None or x is None:
            self._gain, self._lost = None, True
        elif path and not self._lost:
            ones = torch.ones_like(self.head(x))
            product, mask = self._gain or (ones, ones)
            shortcut = compose(path)
            self._gain = shortcut(product), shortcut(mask)

    def close(self, u: Tensor, output: Tensor, after: tuple[Call, ...]) -> Tensor:
        """Measure a block's after-add; (9,) float64, see `COLUMNS`; NaN where undefined.

        Args:
            u: The sum's first samples, as it was before the after-add.
            output: The block's output.
            after: The after-add's calls, () for none.
        """
        if not all(call.is_activation for call in after):
            return self._unmeasurable(u, output)
        if not after:
            return self._untouched(u)
        f = compose(after)
        derivative = slope(f, u)
        self._multiply(derivative)
        h = self._h
        assert h is not None
        return torch.stack(
            [
                relative_change(f(u), u),
                relative_change(f(h), h),
                *self._gains(u),
                self._advance(f, h),
                self._nan(u),
                _mean(u < 0),
                _mean(derivative),
                _mean(derivative.double().square()),
            ]
        )

    def _untouched(self, u: Tensor) -> Tensor:
        """No after-add: P1 = P2 = 0, slope 1, by definition rather than by rounding."""
        zero, one = u.new_zeros((), dtype=torch.float64), u.new_ones((), dtype=torch.float64)
        drift = zero if self._drift is None else relative_change(*reversed(self._drift))
        negative = _mean(u < 0)
        return torch.stack([zero, zero, *self._gains(u), drift, self._nan(u), negative, one, one])

    def _unmeasurable(self, u: Tensor, output: Tensor) -> Tensor:
        """A normalisation after the addition: only what it does to the sum can be said."""
        self._gain, self._stage_gain, self._lost = None, None, True
        nan = self._nan(u)
        return torch.stack(
            [relative_change(self.head(output), u), *[nan] * 5, _mean(u < 0), nan, nan]
        )

    def _multiply(self, derivative: Tensor) -> None:
        before = self._stage_gain
        self._stage_gain = derivative if before is None else before * derivative
        if not self._lost:
            product, mask = self._gain or (1.0, torch.ones_like(derivative))
            self._gain = product * derivative, mask

    def _gains(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """P3 since the stage began, and since the first block (NaN behind a projection)."""
        one = u.new_ones((), dtype=torch.float64)
        stage = one if self._stage_gain is None else _mean(self._stage_gain)
        if self._lost:
            return stage, self._nan(u)
        if self._gain is None:
            return stage, one
        product, mask = self._gain
        return stage, product.sum(dtype=torch.float64) / mask.sum(dtype=torch.float64)

    def _advance(self, f: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        """P4: apply f once more to the iterate that began as the stage's first shortcut."""
        base, iterate = self._drift or (h, h)
        self._drift = base, f(iterate)
        return relative_change(self._drift[1], base)

    def _nan(self, u: Tensor) -> Tensor:
        return torch.full((), torch.nan, dtype=torch.float64, device=u.device)


def _mean(x: Tensor) -> Tensor:
    return x.mean(dtype=torch.float64)
