"""Healthy ways to train: schedules, precisions, fine-tuning, adapters; none has a fault."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resdiag.pathologies.block_faults import replace_modules
from resdiag.pathologies.layers import DropPath, Unit, Words
from resdiag.pathologies.train import train_unwatched
from resdiag.pathologies.trial import Trial, freeze, head_of, norms_in

_BEFORE = 40
"""Steps of a training before, where one is fine-tuned."""


@dataclass(frozen=True)
class Recipe:
    """One healthy way to train.

    Attributes:
        name: What it is called in tables.
        prepare: Changes a trial before it begins.
        needs: What the architecture has, as of a `Kind`.
        optimizer: The optimizer it is about; "" for any.
        told: Whether the loss is told in any case.
    """

    name: str
    prepare: Callable[[Trial], None]
    needs: tuple[str, ...] = ()
    optimizer: str = ""
    told: bool = False


def nothing(trial: Trial) -> None:
    """A constant rate, and nothing special."""


def _schedule(factor: Callable[[float], float]) -> Callable[[Trial], None]:
    """A factor on the rate as a function of the share of the training that is done."""

    def prepare(trial: Trial) -> None:
        trial.schedule = lambda step: factor((step + 1) / trial.steps)

    return prepare


def accumulate(trial: Trial) -> None:
    """Each step adds up the gradients of two passes."""
    trial.passes = 2


def clip(trial: Trial) -> None:
    """Gradients are clipped to a norm of 1."""
    trial.before_update.append(
        lambda step: (torch.nn.utils.clip_grad_norm_(trial.model.parameters(), 1.0), None)[1]
    )


def bfloat16(trial: Trial) -> None:
    """Forward passes under autocast."""
    trial.context = lambda: torch.autocast("cpu", torch.bfloat16)


def float64(trial: Trial) -> None:
    """Everything in double precision."""
    trial.model.double()
    trial.changes.append(
        lambda b, step: (b[0].double() if b[0].is_floating_point() else b[0], b[1])
    )


def scale_gradients(trial: Trial) -> None:
    """A gradient scaler that has nothing to skip."""
    trial.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


def train_before(trial: Trial) -> None:
    """The model has been trained already, on batches of another seed."""
    before = copy.copy(trial)
    before.steps, before.seed = _BEFORE, trial.seed + 500
    before.changes, before.before_step, before.before_update = [], [], []
    train_unwatched(before)


def fine_tune(trial: Trial) -> None:
    """A trained model, a hundredth of the rate."""
    train_before(trial)
    trial.lr /= 100


def fine_tune_gently(trial: Trial) -> None:
    """A trained model under AdamW at 1e-5."""
    train_before(trial)
    trial.lr = 1e-5


def freeze_statistics(trial: Trial) -> None:
    """A trained model whose BatchNorms keep their statistics."""
    train_before(trial)
    trial.lr /= 10

    def act(step: int) -> None:
        for module in trial.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    trial.before_step.append(act)


def probe_linearly(trial: Trial) -> None:
    """A trained model of which a new head alone is trained."""
    train_before(trial)
    head = head_of(trial.model)
    freeze(trial.model.parameters())
    for parameter in head.parameters():
        parameter.requires_grad = True
    assert isinstance(head, nn.Linear)
    head.reset_parameters()


class LoRA(nn.Module):
    """A frozen linear map plus a learned one of rank 4 that begins at 0 (Hu et al. 2021)."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.frozen = frozen
        freeze(frozen.parameters())
        self.down = nn.Parameter(torch.randn(4, frozen.in_features) / frozen.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(frozen.out_features, 4))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        y: Tensor = self.frozen(x)
        return y + F.linear(F.linear(x, self.down), self.up)


