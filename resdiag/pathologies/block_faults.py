"""Faults in blocks: branches, shortcuts, norms, activations, attention, weights."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from resdiag.pathologies.architectures import ACTIVATIONS
from resdiag.pathologies.kinds import MIDWAY, Kind, both
from resdiag.pathologies.layers import Attention, Unit
from resdiag.pathologies.trial import Trial, freeze, norms_in, on_output

Change = Callable[[Tensor], Tensor]
SGD = ("sgd",)


def _outputs(modules: Callable[[Trial], list[nn.Module]], change: Change) -> Callable[..., None]:
    """Plant a change of the outputs of modules, from the onset on."""

    def plant(trial: Trial) -> None:
        for module in modules(trial):
            on_output(module, lambda x: change(x) if trial.has_begun else x)

    return plant


def _branch(change: Change) -> Callable[[Trial], None]:
    return _outputs(lambda trial: trial.branches, change)


def _shortcut(change: Change) -> Callable[[Trial], None]:
    return _outputs(lambda trial: trial.shortcuts, change)


def scale_branch(trial: Trial) -> None:
    """The branch times the strength; times 1 before, so that the pass stays the same."""
    for module in trial.branches:
        on_output(module, lambda x: x * (trial.strength if trial.has_begun else 1.0))


def scale_shortcut(trial: Trial) -> None:
    """The same for the shortcut."""
    for module in trial.shortcuts:
        on_output(module, lambda x: x * (trial.strength if trial.has_begun else 1.0))


def shift_branch(trial: Trial) -> None:
    """A constant is added to the branch."""
    for module in trial.branches:
        on_output(module, lambda x: x + (trial.strength if trial.has_begun else 0.0))


def nan_in_branch(trial: Trial) -> None:
    """One step at which the branch of the first sample is NaN."""

    def change(x: Tensor) -> Tensor:
        broken = torch.zeros_like(x)  # added always: the pass stays the same
        broken[0] = math.nan if trial.step == trial.onset else 0.0
        return x + broken

    for module in trial.branches:
        on_output(module, change)


def infinite_weight(trial: Trial) -> None:
    """One weight of the block becomes infinite."""

    def act() -> None:
        for owner in trial.owners:
            weight = next(p for p in owner.parameters() if p.dim() > 1)
            with torch.no_grad():
                weight.view(-1)[0] = math.inf

    trial.at_onset(act)


def remove_norms(trial: Trial) -> None:
    """The norms of the blocks become the identity."""
    for owner in trial.owners:
        replace_modules(owner, lambda m: nn.Identity() if norms_in(m)[:1] == [m] else None)


def replace_modules(inside: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> None:
    """Replace children for which `make` returns something."""
    for parent in list(inside.modules()):
        for name, child in parent.named_children():
            made = make(child)
            if made is not None:
                setattr(parent, name, made)


def close_activations(trial: Trial) -> None:
    """What enters the activations is pushed far below zero."""
    for owner in trial.owners:
        for module in owner.modules():
            if isinstance(module, ACTIVATIONS):
                module.register_forward_pre_hook(
                    lambda _, x: (x[0] - (trial.strength if trial.has_begun else 0.0),)
                )


def saturate(trial: Trial) -> None:
    """The activations become tanh of a multiple of their input."""

    def make(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, ACTIVATIONS):
            return None
        tanh = nn.Tanh()
        tanh.register_forward_pre_hook(lambda _, x: (x[0] * trial.strength,))
        return tanh

    for owner in trial.owners:
        replace_modules(owner, make)


def freeze_block(trial: Trial) -> None:
    """The block's parameters ask for no gradient."""

    def act() -> None:
        for owner in trial.owners:
            freeze(owner.parameters())

    trial.at_onset(act)


def set_join(join: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Trial], None]:
    """The unit's addition becomes something else."""

    def plant(trial: Trial) -> None:
        for owner in trial.owners:
            assert isinstance(owner, Unit)
            owner.join = lambda s, f: join(s, f) if trial.has_begun else s + f

    return plant


