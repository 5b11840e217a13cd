"""Lesions of any model tried: a few steps with and without, from the same weights and batches."""

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from resdiag.diagnose.registry import FINDINGS, HEALTHY
from resdiag.errors import UsageError, unknown
from resdiag.interventions.arm import Arm, is_dead
from resdiag.interventions.effect import Effect
from resdiag.interventions.surgery import CUTS, find_sites, lesion
from resdiag.models.example import Example, example_batch
from resdiag.models.source import build_source
from resdiag.probe.probe import choose_loss, load_weights
from resdiag.runs.watched import WatchedConfig, as_run
from resdiag.watch.loop.attach import attach


def try_on_model(
    model: str,
    names: Sequence[str] = (),
    arguments: Mapping[str, Any] | None = None,
    *,
    blocks: Sequence[int | str] | None = None,
    shape: Sequence[int] | None = None,
    batch_size: int = 8,
    weights: Path | None = None,
    lr: float = 0.01,
    claim: str = "",
    seeds: int = 3,
    steps: int = 5,
) -> list[Effect]:
    """Train a control and an arm per lesion on generated batches with random labels.

    Args:
        model: See `resdiag.models.source`.
        names: Of `resdiag.interventions.surgery.CUTS`; none takes all that the model can have.
        arguments: Of its factory or configuration.
        blocks: Indices or names of the blocks to change; None changes all.
        shape: Shape of one sample of the main input.
        batch_size: Samples.
        weights: A state_dict to start from; None is the initialisation of each seed.
        lr: Of plain SGD with momentum 0.9.
        claim: The finding to be cured, see `Effect`.
        seeds: How many: initialisations, or with weights batches.
        steps: Of each arm.

    Raises:
        UsageError: The model, a lesion or a block is unknown, or cannot be had.
    """
    for name in names:
        if name not in CUTS:
            raise unknown("lesion", name, CUTS)
    if not 0 < lr < math.inf:
        raise UsageError(f"--lr {lr} must be positive")
    if claim and claim not in (*FINDINGS, HEALTHY):
        raise unknown("finding", claim, (*FINDINGS, HEALTHY))
    starts = [
        _Start(model, dict(arguments or {}), weights, shape, batch_size, seed)
        for seed in range(seeds)
    ]
    chosen = list(names) or _possible(starts[0], blocks)
    control = tuple(start.run("", blocks, lr, steps) for start in starts)
    return [
        Effect(
            name=name,
            words=CUTS[name].words,
            claim=claim,
            control=control,
            changed=tuple(start.run(name, blocks, lr, steps) for start in starts),
        )
        for name in chosen
    ]


def _possible(start: "_Start", blocks: Sequence[int | str] | None) -> list[str]:
    """The lesions that the chosen blocks can have."""
    found = list[str]()
    for name in CUTS:
        try:
            start.lesion(start.model, name, blocks).remove()
        except UsageError:
            continue
        found.append(name)
    if not found:
        start.lesion(start.model, "drop_block", blocks).remove()  # says why
    return found


class _Start:
    """Weights and batches that both arms of one seed have in common."""

    def __init__(
        self,
        name: str,
        arguments: dict[str, Any],
        weights: Path | None,
        shape: Sequence[int] | None,
        batch_size: int,
        seed: int,
    ) -> None:
        self.name, self.seed = name, seed
        self._built = build_source(name, arguments, seed=0 if weights else seed)
        self._shape, self._batch_size = shape, batch_size
        if weights:
            load_weights(self._built.model, weights)

    @property
    def model(self) -> nn.Module:
        """The model at its start, which is not trained: arms train copies."""
        return self._built.model

    def batch(self, step: int) -> tuple[Example, int]:
        """The batch of one step, and the seed of its labels."""
        seed = 1000 * self.seed + step
        size = self._batch_size
        return example_batch(self._built, batch_size=size, shape=self._shape, seed=seed), seed

    def lesion(self, model: nn.Module, name: str, blocks: Sequence[int | str] | None) -> Any:  # noqa: ANN401
        """The lesion in force on a copy of the model."""
        example, _ = self.batch(0)
        return lesion(model, name, *example.args, blocks=blocks, **example.kwargs)

    def run(self, name: str, blocks: Sequence[int | str] | None, lr: float, steps: int) -> Arm:
        """Train one arm."""
        model = copy.deepcopy(self.model).train()
        if not name:
            self._check(model)
        losses, seen = list[float](), list[str]()
        classes = 0
        # the monitor first: it then sees the changed additions
        with attach(model, every=max(1, steps - 1), record_first=1) as monitor:
            cut = self.lesion(model, name, blocks) if name else None
            learned = list(cut.parameters) if cut else []
            rule = SGD([*model.parameters(), *learned], lr=lr, momentum=0.9)
            for step in range(steps):
                example, seed = self.batch(step)
                seen.append(_digest(example))
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)  # dropout
                    output = model(*example.args, **example.kwargs)
                loss = choose_loss(output, example, None, seed=seed)
                classes = loss.classes
                rule.zero_grad()
                loss.value.backward()
                losses.append(float(loss.value.detach()))
                rule.step()
                monitor.step()
                if is_dead(losses):
                    break
            if cut:
                cut.remove()
        config = WatchedConfig(model=self.name, lr=lr, steps=len(losses))
        run = as_run(monitor, config=config, classes=classes or None, curve={"loss": losses})
        return Arm.of(run, losses, seen, {})

    def _check(self, model: nn.Module) -> None:
        example, _ = self.batch(0)
        blocks, _ = find_sites(model, *example.args, **example.kwargs)
        if not blocks:
            raise UsageError(f"{self.name} has no residual addition")


def _digest(example: Example) -> str:
    seal = hashlib.sha256()
    for name, value in example.tensors.items():
        seal.update(name.encode())
        seal.update(_bytes(value))
    return seal.hexdigest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().numpy().tobytes()
