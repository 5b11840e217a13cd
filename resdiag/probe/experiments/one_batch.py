"""Training on one batch until it is memorised: with its labels, and with them shuffled."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from resdiag.probe.experiments.copies import Copies
from resdiag.probe.experiments.experiment import Experiment, count
from resdiag.probe.experiments.task import Task
from resdiag.probe.experiments.trial import MakeOptimizer, open_trial

MEMORISED = 0.1
"""Loss over the least one of a constant output, or over the first one, below which it is known."""
FALLS = 0.7
"""The same, below which the network learns something of the batch."""
_HOPELESS = 0.98  # of the first loss, after a quarter of the steps


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training on the batch.

    Attributes:
        how: Optimizer and rate in words.
        rate: Learning rate.
        losses: Before each update; the last one after all of them.
        reference: What the losses are compared with, see `reference_for`.
    """

    how: str
    rate: float
    losses: tuple[float, ...]
    reference: float

    @property
    def reached(self) -> int | None:
        """Updates after which the batch was first memorised; None if it was not."""
        if self.reference <= 0:
            return None if self.share >= MEMORISED else len(self.losses) - 1
        below = (i for i, loss in enumerate(self.losses) if loss < MEMORISED * self.reference)
        return next(below, None)

    @property
    def done(self) -> int:
        """Updates done, those after the batch was memorised not counted."""
        return len(self.losses) - 1 if self.reached is None else self.reached

    @property
    def share(self) -> float:
        """The last loss over the reference."""
        first, last = self.reference, self.losses[-1]
        if not math.isfinite(last):
            return math.inf
        if first <= 0:  # a log-density: a fall by its own size counts as one to nothing
            return 1 - (first - last) / max(abs(first), 1e-12)
        return max(last, 0.0) / first

    @property
    def outcome(self) -> str:
        """One of "memorised", "falls", "stays", "diverges"; "known" if it was memorised before."""
        if self.reached is not None:
            return "memorised" if self.reached else "known"
        if not math.isfinite(self.losses[-1]):
            return "diverges"
        return "falls" if self.share < FALLS else "stays"

    def describe(self) -> str:
        """How, and what came of it."""
        path = f"loss {self.losses[0]:.3g} -> {self.losses[-1]:.3g}"
        words = {
            "memorised": f"memorised in {count(self.done, 'step')}",
            "known": "known before the first step",
            "falls": f"falls, not memorised in {count(self.done, 'step')}",
            "stays": f"stays in {count(self.done, 'step')}",
            "diverges": f"diverges in {count(max(self.done, 1), 'step')}",
        }[self.outcome]
        return f"{self.how}: {path}, {words}"

    def to_dict(self) -> dict[str, object]:
        """Its numbers."""
        return {
            "optimizer": self.how, "lr": self.rate, "steps": self.done, "outcome": self.outcome,
            "loss_first": self.losses[0], "loss_last": self.losses[-1],
            "reference": self.reference, "losses": list(self.losses),
        }  # fmt: skip


def train_on_batch(
    copies: Copies,
    task: Task,
    make: MakeOptimizer,
    *,
    how: str,
    rate: float,
    steps: int,
    constant: float,
    seed: int,
    advance: Callable[[], None],
    single: bool = False,
) -> Training:
    """Train a copy until the batch is memorised.

    Args:
        copies: Of the model.
        task: Batch and loss.
        make: The optimizer.
        how: Optimizer and rate in words.
        rate: Learning rate.
        steps: Updates at most; a quarter of them where the loss has hardly moved until then.
        constant: The least loss of a constant output; NaN if it is not known.
        seed: Of the passes.
        advance: Called after every pass.
        single: Whether a model in half precision is trained in float32.
    """

    def is_over(losses: Sequence[float]) -> bool:
        memorised = losses[-1] < MEMORISED * max(reference_for(losses[0], constant), 0)
        lost = len(losses) > steps // 4 and losses[-1] > _HOPELESS * losses[0] > 0
        return memorised or lost

    with open_trial(copies, task, make, seed, advance, single=single) as trial:
        trial.train(steps, is_over)
        losses = [*trial.losses, trial.measure()]
    reference = reference_for(losses[0], constant)
    return Training(how=how, rate=rate, losses=tuple(losses), reference=reference)


def reference_for(first: float, constant: float) -> float:
    """What losses are compared with: the first, or the least loss of a constant output if smaller.

    To learn the frequencies of the labels is not to learn the batch. A network whose first loss is
    far below that of any constant output knows the batch already.
    """
    if not constant > 1e-6:  # unknown, or all targets are the same
        return first
    return constant if first < MEMORISED * constant else min(first, constant)


def shuffle_labels(task: Task, seed: int) -> Task | None:
    """The batch with its targets in a random order; None where that is no other batch."""
    n = task.samples
    if task.key is None or n is None or n < 2:
        return None
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    shuffled = task.pick(order, inputs=False)
    old, new = task.target, shuffled.target
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and torch.equal(old, new):
        return None
    return shuffled


def describe_trainings(trainings: Sequence[Training]) -> Experiment:
    """The experiment of training on the batch as it is."""
    best = best_of(trainings)
    return Experiment(
        name="one_batch",
        title="One batch",
        text="; ".join(training.describe() for training in trainings),
        numbers={
            "outcome": best.outcome,
            "trainings": [training.to_dict() for training in trainings],
        },
    )


def best_of(trainings: Sequence[Training]) -> Training:
    """The one that learned most; of those that memorised the batch the first."""
    learned = [t for t in trainings if t.outcome in ("memorised", "known")]
    return learned[0] if learned else min(trainings, key=lambda training: training.share)
