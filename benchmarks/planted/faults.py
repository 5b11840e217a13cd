"""The faults that are planted in trainings, each with the finding that names it.

A fault changes the trial before it begins: the model, its batches, its loss or its optimizer.
"""

import math
from collections.abc import Callable

import torch
from planted.networks import Batch, draw, loss_of
from planted.trial import Fault, Trial
from torch import Tensor, nn

from resdiag.models.resnet import Block as OurBlock

_OURS = ("original", "elu", "relu_pre", "no_relu")
_RESIDUAL = (*_OURS, "residual", "vit", "gpt2", "bottlenecks", "convnext", "llama")
_IDENTITY = (*_OURS, "residual", "bottlenecks")  # whose shortcut is a module of its own
_AFTER = (*_OURS, "residual")
_RELU = ("original", "relu_pre", "no_relu", "residual", "bottlenecks")
_CURVED = ("elu", "residual", "plain")
_BARE = ("bare-residual",)
_CLIPPED = (*_OURS, "residual-mlp", "bottlenecks", "plain")
_DECAYED = (*_OURS, "residual", "bottlenecks", "plain")
_IMAGES = (*_OURS, "residual", "vit", "bottlenecks", "convnext", "plain-bn")


def _scale(factor: float) -> Callable[[Trial], None]:
    return lambda trial: trial.on_output(trial.branch, lambda x: x * (factor * trial.strength))


def _branch(change: Callable[[Tensor], Tensor]) -> Callable[[Trial], None]:
    return lambda trial: trial.on_output(trial.branch, change)


def _nan_later(trial: Trial) -> None:
    def change(x: Tensor) -> Tensor:
        broken = torch.zeros_like(x)  # added always: the pass stays the same
        broken[0] = math.nan if trial.step == 9 else 0.0
        return x + broken

    trial.on_output(trial.branch, change)


def _infinite_weight(trial: Trial) -> None:
    last = [m for m in trial.branch.modules() if getattr(m, "weight", None) is not None][-1]
    with torch.no_grad():
        last.weight.view(-1)[0] = math.inf  # type: ignore[operator]


def _remove_norms(trial: Trial) -> None:
    """Every block of one stage loses its normalisations."""
    stage = trial.blocks[trial.at].stage
    trial.at = min(b.index for b in trial.blocks if b.stage == stage)
    for block in (b for b in trial.blocks if b.stage == stage):
        _without_norms(trial.model.get_submodule(block.owner))


def _remove_norm(trial: Trial) -> None:
    _without_norms(trial.owner)


def _without_norms(module: nn.Module) -> None:
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
                setattr(parent, name, nn.Identity())


def _rescale_weights(factor: float) -> Callable[[Trial], None]:
    def plant(trial: Trial) -> None:
        with torch.no_grad():
            for parameter in trial.model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(factor * trial.strength)

    return plant


def _dead(trial: Trial) -> None:
    """What goes into the activations of one block is pushed far below zero."""
    for parent in list(trial.owner.modules()):
        for child in parent.children():
            if isinstance(child, nn.ReLU | nn.ELU | nn.GELU):
                child.register_forward_pre_hook(lambda _, x: (x[0] - 100 * trial.strength,))


def _saturated(trial: Trial) -> None:
    """The activations of one block become tanh of a hundred times their input."""
    for parent in list(trial.owner.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU | nn.ELU | nn.GELU):
                tanh = nn.Tanh()
                tanh.register_forward_pre_hook(lambda _, x: (x[0] * 100 * trial.strength,))
                setattr(parent, name, tanh)


def _frozen(trial: Trial) -> None:
    for parameter in trial.branch.parameters():
        parameter.requires_grad = False


def _shortcut(
    change: Callable[[Tensor], Tensor], *, everywhere: bool = False
) -> Callable[[Trial], None]:
    def plant(trial: Trial) -> None:
        chosen = [b for b in trial.blocks if not b.transition or b.index == 0]
        if everywhere:
            trial.at = chosen[0].index
        for block in chosen if everywhere else [trial.blocks[trial.at]]:
            trial.on_output(trial.model.get_submodule(block.shortcut_module), change)

    return plant


def _shortcuts(factor: float) -> Callable[[Trial], None]:
    return _shortcut(lambda x: factor * x, everywhere=True)


def _rate(factor: float) -> Callable[[Trial], None]:
    def plant(trial: Trial) -> None:
        trial.lr *= factor * trial.strength

    return plant


def _constant_labels(trial: Trial) -> None:
    trial.change = lambda batch, step: (batch[0], torch.full_like(batch[1], 3))


def _negate(trial: Trial) -> None:
    trial.weigh = lambda loss: -loss


def _random_labels(trial: Trial) -> None:
    def change(batch: Batch, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step + 77)
        high = 10 if trial.network.task == "images" else 32
        return batch[0], torch.randint(0, high, batch[1].shape, generator=generator)

    trial.change = change
    trial.steps = 60  # a healthy network may guess for 50


def _raw_pixels(trial: Trial) -> None:
    trial.change = lambda batch, step: ((batch[0] + 1) * 80 * trial.strength, batch[1])


def _nan_pixel(trial: Trial) -> None:
    def change(batch: Batch, step: int) -> Batch:
        images = batch[0].clone()
        images[0, 0, 0, 0] = math.nan if step >= 6 else images[0, 0, 0, 0]
        return images, batch[1]

    trial.change = change


def _blank(trial: Trial) -> None:
    trial.change = lambda batch, step: (torch.zeros_like(batch[0]), batch[1])


def _decay(trial: Trial) -> None:
    trial.decay = 0.1 * trial.strength / trial.lr


