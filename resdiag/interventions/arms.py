"""Train one arm of an intervention, changed or not, and say what came of it."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from resdiag.diagnose.rundata import RunData
from resdiag.diagnose.verdict import judge
from resdiag.interventions.starts import Arm
from resdiag.runs.folder import Run
from resdiag.runs.watched import as_run
from resdiag.watch.loop.attach import attach

DEAD = 1e3
"""A loss above this many times max(first loss, 1) counts as dead, like a non-finite one."""


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """What came of a few steps of training.

    Attributes:
        growth: Growth of E[H^2] per block at its first step.
        skip_gain: P3 at the last block at its first step.
        skip_gain_end: The same at its last recorded step.
        losses: Loss of each step; ends with the one that died.
        survived: Whether no loss was non-finite or beyond `DEAD`.
        findings: Names of the rules of `resdiag.judge` that fired.
        batches: SHA-256 of the batch of each step.
    """

    growth: float
    skip_gain: float
    skip_gain_end: float
    losses: tuple[float, ...]
    survived: bool
    findings: tuple[str, ...]
    batches: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Its numbers."""
        return {
            "growth_per_block": self.growth, "skip_gain": self.skip_gain,
            "skip_gain_end": self.skip_gain_end, "loss_0": self.losses[0],
            "loss": self.losses[-1], "steps": len(self.losses), "survived": self.survived,
            "findings": list(self.findings),
        }  # fmt: skip


def train_arm(arm: Arm, steps: int = 10) -> ArmResult:
    """Train an arm; its model keeps the weights of the last step, without changed additions.

    Args:
        arm: See `StartingPoint.prepare`.
        steps: At most; training ends when it dies.
    """
    losses, batches, classes = list[float](), list[str](), 0
    with attach(arm.model, blocks=arm.units, every=max(1, steps - 1), record_first=1) as monitor:
        lesion = arm.change_additions() if arm.change_additions else None
        if lesion and lesion.parameters:
            arm.optimizer.add_param_group({"params": lesion.parameters})
        with lesion or nullcontext():
            for step in range(arm.first_step, arm.first_step + steps):
                for group in arm.optimizer.param_groups:
                    group["lr"] = arm.learning_rate(step)
                loss, batch = arm.loss(step)
                classes = loss.classes
                arm.optimizer.zero_grad()
                torch.autograd.backward(loss.value)
                arm.optimizer.step()
                monitor.step()
                losses.append(float(loss.value.detach()))
                batches.append(batch)
                if is_dead(losses):
                    break
    config = replace(arm.config, steps=len(losses))
    run = as_run(monitor, config=config, classes=classes or None, curve={"loss": losses})
    return _summarise(run, losses, batches)


def is_dead(losses: Sequence[float]) -> bool:
    """Whether the last loss is non-finite or beyond `DEAD`."""
    return not (math.isfinite(losses[-1]) and losses[-1] <= DEAD * max(losses[0], 1.0))


def _summarise(run: Run, losses: Sequence[float], batches: Sequence[str]) -> ArmResult:
    data = RunData(run)
    block, end = max(data.indices, default=0), max(data.steps, default=0)
    return ArmResult(
        growth=data.growth_per_block(0),
        skip_gain=data.value("skip_gain", 0, block),
        skip_gain_end=data.value("skip_gain", end, block),
        losses=tuple(losses),
        survived=not is_dead(losses),
        findings=tuple(finding.name for finding in judge(run).findings),
        batches=tuple(batches),
    )