def constant_weights(trial: Trial) -> None:
    """Every weight and bias of the blocks, or of the network, is 0.01; norms stay as they are."""
    for place in trial.owners or [trial.model]:
        normal = {id(p) for norm in norms_in(place) for p in norm.parameters()}
        for parameter in place.parameters():
            if id(parameter) not in normal:
                nn.init.constant_(parameter, 0.01)


def set_eps(trial: Trial) -> None:
    """The norms' epsilon is the strength times the variance of what first enters them."""
    seen: set[nn.Module] = set()

    def hook(norm: Any, entering: tuple[Tensor]) -> None:  # noqa: ANN401 - norms of any library
        if norm not in seen:
            seen.add(norm)
            norm.eps = trial.strength * float(entering[0].detach().var())

    for owner in trial.owners:
        for norm in norms_in(owner):
            norm.register_forward_pre_hook(hook)


def zero_gain(trial: Trial) -> None:
    """The gain and the bias of the block's first norm are held at zero."""
    for owner in trial.owners:
        norm = norms_in(owner)[0]
        for parameter in norm.parameters():
            nn.init.zeros_(parameter)
        freeze(norm.parameters())


def still_statistics(trial: Trial) -> None:
    """BatchNorm's running statistics have a momentum of zero."""
    for module in trial.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0


def frozen_statistics(trial: Trial) -> None:
    """BatchNorm runs in evaluation mode from the first step, on statistics of nothing."""

    def act(step: int) -> None:
        for module in trial.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    trial.before_step.append(act)


def drop_shortcut(trial: Trial) -> None:
    """Dropout on the shortcut."""
    for module in trial.shortcuts:
        on_output(
            module,
            lambda x: nn.functional.dropout(x, trial.strength if trial.has_begun else 0.0),
        )


def sharpen_attention(trial: Trial) -> None:
    """The attention's logits times the strength."""

    def act() -> None:
        for owner in trial.owners:
            for module in owner.modules():
                if isinstance(module, Attention):
                    module.sharpness = trial.strength

    trial.at_onset(act)


def half_precision(trial: Trial) -> None:
    """Half precision, and a branch that leaves its range."""
    trial.model.half()
    trial.changes.append(lambda b, step: (b[0].half() if b[0].is_floating_point() else b[0], b[1]))
    scale_branch(trial)
    trial.lr *= 0.1


def sigmoid_behind(trial: Trial) -> None:
    """A sigmoid behind every addition: the skip gain is a product of slopes of at most 1/4."""
    for owner in trial.owners:
        for name in ("after", "after_add"):
            if hasattr(owner, name):
                setattr(owner, name, nn.Sigmoid())


def rescale_weights(trial: Trial) -> None:
    """Every weight matrix times the strength."""
    with torch.no_grad():
        for parameter in trial.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(trial.strength)


def detach_output(trial: Trial) -> None:
    """Nothing before the block gets a gradient any more."""
    for owner in trial.owners:
        on_output(owner, lambda x: x.detach() if trial.has_begun else x)


def no_grad_block(trial: Trial) -> None:
    """The block runs without gradients, and everything before it gets none."""
    for owner in trial.owners:
        forward = cast("Callable[[Tensor], Tensor]", owner.forward)
        owner.forward = torch.no_grad()(forward)


_NINE = (9, MIDWAY)

