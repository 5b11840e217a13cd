"""Examine a recorded run: its network, optimizer and batch as they were at its last commit."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from resdiag.data.augment import Augmenter
from resdiag.data.dataset import ImageData
from resdiag.errors import UsageError
from resdiag.interventions.starts import VariantStart, last_checkpoint
from resdiag.probe.examination import Examination
from resdiag.probe.examine import examine
from resdiag.runs.checkpoint import Checkpoint
from resdiag.runs.config import RunConfig
from resdiag.runs.folder import Run

if TYPE_CHECKING:
    from torch import Tensor

IMAGES = 32
"""Images of the run's batch that are taken at most; two per class, if that is more."""


def check_examinable(run: Run) -> RunConfig:
    """The configuration of a run that can be built again.

    Raises:
        UsageError: It is of another model than one of the variants.
    """
    if not isinstance(run.config, RunConfig):
        raise UsageError(
            f"{run.path} is a run of {run.config.model}, which its record does not build again",
            "in Python: print(resdiag.examine(model, batch, optimizer=optimizer))",
        )
    return run.config


def examine_run(
    run: Run,
    data: ImageData,
    *,
    start: str = "",
    steps: int = 60,
    progress: bool | None = None,
) -> Examination:
    """Examine a run on the batch of its next step, as it trains on a CPU in float32.

    Args:
        run: Of one of the variants.
        data: Its images.
        start: "init", "checkpoint", or "" for the last checkpoint if there is a finite one.
        steps: Updates on the batch at most.
        progress: See `resdiag.examine`.

    Raises:
        UsageError: The run is of another model, or has no checkpoint to start from.
    """
    config = replace(check_examinable(run), device="cpu")
    checkpoint, note = _find_start(run, start)
    arm = VariantStart(config, data, checkpoint).prepare()
    first, rate = arm.first_step, arm.learning_rate(arm.first_step)
    images, labels = _batch(config, data, first)
    if not rate > 0:
        raise UsageError(f"the run's learning rate at step {first} is {rate:g}: nothing is learned")
    for group in arm.optimizer.param_groups:
        group["lr"] = rate
    arm.model.train()
    found = examine(
        arm.model, (images, labels), optimizer=arm.optimizer, steps=steps, seed=config.seed,
        progress=progress,
    )  # fmt: skip
    size = f"{len(labels)} of {config.batch_size}" if len(labels) < config.batch_size else "all"
    return replace(found, notes=(f"{note}; {size} images of its batch", *found.notes))


def _find_start(run: Run, start: str) -> tuple[Checkpoint | None, str]:
    """The checkpoint to start from, and what it is in words."""
    if start == "init":
        return None, "the run at its initialisation"
    try:
        checkpoint = last_checkpoint(run)
    except UsageError as error:
        if start:
            raise
        return None, f"the run at its initialisation: {error.message}"
    return checkpoint, f"the run at step {checkpoint.step}"


def _batch(config: RunConfig, data: ImageData, step: int) -> "tuple[Tensor, Tensor]":
    """The first images of the batch of a step."""
    batches = Augmenter(data, config.batch_size, config.seed, config.augment, channels_last=True)
    images, labels = batches.batch(step)
    few = max(IMAGES, 2 * len(data.classes))
    return images[:few].contiguous(memory_format=torch.channels_last), labels[:few]
