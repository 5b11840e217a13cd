"""Faults of the update: learning rates, schedules, what the optimizer holds, modes, gradients."""

import copy
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from resdiag.pathologies.kinds import MIDWAY, Kind, both
from resdiag.pathologies.optimizers import OPTIMIZERS
from resdiag.pathologies.tasks import logits_of
from resdiag.pathologies.trial import Trial, head_of, norms_in, stem_of

Parameters = list[nn.Parameter]


def scale_rate(trial: Trial) -> None:
    """The learning rate times the strength, from the onset on."""
    trial.schedule = lambda step: trial.strength if step >= trial.onset else 1.0


def clip_to_nothing(trial: Trial) -> None:
    """Gradients are clipped to a norm of 1e-7."""

    def act(step: int) -> None:
        if step >= trial.onset:
            torch.nn.utils.clip_grad_norm_(trial.model.parameters(), trial.strength)

    trial.before_update.append(act)


def never_step(trial: Trial) -> None:
    """The loop forgets `optimizer.step()`."""
    trial.updates = lambda step: step < trial.onset


def decay(trial: Trial) -> None:
    """Weight decay takes the strength off the weights at every step."""
    trial.decay = trial.strength / trial.lr


def keep_gradients(trial: Trial) -> None:
    """The loop forgets `optimizer.zero_grad()`."""
    trial.zeroes = lambda step: step < trial.onset


def evaluation_mode(trial: Trial) -> None:
    """The model is in evaluation mode, as after an evaluation that did not put it back."""
    trial.is_training = lambda step: step < trial.onset


def skip_steps(trial: Trial) -> None:
    """One gradient overflows at every step, so that the gradient scaler skips all of them."""
    trial.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trial.at_onset(
        lambda: next(head_of(trial.model).parameters()).register_hook(lambda g: g + math.inf)
    )


def _hold(choose: Callable[[Trial], Iterable[Any]]) -> Callable[[Trial], None]:
    """The optimizer holds these parameters only."""

    def plant(trial: Trial) -> None:
        trial.groups = [[{"params": list(choose(trial))}]]

    return plant


def _head(trial: Trial) -> Parameters:
    return list(head_of(trial.model).parameters())


def _without(trial: Trial, left_out: Iterable[nn.Parameter]) -> Parameters:
    gone = {id(p) for p in left_out}
    return [p for p in trial.trained if id(p) not in gone]


def _of_blocks(trial: Trial) -> Parameters:
    return [p for owner in trial.owners for p in owner.parameters()]


def _copied(trial: Trial) -> Parameters:
    return [nn.Parameter(p.detach().clone()) for p in trial.trained]


def _of_another(trial: Trial) -> Parameters:
    return list(trial.architecture.build().parameters())


def recreate_model(trial: Trial) -> None:
    """The model is made again after the optimizer, which holds the parameters of the first."""
    trial.groups = [[{"params": list(trial.model.parameters())}]]
    trial.model = copy.deepcopy(trial.model)


def _group(choose: Callable[[Trial], Parameters]) -> Callable[[Trial], None]:
    """One group of parameters has a rate of its own: the others' times the strength."""

    def plant(trial: Trial) -> None:
        chosen = [p for p in choose(trial) if p.requires_grad]
        ill = {"params": chosen, "lr": trial.lr * trial.strength}
        trial.groups = [[{"params": _without(trial, chosen)}, ill]]

    return plant


def _norms_and_biases(trial: Trial) -> Parameters:
    inside = [p for norm in norms_in(trial.model) for p in norm.parameters()]
    biases = [p for name, p in trial.model.named_parameters() if name.endswith("bias")]
    return list({id(p): p for p in [*inside, *biases]}.values())


def _stem(trial: Trial) -> Parameters:
    return list(stem_of(trial.model).parameters())


def first_step_too_long(trial: Trial) -> None:
    """The first step is 1.2 / ||g_0|| long, and the run is looked at after its second step."""
    inputs, targets = trial.batch(0)
    loss = trial.loss(logits_of(trial.model(inputs)), targets, 0)
    gradients = torch.autograd.grad(loss, list(trial.model.parameters()))
    trial.lr = trial.strength / math.sqrt(sum(float(g.square().sum()) for g in gradients))
    trial.steps = 2
    trial.variant = trial.architecture.name.rsplit("-", 1)[0]


