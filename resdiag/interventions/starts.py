"""Where the arms of an intervention start: a run of one of the variants, or any model."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from resdiag.data.augment import Augmenter
from resdiag.data.dataset import ImageData
from resdiag.errors import UsageError
from resdiag.interventions.additions import Lesion, apply
from resdiag.interventions.table import Intervention
from resdiag.models.example import Example, example_batch
from resdiag.models.resnet import Block, ResNet
from resdiag.models.source import Built
from resdiag.models.variants import Variant, find_variant
from resdiag.probe.batch import Loss, choose_loss
from resdiag.runs.checkpoint import Checkpoint, unpack
from resdiag.runs.config import RunConfig
from resdiag.runs.folder import Run
from resdiag.runs.watched_config import WatchedConfig
from resdiag.training import checkpoint as training_checkpoint
from resdiag.training.recipe import learning_rate

_LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
    """A network that is about to be trained for a few steps.

    Attributes:
        model: The network.
        optimizer: Of its parameters.
        units: Names of the modules to record as blocks; None records the residual additions.
        first_step: Steps done before.
        learning_rate: That of a step.
        loss: The loss of the model on the batch of a step, and a digest of the batch.
        config: The run, to whose thresholds the arm is held.
        change_additions: Changes the residual additions; None if they stay. To be called after a
            monitor is attached, so that the monitor sees the changed additions.
    """

    model: nn.Module
    optimizer: SGD
    units: Sequence[str] | None = None
    first_step: int = 0
    learning_rate: Callable[[int], float]
    loss: Callable[[int], tuple[Loss, str]]
    config: WatchedConfig
    change_additions: Callable[[], Lesion] | None = None


class StartingPoint(Protocol):
    """The weights and batches that the control and the changed arms of one seed have in common."""

    def prepare(self, change: Intervention | None = None) -> Arm:
        """The network to train: changed, or without a change the control."""

    def words_for(self, change: Intervention) -> str:
        """What is changed, in words."""


@dataclass(frozen=True, eq=False)
class VariantStart:
    """A start that trains as `resdiag run` does on a CPU in float32.

    Attributes:
        config: The run. With a checkpoint, another seed than the run's is another data order.
        data: Its images.
        checkpoint: Weights and momenta to start from; None is the initialisation.
    """

    config: RunConfig
    data: ImageData
    checkpoint: Checkpoint | None = None

    def prepare(self, change: Intervention | None = None) -> Arm:
        """Build the network with the weights and momenta of the run, changed where it is asked for.

        Raises:
            UsageError: A change of initial weights from a checkpoint.
        """
        config, variant = self.config, change and change.variant
        if change and variant and variant.weights and self.checkpoint:
            raise UsageError(
                f"lesion '{change.name}' changes initial weights, not those of a checkpoint",
                "--from init",
            )
        model, momenta = self._network(change)
        if variant:
            for edit in filter(None, (variant.network, variant.weights)):
                edit(model)
            config = variant.recipe(config) if variant.recipe else config
        model = model.to(memory_format=torch.channels_last)
        first = self.checkpoint.step if self.checkpoint else 0
        batches = Augmenter(
            self.data, config.batch_size, config.seed, config.augment, channels_last=True
        )
        change_additions = None
        if change and not variant:
            change_additions = partial(apply, change, model, batches.batch(first)[0])
        return Arm(
            model=model,
            optimizer=_optimizer(model, config, momenta),
            units=_units_without_shortcut(model),
            first_step=first,
            learning_rate=partial(learning_rate, config),
            loss=partial(self._loss, model, batches),
            # a changed network is held to the thresholds of the variant that it was
            config=WatchedConfig(
                model=config.variant, variant=config.variant, depth=config.depth, lr=config.lr
            ),
            change_additions=change_additions,
        )

    def words_for(self, change: Intervention) -> str:
        """What is changed about a variant."""
        return (change.variant and change.variant.words) or change.words

    def _loss(self, model: nn.Module, batches: Augmenter, step: int) -> tuple[Loss, str]:
        images, labels = batches.batch(step)
        value = F.cross_entropy(model(images), labels)
        loss = Loss(name="cross-entropy", value=value, classes=len(self.data.classes))
        return loss, digest_of([images, labels])

    def _network(self, change: Intervention | None) -> tuple[ResNet, Mapping[Tensor, Tensor]]:
        """The network at its start with the row changed, and the momentum of each parameter."""
        row = find_variant(self.config.variant)
        model = self._build(row)
        momenta = dict[Tensor, Tensor]()
        if self.checkpoint:
            optimizer = _optimizer(model, self.config, {})
            training_checkpoint.unpack(model, optimizer, self.checkpoint.tensors)
            momenta.update((p, state["momentum_buffer"]) for p, state in optimizer.state.items())
        changed = change.changed_row(row) if change else row
        if changed is None or changed == row:
            return model, momenta
        other = self._build(changed)
        return other, _copy_layers(model, other, momenta)

    def _build(self, row: Variant) -> ResNet:
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return ResNet(
                row, config.depth, width=config.width, num_classes=len(self.data.classes),
                stem_bn=config.stem_bn, branch_scale=config.branch_scale,
            )  # fmt: skip


@dataclass(frozen=True, eq=False)
class ModelStart:
    """A start that trains any model on generated batches by SGD with momentum 0.9.

    Attributes:
        built: The model, which stays as it is: arms train copies.
        lr: Learning rate.
        blocks: Indices or names of the blocks to change; None changes all.
        shape: Shape of one sample of the main input; None takes what the model says.
        batch_size: Samples.
        seed: Of batches and labels.
    """

    built: Built
    lr: float
    blocks: Sequence[int | str] | None = None
    shape: Sequence[int] | None = None
    batch_size: int = 8
    seed: int = 0

    def prepare(self, change: Intervention | None = None) -> Arm:
        """Copy the model."""
        model = copy.deepcopy(self.built.model).train()
        return Arm(
            model=model,
            optimizer=SGD(model.parameters(), lr=self.lr, momentum=0.9),
            learning_rate=lambda step: self.lr,
            loss=partial(self._loss, model),
            config=WatchedConfig(model=self.built.name, lr=self.lr),
            change_additions=partial(self.apply, change, model) if change else None,
        )

    def words_for(self, change: Intervention) -> str:
        """What is changed about any model."""
        return change.words

    def example(self, step: int) -> Example:
        """The batch of a step."""
        seed = self._seed_of(step)
        return example_batch(self.built, batch_size=self.batch_size, shape=self.shape, seed=seed)

    def _seed_of(self, step: int) -> int:
        return 1000 * self.seed + step

    def apply(self, change: Intervention, model: nn.Module) -> Lesion:
        """Put a change of additions in force on a copy of the model."""
        example = self.example(0)
        return apply(change, model, *example.args, blocks=self.blocks, **example.kwargs)

    def _loss(self, model: nn.Module, step: int) -> tuple[Loss, str]:
        seed, example = self._seed_of(step), self.example(step)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # dropout
            output = model(*example.args, **example.kwargs)
        return choose_loss(output, example, None, seed=seed), digest_of(example.tensors.values())


def last_checkpoint(run: Run) -> Checkpoint:
    """Weights and momenta of a run's last commit.

    Raises:
        UsageError: It has none, or its weights are not finite.
    """
    names = [n for n in run.commit.files if n.startswith("ckpt-")] if run.commit else []
    if run.commit is None or not names:
        raise UsageError(f"{run.path} has no checkpoint", "--from init starts from scratch")
    tensors = unpack(run.commit.read_file(run.path, names[0]), run.path / names[0])
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point()):
        raise UsageError(
            f"the checkpoint at step {run.commit.step} of {run.path} is not finite",
            "--from init starts from scratch",
        )
    return Checkpoint(step=run.commit.step, tensors=tensors, state={})


def digest_of(batch: Iterable[Tensor]) -> str:
    """SHA-256 of the tensors of a batch."""
    parts = (value.detach().cpu().contiguous().numpy().tobytes() for value in batch)
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _units_without_shortcut(model: ResNet) -> list[str] | None:
    """Names of the units of a plain network: it has no additions to be found by."""
    units = {name: m for name, m in model.named_modules() if isinstance(m, Block)}
    return None if any(m.shortcut is not None for m in units.values()) else list(units)


def _optimizer(model: ResNet, config: RunConfig, momenta: Mapping[Tensor, Tensor]) -> SGD:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = SGD(
        trained,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov and config.momentum > 0,
        weight_decay=config.weight_decay,
    )
    for parameter in (p for p in trained if p in momenta):
        # the parameter's own memory format: another one would round differently
        buffer = torch.empty_like(parameter).copy_(momenta[parameter])
        optimizer.state[parameter]["momentum_buffer"] = buffer
    return optimizer


def _copy_layers(
    model: ResNet, other: ResNet, momenta: Mapping[Tensor, Tensor]
) -> dict[Tensor, Tensor]:
    """Copy the layers of a kind in order, where both networks have equally many of it.

    Returns:
        The momentum of each parameter of `other` that was copied.
    """
    kept = dict[Tensor, Tensor]()
    for kind in _LAYERS:
        mine = [m for m in model.modules() if isinstance(m, kind)]
        its = [m for m in other.modules() if isinstance(m, kind)]
        if len(mine) != len(its):
            continue
        for old, new in zip(mine, its, strict=True):
            new.load_state_dict(old.state_dict())
            pairs = zip(old.parameters(), new.parameters(), strict=True)
            kept |= {after: momenta[before] for before, after in pairs if before in momenta}
    return kept
