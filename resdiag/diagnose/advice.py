"""What to try next: commands that fit the run; and its row in the table of variants."""

import math

from resdiag.diagnose.finding import Threshold
from resdiag.diagnose.rundata import RunData
from resdiag.errors import UsageError
from resdiag.models.variants import Variant, find_variant
from resdiag.theory.prediction import critical_lr

USELESS = Threshold(1e-3, "Share of the learning rate at which a network learns nothing.")


def variant_of(seen: RunData) -> Variant | None:
    """The row of the run's variant; None if it is another model."""
    try:
        return find_variant(seen.variant)
    except UsageError:
        return None


def normalised_variant(seen: RunData) -> str:
    """The normalised variant with the same activation and nothing after the addition."""
    row = variant_of(seen)
    return f"{'no_relu' if row and row.activation == 'relu' else 'elu'} --depth {seen.depth}"


def plots(*kinds: str) -> tuple[str, ...]:
    """Commands that draw kinds of plots; the verdict puts the run's folder behind them."""
    return tuple(f"resdiag plot {kind}" for kind in kinds)


def lower_lr(seen: RunData) -> tuple[str, ...]:
    """The same network at a tenth of the learning rate, or below the critical one if that is less.

    Two digits, rounded down: rounding up could cross the threshold again. A rate that is a
    thousandth or less would survive and learn nothing; that is said instead.
    """
    norm = seen.scalar("grad_norm", 0)
    lr, reason = seen.lr / 10, "a tenth of the learning rate; not tried"
    if math.isfinite(norm) and critical_lr(norm) < lr:
        lr, reason = critical_lr(norm), "below 0.6 / ||g_0||; not tried"
    if not (lr > 0 and math.isfinite(lr)):
        return ()
    if lr <= seen.lr * USELESS:
        return (f"no learning rate helps: it would survive below {lr:.1e}, and learn nothing",)
    digit = 10.0 ** (math.floor(math.log10(lr)) - 1)
    options = f"{seen.variant} --depth {seen.depth} --lr {math.floor(lr / digit) * digit:.2g}"
    return run_variant(seen, options, reason)


def run_variant(seen: RunData, options: str, reason: str) -> tuple[str, ...]:
    """A run to compare with, if the network is one of ours."""
    return (f"resdiag run --variant {options}  # {reason}",) if variant_of(seen) else ()