BLOCK_FAULTS = (
    Kind(name="branch zeroed", plant=scale_branch, finding="dead_block", place="branch",
         needs=("residual",), onsets=both(), strengths=(0.0,)),
    Kind(name="branch scaled", plant=scale_branch, finding="branch_too_large", place="branch",
         needs=("residual", "no scaled"), onsets=both(), strengths=(1000.0, 60.0, 40.0)),
    Kind(name="NaN in a branch", plant=nan_in_branch, finding="exploded", place="branch",
         needs=("residual",), onsets=_NINE),
    Kind(name="infinite weight", plant=infinite_weight, finding="exploded", place="weights",
         onsets=both()),
    Kind(name="norms removed", plant=remove_norms, finding="missing_norm", place="inner norm",
         needs=("residual",), extents=("one", "stage")),
    Kind(name="BatchNorm in evaluation mode", plant=frozen_statistics, finding="missing_norm",
         also=("eval_mode",), needs=("batchnorm", "residual")),
    Kind(name="activations closed", plant=close_activations, finding="dead_block",
         place="activation", onsets=both(), strengths=(100.0, 300.0)),
    Kind(name="tanh of a large input", plant=saturate, finding="saturated_block",
         place="activation", strengths=(50.0, 300.0)),
    Kind(name="block frozen", plant=freeze_block, finding="frozen_block", place="next to others",
         onsets=both()),
    Kind(name="branch detached", plant=_branch(torch.detach), finding="detached_branch",
         place="branch", needs=("residual",), onsets=both()),
    Kind(name="shortcut detached", plant=_shortcut(torch.detach), finding="detached_shortcut",
         place="shortcut", onsets=both()),
    Kind(name="shortcut negated", plant=_shortcut(torch.neg), finding="shortcut_scaled",
         also=("missing_skip",), place="shortcut"),
    Kind(name="shortcut scaled", plant=scale_shortcut, finding="shortcut_scaled", place="shortcut",
         extents=("all", "one"), strengths=(0.5, 1.5)),
    Kind(name="dropout on the shortcut", plant=drop_shortcut, finding="dropout_on_skip",
         place="shortcut", extents=("one", "all"), strengths=(0.5, 0.2)),
    Kind(name="addition lost", plant=set_join(lambda s, f: f), finding="missing_skip",
         place="join", needs=("residual",), onsets=both(), shifts=(0, -1)),
    Kind(name="branch minus shortcut", plant=set_join(lambda s, f: f - s), finding="missing_skip",
         also=("shortcut_scaled",), place="join", shifts=(0, -1)),
    Kind(name="output detached", plant=detach_output, finding="detached_output",
         place="next to others", onsets=both()),
    Kind(name="block without gradients", plant=no_grad_block, finding="detached_output",
         place="next to others"),
    Kind(name="weights constant", plant=constant_weights, finding="symmetric_units",
         place="weights", needs=("no dropout",)),
    Kind(name="all weights constant", plant=constant_weights, finding="symmetric_units",
         needs=("no dropout",)),
    Kind(name="large epsilon", plant=set_eps, finding="norm_fault",
         cause="epsilon above the variance", place="inner norm", extents=("one", "all"),
         strengths=(10.0, 100.0)),
    Kind(name="gain of zero", plant=zero_gain, finding="norm_fault", cause="gain of zero",
         place="inner norm"),
    Kind(name="running statistics still", plant=still_statistics, finding="norm_fault",
         cause="statistics do not move", needs=("batchnorm",)),
    Kind(name="branch shifted", plant=shift_branch, finding="bias_shift", place="shiftable",
         needs=("residual",), onsets=both(), strengths=(30.0, 100.0)),
    Kind(name="float16 overflow", plant=half_precision, finding="fp16_overflow", place="join",
         needs=("no batchnorm", "no scaled"), strengths=(3e5,)),
    Kind(name="attention sharpened", plant=sharpen_attention, finding="attention_collapsed",
         place="attention block", onsets=both(), strengths=(100.0,)),
    Kind(name="attention uniform", plant=sharpen_attention, finding="attention_collapsed",
         place="attention block", onsets=both(), strengths=(0.0,)),
    Kind(name="sigmoid behind additions", plant=sigmoid_behind, finding="skip_collapsed",
         place="after", extents=("all",), needs=("residual", "no attention")),
    Kind(name="small weights, no norm", plant=rescale_weights, finding="vanishing",
         needs=("no residual", "no norm"), strengths=(0.1, 0.2), hurts=True),
    Kind(name="large weights, no norm", plant=rescale_weights, finding="grows_at_init",
         needs=("residual", "no norm", "join", "no scaled"), strengths=(2.0, 3.0), hurts=True),
)  # fmt: skip
"""Faults of the network."""