def adapt(trial: Trial) -> None:
    """A trained model, frozen but for its head, with LoRA on the linear maps of its blocks."""
    train_before(trial)
    head = [id(p) for p in head_of(trial.model).parameters()]
    freeze(p for p in trial.model.parameters() if id(p) not in head)
    for block in trial.blocks:
        replace_modules(
            trial.model.get_submodule(block.owner),
            # a subclass is read by its owner, such as the output of MultiheadAttention
            lambda m: LoRA(m) if type(m) is nn.Linear else None,
        )


def freeze_first_half(trial: Trial) -> None:
    """Everything before the second half of a trained model's blocks is frozen."""
    train_before(trial)
    half = trial.blocks[len(trial.blocks) // 2]
    first = next(trial.model.get_submodule(half.owner).parameters())
    freeze(itertools.takewhile(lambda p: p is not first, trial.model.parameters()))


def freeze_words(trial: Trial) -> None:
    """The embedding is not trained."""
    for module in trial.model.modules():
        if isinstance(module, Words):
            freeze(module.table.parameters())


def smooth_labels(trial: Trial) -> None:
    """A tenth of each label is spread over the classes."""
    trial.loss = lambda out, y, step: F.cross_entropy(
        out.float().reshape(-1, out.shape[-1]), y.reshape(-1), label_smoothing=0.1
    )


def mix_up(trial: Trial) -> None:
    """Inputs and labels of pairs are mixed (Zhang et al. 2018)."""
    share, plain = 0.8, trial.loss
    trial.changes.append(lambda b, step: (share * b[0] + (1 - share) * b[0].flip(0), b[1]))
    trial.loss = lambda out, y, step: (
        share * plain(out, y, step) + (1 - share) * plain(out, y.flip(0), step)
    )


def drop_paths(trial: Trial) -> None:
    """Stochastic depth with probability 0.1."""
    for module in trial.model.modules():
        if isinstance(module, Unit):
            module.branch = nn.Sequential(module.branch, DropPath(0.1))


def average_weights(trial: Trial) -> None:
    """An exponential average of the weights beside the training."""
    average = copy.deepcopy(trial.model)

    def act(step: int) -> None:
        with torch.no_grad():
            for mean, now in zip(average.parameters(), trial.model.parameters(), strict=True):
                mean.lerp_(now, 0.05)

    trial.after_update.append(act)


def _halves(trial: Trial) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    parameters = trial.trained
    return parameters[::2], parameters[1::2]


def two_optimizers(trial: Trial) -> None:
    """Every second parameter belongs to a second optimizer."""
    trial.groups = [[{"params": half}] for half in _halves(trial)]


def two_groups(trial: Trial) -> None:
    """The head learns at the rate, everything else at a tenth of it."""
    head = {id(p) for p in head_of(trial.model).parameters()}
    body = [p for p in trial.trained if id(p) not in head]
    fast = [p for p in trial.trained if id(p) in head]
    trial.groups = [[{"params": fast}, {"params": body, "lr": trial.lr / 10}]]


def no_decay_on_vectors(trial: Trial) -> None:
    """Weight decay on weight matrices only."""
    vectors = {id(p) for p in trial.trained if p.dim() < 2}
    trial.groups = [
        [
            {"params": [p for p in trial.trained if id(p) not in vectors]},
            {"params": [p for p in trial.trained if id(p) in vectors], "weight_decay": 0.0},
        ]
    ]


def zero_head(trial: Trial) -> None:
    """The head begins at zero."""
    for parameter in head_of(trial.model).parameters():
        nn.init.zeros_(parameter)


def zero_last_gains(trial: Trial) -> None:
    """The last BatchNorm of each branch begins with a gain of zero (Goyal et al. 2017)."""
    trial.steps = 120  # the branches need some to begin
    for block in trial.blocks:
        last = norms_in(trial.model.get_submodule(block.branch_module))[-1:]
        for norm in last:
            assert isinstance(norm.weight, nn.Parameter)
            nn.init.zeros_(norm.weight)


def sum_of_losses(trial: Trial) -> None:
    """The loss is a sum over the labels, the rate is divided by their number."""
    count = trial.batch(0)[1].numel()
    plain = trial.loss
    trial.loss = lambda out, y, step: plain(out, y, step) * count
    trial.lr /= count


def evaluate_often(trial: Trial) -> None:
    """Every six steps an evaluation on other batches, in evaluation mode."""
    trial.evaluate = 6


def evaluate_long(trial: Trial) -> None:
    """Twice as many steps, ten evaluations."""
    trial.steps, trial.evaluate = 120, 12


def recompute(trial: Trial) -> None:
    """Activations of units are computed again in the backward pass."""
    for unit in _units(trial):
        forward = unit.forward

        def again(x: Tensor, inner: Callable[[Tensor], Tensor] = forward) -> Tensor:
            y: Tensor = checkpoint(inner, x, use_reentrant=False)
            return y

        unit.forward = again  # type: ignore[method-assign]


def _units(trial: Trial) -> Iterator[Unit]:
    return (m for m in trial.model.modules() if isinstance(m, Unit))


def _watch(**options: object) -> Callable[[Trial], None]:
    return lambda trial: trial.watch.update(options)


def _warm_up(done: float) -> float:
    return min(1.0, 5 * done)


RECIPES = (
    Recipe("SGD", nothing, ("sgd",), "sgd"),
    Recipe("SGD without momentum", nothing, ("sgd",), "sgd without momentum"),
    Recipe("Adam", nothing, (), "adam"),
    Recipe("AdamW", nothing, (), "adamw"),
    Recipe("RMSprop", nothing, (), "rmsprop"),
    Recipe("Lion", nothing, (), "lion"),
    Recipe("cosine", _schedule(lambda done: (1 + math.cos(math.pi * done)) / 2)),
    Recipe("warm-up", _schedule(_warm_up)),
    Recipe("one cycle", _schedule(lambda done: 1 - abs(2 * done - 1) + 0.02)),
    Recipe("step decay", _schedule(lambda done: 1.0 if done < 0.5 else 0.1)),
    Recipe("two passes per step", accumulate),
    Recipe("clipped to norm 1", clip),
    Recipe("bfloat16 autocast", bfloat16),
    Recipe("float64", float64),
    Recipe("gradient scaler", scale_gradients),
    Recipe("fine-tuning", fine_tune),
    Recipe("fine-tuning at 1e-5", fine_tune_gently, (), "adamw"),
    Recipe("fine-tuning, BatchNorm frozen", freeze_statistics, ("batchnorm",)),
    Recipe("linear probe", probe_linearly, ("classes", "no next word", "no pairs")),
    Recipe("LoRA", adapt, ("linear in blocks",)),
    Recipe("first half frozen", freeze_first_half, ("residual", "no tied")),
    Recipe("embedding frozen", freeze_words, ("tokens", "no next word")),
    Recipe("label smoothing", smooth_labels, ("classes", "no masked words", "no pairs")),
    Recipe("mixup", mix_up, ("image", "classes", "no pairs")),
    Recipe("stochastic depth", drop_paths, ("join",)),
    Recipe("average of weights", average_weights),
    Recipe("two optimizers", two_optimizers),
    Recipe("two rates", two_groups),
    Recipe("no decay on vectors", no_decay_on_vectors, (), "adamw"),
    Recipe("head begins at zero", zero_head, ("classes", "no pairs", "no tied")),
    Recipe("last gains begin at zero", zero_last_gains, ("batchnorm", "residual", "shortcut")),
    Recipe("sum of losses", sum_of_losses, ("sgd", "no pairs", "no masked words"), "sgd"),
    Recipe("frequent evaluation", evaluate_often, ("no pairs",)),
    Recipe("long, with evaluations", evaluate_long, ("no pairs",), told=True),
    Recipe("activations recomputed", recompute, ("join",)),
    Recipe("every fifth step recorded", _watch(every=5)),
    Recipe("core metrics", _watch(metrics="core")),
    Recipe("whole batch sampled", _watch(samples=None)),
)
"""Every healthy way to train."""
