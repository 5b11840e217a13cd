"""One arm of a lesion: a few steps of one of the variants, changed or not, from a known start."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from resdiag.data.augment import Augmenter
from resdiag.data.dataset import ImageData
from resdiag.diagnose.rundata import RunData
from resdiag.diagnose.verdict import judge
from resdiag.errors import UsageError
from resdiag.interventions.lesions import Lesion, blocks_of
from resdiag.models.resnet import ResNet, build_model
from resdiag.models.variants import Variant, find_variant
from resdiag.runs.config import RunConfig
from resdiag.runs.folder import Run
from resdiag.runs.watched import WatchedConfig, as_run
from resdiag.training import checkpoint
from resdiag.training.recipe import learning_rate
from resdiag.watch.loop.attach import attach

BLOWN = 1e3
"""A loss above this many times max(first loss, 1) counts as dead, like a non-finite one."""

_LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)


@dataclass(frozen=True, kw_only=True)
class Start:
    """A checkpoint to start both arms from.

    Attributes:
        step: Optimizer steps done.
        tensors: Weights and momenta, as `resdiag.training.checkpoint` packs them.
    """

    step: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One short training.

    Attributes:
        growth: Growth of E[H^2] per block at its first step.
        skip_gain: P3 at the last block at its first step.
        skip_gain_end: The same at its last recorded step.
        losses: Loss of each step; ends with the one that died.
        survived: Whether no loss was non-finite or beyond `BLOWN`.
        findings: Names of the rules of `resdiag.judge` that fired.
        batches: SHA-256 of all batches that were seen.
        weights: The parameters and buffers at the end.
    """

    growth: float
    skip_gain: float
    skip_gain_end: float
    losses: tuple[float, ...]
    survived: bool
    findings: tuple[str, ...]
    batches: tuple[str, ...]
    weights: Mapping[str, Tensor]

    def to_dict(self) -> dict[str, object]:
        """Its numbers."""
        return {
            "growth_per_block": self.growth, "skip_gain": self.skip_gain,
            "skip_gain_end": self.skip_gain_end, "loss_0": self.losses[0],
            "loss": self.losses[-1], "steps": len(self.losses), "survived": self.survived,
            "findings": list(self.findings),
        }  # fmt: skip

    @classmethod
    def of(
        cls, run: Run, losses: Sequence[float], batches: Sequence[str], weights: dict[str, Tensor]
    ) -> "Arm":
        """What came of a recorded run.

        Args:
            run: It, with its first and last steps recorded.
            losses: Of each step, up to the one that ended it.
            batches: A digest of each batch.
            weights: After the last step.
        """
        observed = RunData(run)
        block, end = max(observed.indices, default=0), max(observed.steps, default=0)
        return cls(
            growth=observed.growth_per_block(0),
            skip_gain=observed.value("skip_gain", 0, block),
            skip_gain_end=observed.value("skip_gain", end, block),
            losses=tuple(losses),
            survived=not is_dead(losses),
            findings=tuple(finding.name for finding in judge(run).findings),
            batches=tuple(batches),
            weights=weights,
        )


def last_checkpoint(run: Run) -> Start:
    """The checkpoint of a run's last commit.

    Raises:
        UsageError: It has none, or its weights are not finite.
    """
    names = [n for n in run.commit.files if n.startswith("ckpt-")] if run.commit else []
    if run.commit is None or not names:
        raise UsageError(f"{run.path} has no checkpoint", "--from init starts from scratch")
    from resdiag.runs.checkpoint import unpack

    data = run.commit.read_file(run.path, names[0])
    tensors = unpack(data, run.path / names[0])
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point()):
        raise UsageError(
            f"the checkpoint at step {run.commit.step} of {run.path} is not finite: too late",
            "--from init starts from scratch",
        )
    return Start(step=run.commit.step, tensors=tensors)


