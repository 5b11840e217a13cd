"""One training that is about to begin: what faults and recipes change about it."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from resdiag.pathologies.architectures import NORMS, Architecture
from resdiag.pathologies.tasks import Batch
from resdiag.watch.find.blocks import Block

Groups = list[dict[str, Any]]
"""Groups of parameters as optimizers take them."""


@dataclass(eq=False)
class Trial:
    """One training that is about to begin.

    Attributes:
        architecture: What is trained.
        model: The network.
        blocks: Its residual blocks, or its units.
        at: Indices of the blocks that are to be ill.
        onset: Step at which the fault begins.
        strength: The fault's magnitude, in the kind's own unit.
        seed: Of weights and batches.
        optimizer: Name in `resdiag.pathologies.optimizers.OPTIMIZERS`.
        lr: Learning rate.
        decay: Weight decay.
        steps: Steps of the training.
        samples: Samples per step.
        passes: Passes per step whose gradients are added.
        evaluate: Steps between two evaluations on other batches; 0 for none.
        variant: Id of the variant, where the run says it, as those of `resdiag run` do.
        told: Whether the loop tells the monitor its loss.
        is_training: Whether the model is in training mode; a fault can forget that.
        zeroes: Whether gradients are set to zero at a step.
        updates: Whether the optimizer steps at a step.
        schedule: Factor on the learning rate at a step.
        loss: Takes output, targets and step; returns the loss.
        changes: Each takes a batch and the step and returns the batch.
        before_step: Called with the step before its forward pass.
        before_update: Called with the step after its backward pass.
        after_update: Called with the step after the optimizer's.
        context: What the forward pass runs in, such as autocast.
        scaler: A gradient scaler.
        groups: The groups of parameters of each optimizer; None for all that ask for a gradient.
        watch: Arguments of `resdiag.attach`.
        step: The step that runs.
    """

    architecture: Architecture
    model: nn.Module
    blocks: Sequence[Block]
    at: tuple[int, ...]
    onset: int
    strength: float
    seed: int
    optimizer: str
    lr: float
    loss: Callable[[Tensor, Tensor, int], Tensor]
    decay: float = 1e-4
    steps: int = 60
    samples: int = 16
    passes: int = 1
    evaluate: int = 0
    variant: str = ""
    told: bool = True
    is_training: Callable[[int], bool] = lambda step: True
    zeroes: Callable[[int], bool] = lambda step: True
    updates: Callable[[int], bool] = lambda step: True
    schedule: Callable[[int], float] = lambda step: 1.0
    changes: list[Callable[[Batch, int], Batch]] = field(default_factory=list)
    before_step: list[Callable[[int], None]] = field(default_factory=list)
    before_update: list[Callable[[int], None]] = field(default_factory=list)
    after_update: list[Callable[[int], None]] = field(default_factory=list)
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    scaler: torch.amp.GradScaler | None = None
    groups: list[Groups] | None = None
    watch: dict[str, Any] = field(default_factory=dict)
    step: int = 0

    @property
    def has_begun(self) -> bool:
        """Whether the fault acts at the step that runs."""
        return self.step >= self.onset

    @property
    def owners(self) -> list[nn.Module]:
        """The modules of the ill blocks."""
        return [self.model.get_submodule(self.blocks[i].owner) for i in self.at]

    @property
    def branches(self) -> list[nn.Module]:
        """The modules whose outputs are the ill blocks' branches."""
        return [self.model.get_submodule(self.blocks[i].branch_module) for i in self.at]

    @property
    def shortcuts(self) -> list[nn.Module]:
        """The modules whose outputs are the ill blocks' shortcuts."""
        return [shortcut_of(self.model, self.blocks[i]) for i in self.at]

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that ask for a gradient."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def batch(self, step: int) -> Batch:
        """The batch of a step, with every change made to it."""
        batch = self.architecture.learns.batch(self.seed, step, self.samples)
        for change in self.changes:
            batch = change(batch, step)
        return batch

    def on_inputs(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the inputs of every batch from the onset on."""
        self.changes.append(
            lambda batch, step: (change(batch[0]), batch[1]) if step >= self.onset else batch
        )

    def on_targets(self, change: Callable[[Tensor, int], Tensor]) -> None:
        """Change the targets of every batch from the onset on."""
        self.changes.append(
            lambda batch, step: (batch[0], change(batch[1], step)) if step >= self.onset else batch
        )

    def at_onset(self, act: Callable[[], object]) -> None:
        """Do something once, before the forward pass of the step at which the fault begins."""

        def begin(step: int) -> None:
            if step == self.onset:
                act()

        self.before_step.append(begin)


def on_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replace a module's output; of several the first."""

    def hook(_: nn.Module, __: object, out: Any) -> Any:  # noqa: ANN401
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    module.register_forward_hook(hook)


def shortcut_of(model: nn.Module, block: Block) -> nn.Module:
    """The module of a block's identity shortcut; torchvision's ResNets get one."""
    owner = model.get_submodule(block.owner)
    if isinstance(owner, BasicBlock | Bottleneck):
        if owner.downsample is None:
            owner.downsample = nn.Identity()
        made: nn.Module = owner.downsample
        return made
    return model.get_submodule(block.shortcut_module)


def head_of(model: nn.Module) -> nn.Module:
    """The last module with a weight matrix of its own, which makes the outputs."""
    return [m for m in model.modules() if _has_matrix(m)][-1]


def stem_of(model: nn.Module) -> nn.Module:
    """The first module with a weight matrix of its own."""
    return next(m for m in model.modules() if _has_matrix(m))


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() > 1


def norms_in(module: nn.Module) -> list[nn.Module]:
    """The modules inside that normalise, in order."""
    return [
        m for m in module.modules() if isinstance(m, NORMS) or type(m).__name__.endswith("RMSNorm")
    ]


def freeze(parameters: Iterable[nn.Parameter]) -> None:
    """Ask for no gradient any more."""
    for parameter in parameters:
        parameter.requires_grad = False
        parameter.grad = None