def shared_bias(trial: Trial) -> None:
    """The biases of the branches' last norms learn at 100 times the rate."""
    for owner in trial.owners:
        bias = norms_in(owner)[-1].bias
        assert isinstance(bias, nn.Parameter)
        bias.register_hook(lambda g: trial.strength * g)


def swap_optimizer(trial: Trial) -> None:
    """From the onset on the optimizer holds the head only, as after a wrong restart."""
    kept = {id(p) for p in _head(trial)}

    def act(step: int) -> None:
        if step >= trial.onset:
            for p in trial.trained:
                p.grad = p.grad if id(p) in kept else None

    trial.before_update.append(act)


_PLAIN = ("sgd", "sgd without momentum")
_ALL = tuple(OPTIMIZERS)
_DECAYED = ("sgd", "adamw")
_NOTHING = "gradients almost 0 before the step"


def _mismatch(name: str, plant: Callable[[Trial], None], **more: Any) -> Kind:  # noqa: ANN401
    return Kind(name=f"optimizer holds {name}", plant=plant, finding="optimizer_mismatch", **more)


def _rate(name: str, choose: Callable[[Trial], Parameters], **more: Any) -> tuple[Kind, Kind]:  # noqa: ANN401
    """Far too high, which may do no harm; and so low that the group is as good as frozen."""
    make = partial(Kind, plant=_group(choose), finding="group_lr", **more)
    return (
        make(name=f"rate of {name} too high", strengths=(300.0,), hurts=True),
        make(name=f"rate of {name} too low", strengths=(1e-4,)),
    )


UPDATE_FAULTS = (
    Kind(name="learning rate too high", plant=scale_rate, finding="lr_too_high",
         strengths=(300.0, 30.0, 1000.0), hurts=True),
    Kind(name="learning rate too low", plant=scale_rate, finding="lr_too_low",
         strengths=(1e-5, 1e-6)),
    Kind(name="learning rate raised", plant=scale_rate, finding="lr_schedule",
         onsets=(MIDWAY,), strengths=(100.0, 300.0), hurts=True),
    Kind(name="learning rate becomes 0", plant=scale_rate, finding="lr_schedule",
         onsets=(MIDWAY, 30), strengths=(0.0,)),
    Kind(name="gradients clipped to nothing", plant=clip_to_nothing, finding="lr_too_low",
         cause=_NOTHING, optimizers=_PLAIN, strengths=(1e-7,), needs=("sgd",)),
    Kind(name="optimizer never steps", plant=never_step, finding="lr_too_low",
         also=("steps_skipped",)),
    Kind(name="weight decay", plant=decay, finding="weight_decay_too_large", optimizers=_DECAYED,
         strengths=(0.1, 0.3)),
    Kind(name="gradients not zeroed", plant=keep_gradients, finding="gradients_not_zeroed",
         onsets=both()),
    Kind(name="evaluation mode", plant=evaluation_mode, finding="eval_mode", needs=("dropout",),
         onsets=both()),
    Kind(name="evaluation mode, BatchNorm", plant=evaluation_mode, finding="eval_mode",
         needs=("batchnorm",), onsets=both()),
    Kind(name="every step skipped", plant=skip_steps, finding="steps_skipped", onsets=both()),
    _mismatch("the head only", _hold(_head)),
    _mismatch("all but a block", _hold(lambda t: _without(t, _of_blocks(t))),
              place="next to others"),
    _mismatch("all but the head", _hold(lambda t: _without(t, _head(t)))),
    _mismatch("another model's parameters", _hold(_of_another)),
    _mismatch("copies of the parameters", _hold(_copied)),
    _mismatch("the parameters of the model before", recreate_model),
    *_rate("the head", _head),
    *_rate("the stem", _stem),
    *_rate("a block", _of_blocks, place="weights"),
    *_rate("norms and biases", _norms_and_biases, needs=("norm",)),
    Kind(name="first step too long", plant=first_step_too_long, finding="at_risk",
         needs=("variant", "image"), optimizers=("sgd",), strengths=(1.2, 3.6)),
    Kind(name="biases learn faster", plant=shared_bias, finding="drift", place="inner norm",
         extents=("all",),
         needs=("variant", "nothing after additions", "norms end branches", "long stages"),
         strengths=(100.0,), optimizers=("sgd",)),
    Kind(name="only the head is updated", plant=swap_optimizer, finding="optimizer_mismatch",
         also=("frozen_block",), onsets=(MIDWAY,)),
)  # fmt: skip
"""Faults of the optimizer and the loop."""
