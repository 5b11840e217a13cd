"""The rate sweep: a few steps at each of several learning rates, from the same state and batch."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resdiag.probe.experiments.copies import Copies
from resdiag.probe.experiments.experiment import Experiment, count
from resdiag.probe.experiments.task import Task
from resdiag.probe.experiments.trial import MakeOptimizer, open_trial

STEPS = 4
DECADES = (1, 10, 100, 1e3)
"""Factors on a rate, upwards; downwards their inverses."""
_BEYOND = (1e4, 1e5, 1e6, 1e7)  # while the largest rate is the fastest, or none is small enough
_UNCHANGED = 0.01  # share of the first loss
_LITTLE = 0.1  # share of the fall at the fastest rate


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What a few steps at one learning rate came to.

    Attributes:
        lr: The rate.
        first: Loss before the first step.
        last: Loss after the last step; NaN if it diverged before.
        outcome: "falls", "stays" (within 1 %), "rises" or "diverges".
    """

    lr: float
    first: float
    last: float
    outcome: str

    @property
    def fall(self) -> float:
        """How much the loss fell; 0 if it did not."""
        return max(0.0, self.first - self.last) if math.isfinite(self.last) else 0.0


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What was measured at several rates.

    Attributes:
        rates: In order of the rate.
        steps: At each.
        given: The training's own rate; None if it is not known.
        optimizer: In words.
    """

    rates: tuple[Rate, ...]
    steps: int
    given: float | None
    optimizer: str

    @property
    def best(self) -> Rate | None:
        """The rate with the least loss at the end; None if the loss falls at none."""
        falling = [rate for rate in self.rates if rate.outcome == "falls"]
        return min(falling, key=lambda rate: rate.last, default=None)

    @property
    def own(self) -> Rate | None:
        """What the training's own rate did."""
        return next((rate for rate in self.rates if rate.lr == self.given), None)

    @property
    def answer(self) -> str:
        """About the given rate: "too_low", "too_high" or "fits"; "none" if no rate helps.

        Too low: a rate ten or more times as large lowers the loss ten or more times as much. Too
        high: the loss rises or diverges, and falls at a smaller rate. "unknown" without a rate.
        """
        if self.best is None:
            return "none"
        if self.own is None or self.given is None:
            return "unknown"
        if self.own.outcome in ("rises", "diverges") and self.best.lr < self.given:
            return "too_high"
        much_less = self.own.fall < _LITTLE * self.best.fall
        return "too_low" if self.best.lr >= 9.9 * self.given and much_less else "fits"

    def to_experiment(self) -> Experiment:
        """The experiment."""
        best = self.best
        text = f"{count(self.steps, 'step')} of {self.optimizer} at each rate, from the same state "
        text += "on this batch: "
        if best is None:
            text += "the loss falls at none of them"
        else:
            text += f"the loss falls fastest at {best.lr:.3g}, from {best.first:.3g} "
            text += f"to {best.last:.3g}"
            if self.given:
                text += f"; the given rate is {self.given:.3g}{_times(best.lr / self.given)}"
        return Experiment(
            name="rates",
            title="Rates",
            text=text,
            numbers={
                "steps": self.steps, "given": self.given, "answer": self.answer,
                "fastest": None if best is None else best.lr,
                "factor": None if best is None or not self.given else best.lr / self.given,
                "rates": [
                    {"lr": r.lr, "loss_before": r.first, "loss_after": r.last, "outcome": r.outcome}
                    for r in self.rates
                ],
            },
            lines=tuple(
                f"{rate.lr:<9.2g}{rate.last:>10.4g}  {rate.outcome}"
                + ("  <- given" if rate.lr == self.given else "")
                for rate in self.rates
            ),
        )  # fmt: skip


def sweep_rates(
    copies: Copies,
    task: Task,
    make: Callable[[float], MakeOptimizer],
    rate: float,
    *,
    seed: int,
    advance: Callable[[], None],
    given: float | None = None,
    optimizer: str = "the optimizer",
    steps: int = STEPS,
    factors: Sequence[float] | None = None,
    single: bool = False,
) -> Sweep:
    """Try rates over decades around one: upwards until the loss diverges, downwards until it stays.

    Args:
        copies: Of the model.
        task: Batch and loss.
        make: The optimizer with a rate.
        rate: The middle.
        seed: Of the passes.
        advance: Called after every pass.
        given: The training's own rate, if the sweep is about it.
        optimizer: In words.
        steps: At each rate.
        factors: Factors on the rate, all of which are tried; None for decades.
        single: Whether a model in half precision is trained in float32.
    """
    tried = dict[float, Rate]()

    def try_rate(factor: float) -> Rate:
        lr = rate * factor
        with open_trial(copies, task, make(lr), seed, advance, single=single) as trial:
            trial.train(steps)
            tried[lr] = rate_of(lr, [*trial.losses, trial.measure()])
        return tried[lr]

    if factors is not None:
        for factor in factors:
            try_rate(factor)
    else:
        _search(try_rate, tried)
    rates = tuple(tried[lr] for lr in sorted(tried))
    return Sweep(rates=rates, steps=steps, given=given, optimizer=optimizer)


def rate_of(lr: float, losses: Sequence[float]) -> Rate:
    """What losses before the first, and after every, step say of a rate."""
    first, last = losses[0], losses[-1]
    size = max(abs(first), 1e-12)
    if not math.isfinite(last):
        outcome = "diverges"
    elif last > first + _UNCHANGED * size:
        outcome = "rises"
    else:
        outcome = "falls" if last < first - _UNCHANGED * size else "stays"
    return Rate(lr=lr, first=first, last=last, outcome=outcome)


def _search(try_rate: Callable[[float], Rate], tried: Mapping[float, Any]) -> None:
    for factor in DECADES:
        if try_rate(factor).outcome == "diverges":
            break
    else:
        for factor in _BEYOND:
            best = max(tried.values(), key=lambda rate: rate.fall)
            if best.lr < max(tried) or try_rate(factor).outcome == "diverges":
                break
    for factor in DECADES[1:]:
        if any(rate.outcome == "stays" for rate in tried.values()):
            return  # at smaller rates, too
        largest = max(rate.fall for rate in tried.values())
        last = try_rate(1 / factor)
        if last.outcome == "falls" and last.fall < _LITTLE * largest:
            return
    for factor in _BEYOND:
        if any(rate.outcome in ("falls", "stays") for rate in tried.values()):
            return
        try_rate(1 / factor)


def _times(factor: float) -> str:
    if 0.5 < factor < 2:
        return ", which is that"
    return f", {factor:.3g} times less" if factor > 1 else f", {1 / factor:.3g} times more"