def run_arm(
    config: RunConfig,
    data: ImageData,
    lesion: Lesion | None = None,
    *,
    steps: int = 10,
    start: Start | None = None,
) -> Arm:
    """Train one arm as `resdiag run` would on a CPU in float32; no lesion is the control.

    Args:
        config: Of the run. With a checkpoint, another seed than the run's is another data order.
        data: Its images.
        lesion: What to change.
        steps: At most; an arm ends when it dies.
        start: A checkpoint; None is the initialisation.

    Raises:
        UsageError: An initialisation cannot be changed after training.
    """
    if start and lesion and lesion.initial:
        raise UsageError(f"{lesion.words} says nothing of trained weights", "--from init")
    model, rule = _prepare(config, data, lesion, start)
    config = lesion.config(config) if lesion else config
    batches = Augmenter(data, config.batch_size, config.seed, config.augment, channels_last=True)
    first = start.step if start else 0
    losses, seen = list[float](), list[str]()
    units = None if blocks_of(model)[0].shortcut is not None else _unit_names(model)
    with attach(model, blocks=units, every=max(1, steps - 1), record_first=1) as monitor:
        for step in range(first, first + steps):
            for group in rule.param_groups:
                group["lr"] = learning_rate(config, step)
            images, labels = batches.batch(step)
            seen.append(_digest(images, labels))
            rule.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            torch.autograd.backward(loss)
            losses.append(float(loss.detach()))
            rule.step()
            monitor.step()
            if is_dead(losses):
                break
        # a changed network is judged by the thresholds of the variant that it was
        about = WatchedConfig(
            model=config.variant, variant=config.variant, depth=config.depth, lr=config.lr,
            steps=len(losses),
        )  # fmt: skip
        run = as_run(monitor, config=about, classes=len(data.classes), curve={"loss": losses})
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return Arm.of(run, losses, seen, weights)


def is_dead(losses: Sequence[float]) -> bool:
    """Whether the last loss is non-finite or beyond `BLOWN`."""
    return not (math.isfinite(losses[-1]) and losses[-1] <= BLOWN * max(losses[0], 1.0))


def _digest(images: Tensor, labels: Tensor) -> str:
    return hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()


def _unit_names(model: ResNet) -> list[str]:
    units = {id(block) for block in blocks_of(model)}
    return [name for name, module in model.named_modules() if id(module) in units]


def _prepare(
    config: RunConfig, data: ImageData, lesion: Lesion | None, start: Start | None
) -> tuple[ResNet, SGD]:
    """The run's own weights and momenta, in the changed network where there is one."""
    row = find_variant(config.variant)
    model = build_model(
        config.variant, config.depth, width=config.width, num_classes=len(data.classes),
        stem_bn=config.stem_bn, seed=config.seed,
    )  # fmt: skip
    rule = _optimizer(model, config)
    if start:
        checkpoint.unpack(model, rule, start.tensors)
    momenta = dict[Tensor, Tensor]()
    momenta.update((p, state["momentum_buffer"]) for p, state in rule.state.items())
    changed = lesion.row(row) if lesion else row
    if changed is not None and changed != row:
        other = _other(changed, config, data)
        momenta = _transplant(model, other, momenta)
        model = other
    if lesion:
        lesion.model(model)
    layout: dict[str, Any] = {"memory_format": torch.channels_last}
    model = model.to("cpu", **layout)
    rule = _optimizer(model, config)
    for parameter in (p for p in model.parameters() if p in momenta and p.requires_grad):
        buffer = torch.empty_like(parameter).copy_(momenta[parameter])
        rule.state[parameter]["momentum_buffer"] = buffer
    return model, rule


def _optimizer(model: ResNet, config: RunConfig) -> SGD:
    return SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov and config.momentum > 0,
        weight_decay=config.weight_decay,
    )


def _other(row: Variant, config: RunConfig, data: ImageData) -> ResNet:
    """The changed network; what it has not in common with the old one is initialised afresh."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return ResNet(
            row, config.depth, width=config.width, num_classes=len(data.classes),
            stem_bn=config.stem_bn,
        )  # fmt: skip


def _transplant(
    model: ResNet, other: ResNet, momenta: Mapping[Tensor, Tensor]
) -> dict[Tensor, Tensor]:
    """Copy layer by layer, kind by kind; a kind that the two have not equally often stays fresh."""
    kept = dict[Tensor, Tensor]()
    for kind in _LAYERS:
        mine = [m for m in model.modules() if isinstance(m, kind)]
        its = [m for m in other.modules() if isinstance(m, kind)]
        if len(mine) != len(its):
            continue
        for old, new in zip(mine, its, strict=True):
            new.load_state_dict(old.state_dict())
            for before, after in zip(old.parameters(), new.parameters(), strict=True):
                if before in momenta:
                    kept[after] = momenta[before]
    return kept


def other_seeds(config: RunConfig, seeds: int) -> list[RunConfig]:
    """The config and as many seeds above it, on the CPU."""
    return [replace(config, seed=config.seed + i, device="cpu") for i in range(seeds)]
