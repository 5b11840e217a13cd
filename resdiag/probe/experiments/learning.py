"""The trainings of an examination: at the given rate, at others, by Adam, with shuffled labels."""

from collections.abc import Callable

from torch.optim import Optimizer

from resdiag.probe.experiments.copies import Copies
from resdiag.probe.experiments.experiment import Experiment
from resdiag.probe.experiments.labels import describe_labels
from resdiag.probe.experiments.one_batch import (
    Training,
    best_of,
    describe_trainings,
    shuffle_labels,
    train_on_batch,
)
from resdiag.probe.experiments.progress import Progress
from resdiag.probe.experiments.rates import Sweep, sweep_rates
from resdiag.probe.experiments.task import Task
from resdiag.probe.experiments.trial import MakeOptimizer, adam, own, sgd

_ADAM = 1e-3
_ADAM_FACTORS = (0.1, 1, 10)
_DONE = ("memorised", "known")


class Learning:
    """Trains on the batch, and stops as soon as something has memorised it.

    Args:
        copies: Of the model.
        task: Batch and loss.
        optimizer: The training's own; None for plain SGD.
        rate: The training's own; None if nothing is known: Adam at several rates then.
        steps: Updates of each training at most.
        constant: The least loss of a constant output; NaN if it is not known.
        seed: Of the passes.
        progress: What is told of every pass.

    Attributes:
        trainings: The first one at the given rate, if there is one.
        sweep: Of the given optimizer's rate, or of Adam's.
        shuffled: The training with shuffled labels.
        not_shuffled: Why there is none.
    """

    def __init__(
        self, copies: Copies, task: Task, optimizer: Optimizer | None, rate: float | None,
        steps: int, constant: float, seed: int, progress: Progress,
    ) -> None:  # fmt: skip
        self._copies, self._task, self._rate = copies, task, rate
        self._optimizer, self._steps, self._constant = optimizer, steps, constant
        self._seed, self._progress = seed, progress
        self._makers: dict[str, tuple[MakeOptimizer, bool]] = {}
        self.trainings: list[Training] = []
        self.sweep: Sweep | None = None
        self.shuffled: Training | None = None
        self.not_shuffled = ""

    def run(self) -> None:
        """Do all of it."""
        if self._rate is not None:
            self._with_given_rate(self._rate)
        else:
            self.sweep = self._sweep_adam()
            self._train_adam(self.sweep)
        if not self._is_done and self._rate is not None:
            self._train_adam(self._sweep_adam(_ADAM_FACTORS))
        self._shuffle()

    def experiments(self, has_graph: bool) -> list[Experiment]:
        """What was done, as experiments.

        Args:
            has_graph: Whether the loss could be differentiated at all.
        """
        if not has_graph:
            reason = "the loss has no graph: autograd reaches no parameter"
            return [Experiment(name="one_batch", title="One batch", reason=reason)]
        assert self.sweep is not None
        found = [self.sweep.to_experiment()]
        if self.trainings:
            found.insert(0, describe_trainings(self.trainings))
        found.append(describe_labels(self._task, best_of(self.trainings), self.shuffled,
                                     self.not_shuffled, self._seed))  # fmt: skip
        return found

    @property
    def _is_done(self) -> bool:
        return any(training.outcome in _DONE for training in self.trainings)

    def _with_given_rate(self, rate: float) -> None:
        """Train at the given rate, sweep around it, and train at the best one."""
        name = "SGD" if self._optimizer is None else type(self._optimizer).__name__
        make: Callable[[float], MakeOptimizer] = sgd if self._optimizer is None else own
        self._progress.begin("one batch")
        self._train(make(rate), name, rate)
        self._progress.begin("learning rates")
        self.sweep = sweep_rates(
            self._copies, self._task, make, rate, seed=self._seed, given=rate, optimizer=name,
            advance=self._progress.advance,
        )  # fmt: skip
        best = self.sweep.best
        if not self._is_done and best is not None and best.lr != rate:
            self._progress.begin("one batch")
            self._train(make(best.lr), name, best.lr)

    def _sweep_adam(self, factors: tuple[float, ...] | None = None) -> Sweep:
        self._progress.begin("learning rates of Adam")
        return sweep_rates(
            self._copies, self._task, adam, _ADAM, seed=self._seed, factors=factors, single=True,
            optimizer="Adam", advance=self._progress.advance,
        )  # fmt: skip

    def _train_adam(self, sweep: Sweep) -> None:
        rate = _ADAM if sweep.best is None else sweep.best.lr
        self._progress.begin("one batch")
        self._train(adam(rate), "Adam", rate, single=True)

    def _train(self, make: MakeOptimizer, name: str, rate: float, *, single: bool = False) -> None:
        how = f"{name} at {rate:.3g}"
        self._makers[how] = make, single
        self.trainings.append(self._train_on(self._task, how, rate))

    def _train_on(self, task: Task, how: str, rate: float) -> Training:
        make, single = self._makers[how]
        return train_on_batch(
            self._copies, task, make, how=how, rate=rate, steps=self._steps,
            constant=self._constant, seed=self._seed, advance=self._progress.advance, single=single,
        )  # fmt: skip

    def _shuffle(self) -> None:
        """Train with shuffled labels by what learned the batch."""
        best, task = best_of(self.trainings), shuffle_labels(self._task, self._seed)
        if best.outcome not in ("memorised", "falls"):
            known = best.outcome == "known"
            self.not_shuffled = f"the batch is {'known already' if known else 'not learned at all'}"
        elif task is None:
            self.not_shuffled = "the batch has no targets that could be told apart from its inputs"
        else:
            self._progress.begin("shuffled labels")
            self.shuffled = self._train_on(task, best.how, best.rate)
