"""Training a copy for a few steps on one batch."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from resdiag.errors import UsageError
from resdiag.models.source import error_words
from resdiag.probe.experiments.copies import Copies, seed_everything, trainable
from resdiag.probe.experiments.task import Task

BROKEN = 1e3
"""A loss above this many times max(|first loss|, 1) ends a trial, as a non-finite one does."""

MakeOptimizer = Callable[[nn.Module, Optimizer | None], Any]
"""Takes a copied model and its copied optimizer, and returns what trains it."""


class Trial:
    """A copy in training.

    Args:
        model: In the mode it is to be trained in.
        optimizer: Of its parameters.
        task: Batch and loss; the same in every step.
        seed: Of the random numbers of the first step.
        advance: Called after every pass.

    Attributes:
        losses: Before each update, in order.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,  # noqa: ANN401 - what has step() and param_groups
        task: Task,
        seed: int,
        advance: Callable[[], None],
    ) -> None:
        self._model, self._optimizer, self._task = model, optimizer, task
        self._seed, self._advance = seed, advance
        self.losses: list[float] = []

    @property
    def is_broken(self) -> bool:
        """Whether the last loss is non-finite or beyond `BROKEN`."""
        return bool(self.losses) and is_broken(self.losses)

    def train(self, steps: int, until: Callable[[Sequence[float]], bool] | None = None) -> None:
        """Do so many updates, fewer if the loss breaks or `until` holds of the losses so far."""
        for _ in range(steps):
            self._step()
            if self.is_broken or (until is not None and until(self.losses)):
                return

    def measure(self) -> float:
        """The loss after the last update; NaN once the trial is broken.

        With the random numbers of the first pass, so that the two losses can be compared.
        """
        if self.is_broken:
            return math.nan
        seed_everything(self._seed)
        with torch.no_grad():
            value = float(self._task.run(self._model).loss)
        self._advance()
        return value

    def _step(self) -> None:
        seen = list[float]()

        def closure() -> torch.Tensor:
            seed_everything(self._seed + len(self.losses))
            self._optimizer.zero_grad()
            loss = self._task.run(self._model).loss
            if loss.requires_grad:
                backward(loss)
            seen.append(float(loss.detach()))
            return loss

        needs_closure = isinstance(self._optimizer, torch.optim.LBFGS)
        if not needs_closure:
            closure()
        if needs_closure or math.isfinite(seen[0]):
            try:
                self._optimizer.step(*[closure] * needs_closure)
            except (AttributeError, TypeError, RuntimeError, KeyError) as error:
                kind = type(self._optimizer).__name__
                raise UsageError(
                    f"a copy of {kind} cannot step: {error_words(error, 200)}",
                    "pass lr= instead of optimizer=",
                ) from error
        self.losses.append(seen[0])
        self._advance()


def backward(loss: torch.Tensor) -> None:
    """The backward pass.

    Raises:
        UsageError: It fails, as in a training.
    """
    try:
        torch.autograd.backward(loss)
    except RuntimeError as error:
        raise UsageError(f"the backward pass fails: {error_words(error, 300)}") from error


def is_broken(losses: Sequence[float]) -> bool:
    """Whether the last loss is non-finite or beyond `BROKEN`."""
    return not (math.isfinite(losses[-1]) and losses[-1] <= BROKEN * max(abs(losses[0]), 1.0))


@contextmanager
def open_trial(
    copies: Copies,
    task: Task,
    make: MakeOptimizer,
    seed: int,
    advance: Callable[[], None],
    *,
    single: bool = False,
) -> Iterator[Trial]:
    """A trial from the state of the originals.

    Args:
        copies: Of the model.
        task: Batch and loss.
        make: The optimizer.
        seed: Of the passes.
        advance: Called after every pass.
        single: Whether a model in half precision is trained in float32.
    """
    with copies.fresh() as made:
        model = made.model if made.model.training else made.model.train()
        task = with_loss(task, made.loss)
        if single and is_half(model) and not copies.reason:  # an original keeps its type
            model, task = model.float(), task.to(torch.float32)
        yield Trial(model, make(model, made.optimizer), task, seed, advance)


def with_loss(task: Task, loss: Callable[..., Any] | None) -> Task:
    """The task with the copied loss."""
    return replace(task, loss=loss)


def is_half(model: nn.Module) -> bool:
    """Whether any parameter is in half precision."""
    return any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())


def adam(rate: float) -> MakeOptimizer:
    """Adam with this rate on every trainable parameter."""
    return lambda model, _: torch.optim.Adam(list(trainable(model).values()), lr=rate)


def sgd(rate: float) -> MakeOptimizer:
    """Plain SGD with this rate on every trainable parameter."""
    return lambda model, _: torch.optim.SGD(list(trainable(model).values()), lr=rate)


def own(rate: float) -> MakeOptimizer:
    """The copied optimizer with its first rate changed to this one, the others in proportion."""

    def make(model: nn.Module, optimizer: Optimizer | None) -> Optimizer:
        assert optimizer is not None
        first = float(optimizer.param_groups[0]["lr"])
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * (rate / first) if first else rate
        return optimizer

    return make