def _clip(trial: Trial) -> None:
    trial.before = lambda step: (
        torch.nn.utils.clip_grad_norm_(trial.model.parameters(), 1e-7 * trial.strength),
        None,
    )[1]


def _evaluation_mode(trial: Trial) -> None:
    for module in trial.model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.train = lambda mode=True, m=module: m  # type: ignore[method-assign]
            module.training = False


def _no_update(trial: Trial) -> None:
    trial.updates = False


def _shift(trial: Trial) -> None:
    trial.on_output(trial.branch, lambda x: x + 30 * trial.strength)


def _half(trial: Trial) -> None:
    """Half precision, and a branch that leaves its range."""
    trial.model.half()
    trial.change = lambda batch, step: (
        batch[0].half() if batch[0].is_floating_point() else batch[0],
        batch[1],
    )
    trial.on_output(trial.branch, lambda x: x * (3e5 * trial.strength))
    trial.lr *= 0.1


def _sigmoid_after(trial: Trial) -> None:
    """A sigmoid behind every addition: the skip gain is a product of slopes of at most 1/4."""
    for block in trial.blocks:
        owner = trial.model.get_submodule(block.owner)
        if isinstance(owner, OurBlock):
            owner.after_add = nn.Sigmoid()
        else:
            trial.on_output(owner, torch.sigmoid)


def _risky(trial: Trial) -> None:
    """The first step is 1.2 / ||g_0|| long, and the run is looked at after its second step."""
    loss = loss_of(trial.model, draw(trial.network, 0, 0))
    gradients = torch.autograd.grad(loss, list(trial.model.parameters()))
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    trial.lr = 1.2 * trial.strength / norm
    trial.steps = 2
    trial.variant = trial.network.name.rsplit("-", 1)[0]


def _shared_bias(trial: Trial) -> None:
    """The biases of the branches' last BatchNorms learn at 100 times the rate."""
    for block in trial.blocks:
        inside = trial.model.get_submodule(block.owner).modules()
        norms = [module for module in inside if isinstance(module, nn.BatchNorm2d)]
        norms[-1].bias.register_hook(lambda g: 100 * trial.strength * g)


def _few_samples(trial: Trial) -> None:
    """The same sixteen samples at every step, looked at beside others."""
    few = draw(trial.network, 4321, 0)
    trial.change = lambda batch, step: (few[0][:16], few[1][:16])
    trial.steps, trial.evaluate = 120, 12


FAULTS = (
    Fault("branch zeroed", _scale(0.0), "dead_block", "block", _RESIDUAL),
    Fault("branch x1000", _scale(1000.0), "branch_too_large", "block", _RESIDUAL, scales=True),
    Fault("NaN in a branch at step 9", _nan_later, "exploded", "block", _RESIDUAL),
    Fault("infinite weight", _infinite_weight, "exploded", "block", _IDENTITY),
    Fault("a stage without BatchNorm", _remove_norms, "missing_norm", "first", _OURS),
    Fault("a block without its norm", _remove_norm, "missing_norm", "block", _RELU),
    Fault("BatchNorm in evaluation mode", _evaluation_mode, "missing_norm", "", _OURS),
    Fault("dead units: input -100", _dead, "dead_block", "block", (*_RELU, "plain")),
    Fault("tanh of 100 x", _saturated, "saturated_block", "block", _CURVED, scales=True),
    Fault("frozen block", _frozen, "frozen_block", "block", _IDENTITY),
    Fault("branch detached", _branch(torch.detach), "detached_branch", "block", _RESIDUAL),
    Fault("shortcut detached", _shortcut(torch.detach), "detached_shortcut", "block", _IDENTITY),
    Fault("shortcut's sign flipped", _shortcut(torch.neg), "shortcut_scaled", "block", _IDENTITY),
    Fault("shortcuts x 0.5", _shortcuts(0.5), "shortcut_scaled", "first", _IDENTITY),
    Fault("shortcuts x 1.5", _shortcuts(1.5), "shortcut_scaled", "first", _IDENTITY),
    Fault("learning rate x 300", _rate(300), "lr_too_high", scales=True),
    Fault("learning rate / 1e5", _rate(1e-5), "lr_too_low", scales=True),
    Fault("gradients clipped to 1e-7", _clip, "lr_too_low", "", _CLIPPED),
    Fault("optimizer never steps", _no_update, "lr_too_low"),
    Fault("weight decay takes 10 % a step", _decay, "weight_decay_too_large", "", _DECAYED),
    Fault("constant labels", _constant_labels, "data_fault"),
    Fault("random labels", _random_labels, "stalled"),
    Fault("raw pixels 0..255", _raw_pixels, "data_fault", "", _IMAGES, scales=True),
    Fault("NaN in a pixel at step 6", _nan_pixel, "data_fault", "", _IMAGES),
    Fault("blank images", _blank, "data_fault", "", _IMAGES),
    Fault("branch + 30", _shift, "bias_shift", "block", _AFTER),
    Fault("float16 overflow", _half, "fp16_overflow", "block", ("residual", "vit", "gpt2")),
    Fault("weights x 0.1 without norm", _rescale_weights(0.1), "vanishing", "", ("bare-plain",)),
    Fault("weights x 2 without norm", _rescale_weights(2.0), "grows_at_init", "", _BARE),
    Fault("loss with the wrong sign", _negate, "loss_fault"),
    Fault("sigmoid behind every addition", _sigmoid_after, "skip_collapsed", "", _AFTER),
    Fault("first step of 1.2 / ||g_0||", _risky, "at_risk", "", _OURS),
    Fault("biases learn 100 times as fast", _shared_bias, "drift", "", ("elu-", "no_relu")),
    Fault("sixteen samples", _few_samples, "overfit", "", ("residual",)),
)
"""Every kind of fault that is planted."""
