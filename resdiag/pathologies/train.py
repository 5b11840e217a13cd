"""The training loop of the suite: plain PyTorch, watched by a monitor, with a trial's changes."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from resdiag.pathologies.optimizers import OPTIMIZERS
from resdiag.pathologies.tasks import logits_of
from resdiag.pathologies.trial import Trial
from resdiag.runs.folder import Run
from resdiag.runs.watched import as_run
from resdiag.watch.find.blocks import put_back
from resdiag.watch.loop.attach import attach
from resdiag.watch.loop.monitor import Monitor

_UNSEEN = 900
"""Seed of the batches of evaluations; no training has it."""


def make_optimizers(trial: Trial) -> list[Optimizer]:
    """The optimizers of a trial, at their first learning rates."""
    make = OPTIMIZERS[trial.optimizer][2]
    groups = trial.groups if trial.groups is not None else [[{"params": trial.trained}]]
    found = [make(of_one, trial.lr, trial.decay) for of_one in groups]
    for optimizer in found:
        for group in optimizer.param_groups:
            group["base"] = group["lr"]
    return found


def train(trial: Trial) -> tuple[Run, list[float]]:
    """Train as anybody would, watched.

    Returns:
        What was recorded, and the loss of every step.
    """
    loop = Loop(trial)
    watched = attach(trial.model, optimizer=loop.optimizers, scaler=trial.scaler, **trial.watch)
    with watched as monitor:
        loop.run(monitor)
    name, task = trial.architecture.name, trial.architecture.task
    run = as_run(monitor, model=name, data=task, curve=loop.curve if trial.evaluate else None)
    if trial.variant:
        run = replace(run, config=replace(run.config, variant=trial.variant))
    return run, loop.losses


def train_unwatched(trial: Trial) -> list[float]:
    """The same without a monitor; the loss of every step."""
    loop = Loop(trial)
    loop.run(None)
    return loop.losses


class Loop:
    """One training.

    Attributes:
        optimizers: Those of the trial.
        losses: Of every step so far.
        curve: Of every evaluation so far: step, training loss, test loss.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.optimizers = make_optimizers(trial)
        self.losses: list[float] = []
        self.curve: dict[str, list[float]] = {"step": [], "train_loss": [], "test_loss": []}

    def run(self, monitor: Monitor | None) -> None:
        """Every step."""
        trial = self.trial
        trial.model.train()
        for step in range(trial.steps):
            trial.step = step
            if not trial.is_training(step):
                trial.model.eval()
            for act in trial.before_step:
                act(step)
            loss = self._pass(step)
            for act in trial.before_update:
                act(step)
            self._update(step)
            if monitor is not None:
                monitor.step(loss=loss if trial.told else None)
            for act in trial.after_update:
                act(step)
            self.losses.append(float(loss))
            if trial.evaluate and (step + 1) % trial.evaluate == 0:
                self._evaluate(step)

    def _pass(self, step: int) -> Tensor:
        """Forward and backward, in several passes where gradients are added up."""
        trial, total = self.trial, torch.zeros(())
        if trial.zeroes(step):
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        for part in range(trial.passes):
            inputs, targets = trial.batch(step * trial.passes + part if trial.passes > 1 else step)
            with trial.context():
                output = logits_of(trial.model(inputs))
                loss = trial.loss(output, targets, step) / trial.passes
            (loss if trial.scaler is None else trial.scaler.scale(loss)).backward()
            total = total + loss.detach()
        return total

    def _update(self, step: int) -> None:
        trial, factor = self.trial, self.trial.schedule(step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * factor
            if not trial.updates(step):
                continue
            if trial.scaler is None:
                optimizer.step()
            else:
                trial.scaler.step(optimizer)
        if trial.scaler is not None and trial.updates(step):
            trial.scaler.update()

    def _evaluate(self, step: int) -> None:
        trial = self.trial
        seen = self.losses[-trial.evaluate :]
        values = (step, sum(seen) / len(seen), evaluate(trial))
        for column, value in zip(self.curve.values(), values, strict=True):
            column.append(value)


def evaluate(trial: Trial) -> float:
    """Mean loss on four batches of a seed that no training has; the mode is put back."""
    task, losses = trial.architecture.learns, []
    with torch.no_grad(), put_back(trial.model, evaluate=True):
        for index in range(4):
            inputs, targets = task.batch(_UNSEEN, index, trial.samples)
            losses.append(float(trial.loss(logits_of(trial.model(inputs)), targets, 0)))
    return sum(losses) / len(losses)
