"""Experiments on a model and one batch that tell why it does not learn."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from resdiag.errors import UsageError
from resdiag.probe.examination import Examination
from resdiag.probe.experiments.conclusions import conclude
from resdiag.probe.experiments.copies import Copies, kept_random_state, trainable
from resdiag.probe.experiments.default_loss import best_constant
from resdiag.probe.experiments.experiment import Experiment, some
from resdiag.probe.experiments.gradients import check_gradients
from resdiag.probe.experiments.inputs import (
    check_inputs,
    check_samples,
    compare_with_guessing,
    run_once,
)
from resdiag.probe.experiments.learning import Learning
from resdiag.probe.experiments.progress import Progress, open_progress
from resdiag.probe.experiments.task import Task, open_task


def examine(
    model: nn.Module,
    batch: object,
    loss: Callable[..., Any] | None = None,
    optimizer: Optimizer | None = None,
    lr: float | None = None,
    steps: int = 60,
    seed: int = 0,
    *,
    progress: bool | None = None,
) -> Examination:
    """Find out on one batch whether network, loss, gradient and learning rate can learn.

    It trains copies on the batch at the given rate and at others, with its labels and with them
    shuffled; compares autograd with difference quotients; and changes the inputs. The model, its
    optimizer, its buffers and gradients, and the random states (CPU and CUDA) stay bit for bit. A
    model that cannot be copied is trained itself and put back; a note says so. Hooks on parameters
    are not copied.

    Args:
        model: Any module, at the weights in question; it is examined in train mode.
        batch: (inputs, target), a dict of keyword arguments, or a tuple of the model's inputs.
            Samples come first in each tensor, or experiments that mix them are left out.
        loss: A function of (output, target) or of (model, batch); the latter has a first parameter
            called model, net, network or module. None takes the loss that the model returns, or
            else cross-entropy for integer targets and mean square error for floating ones.
        optimizer: The training's own, with its state.
        lr: The training's learning rate; None takes the optimizer's. A rate without an optimizer
            means plain SGD.
        steps: Updates on the batch at most.
        seed: Of dropout, shuffling and directions.
        progress: Whether to show a progress bar on standard error; None: on a terminal.

    Returns:
        Experiments and conclusions; print it.

    Raises:
        UsageError: The model does not run on the batch, there is no loss, every parameter is
            frozen, or the rate is not positive.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
    >>> batch = torch.randn(12, 4), torch.arange(12) % 3
    >>> found = examine(net, batch, optimizer=torch.optim.SGD(net.parameters(), lr=1e-6))
    >>> list(found.shown)
    ['rate_too_low']
    """
    model = _unwrap(model)
    rate = _rate_of(optimizer, lr)
    if not isinstance(steps, int) or steps < 2:
        raise UsageError(f"steps must be a whole number from 2 on, not {steps!r}")
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise UsageError("the model has parameters without a size: run it once on a batch")
    if not trainable(model):
        raise UsageError("every parameter is frozen (requires_grad is False): nothing can learn")
    with ExitStack() as stack:
        stack.enter_context(kept_random_state())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        shown = stack.enter_context(open_progress(progress, steps))
        return _examine(model, open_task(model, batch, loss), optimizer, rate, steps, seed, shown)


def _examine(
    model: nn.Module, task: Task, optimizer: Optimizer | None, rate: float | None, steps: int,
    seed: int, shown: Progress,
) -> Examination:  # fmt: skip
    copies = Copies(model, optimizer, task.loss)
    first = run_once(copies, task, seed)
    value, has_graph = float(first.loss.detach()), first.loss.requires_grad
    constant = best_constant(task.target, task.classes(first), first.name)
    experiments = [*_check_optimizer(model, optimizer), compare_with_guessing(task, first)]
    shown.begin("inputs")
    experiments += [check(copies, task, seed, shown.advance)
                    for check in (check_inputs, check_samples)]  # fmt: skip
    learning = Learning(copies, task, optimizer, rate, steps, constant, seed, shown)
    if math.isfinite(value):
        shown.begin("gradients")
        experiments.append(check_gradients(copies, task, seed, shown.advance))
        if has_graph:
            learning.run()
        experiments += learning.experiments(has_graph)
    else:
        text = f"The loss of this batch is {value} before any step: look for it in the inputs, the "
        text += "targets and the weights."
        experiments[0] = Experiment(
            name="guessing", title="Guessing", text=f"the loss is {value}",
            numbers={"loss": value}, shows=(("loss_not_finite", text),),
        )  # fmt: skip
    return Examination(
        model=type(model).__name__,
        parameters=sum(p.numel() for p in trainable(model).values()),
        batch=task.describe(),
        loss=first.name,
        seed=seed,
        experiments=tuple(experiments),
        conclusions=conclude(experiments, learning.trainings, learning.sweep),
        notes=tuple(_notes(model, copies, optimizer, rate)),
    )


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside a compiled or data-parallel one."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"a model is a torch.nn.Module, not {type(model).__name__}")
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inner = getattr(model, "module" if isinstance(model, parallel) else "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _rate_of(optimizer: Any, lr: float | None) -> float | None:  # noqa: ANN401
    """The training's own rate, None if nothing is said of it."""
    if optimizer is not None and not (
        hasattr(optimizer, "param_groups") and hasattr(optimizer, "step")
    ):
        kind = type(optimizer).__name__
        raise UsageError(f"optimizer must be an optimizer of torch with its parameters, not {kind}")
    rate = lr if lr is not None or optimizer is None else optimizer.param_groups[0].get("lr")
    if rate is None:
        return None
    if not 0 < float(rate) < math.inf:
        raise UsageError(f"the learning rate is {float(rate):g}, it must be positive", "pass lr=")
    return float(rate)


def _check_optimizer(model: nn.Module, optimizer: Optimizer | None) -> list[Experiment]:
    """Whether the optimizer has the parameters that ask for a gradient."""
    if optimizer is None:
        return []
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    wanted = trainable(model)
    missing = [name for name, p in wanted.items() if id(p) not in held]
    frozen = sum(not p.requires_grad for p in model.parameters())
    text = (
        f"{type(optimizer).__name__} has {len(wanted) - len(missing)} of {len(wanted)} trainable "
    )
    text += f"parameters; {frozen} are frozen"
    shows, remarks = list[tuple[str, str]](), list[tuple[str, str]]()
    if len(missing) == len(wanted):
        shows.append(("optimizer_of_another_model", "The optimizer has none of the model's "
                      "parameters: it was made for other ones, such as those of a model before it "
                      "was copied or replaced."))  # fmt: skip
    elif missing:
        remarks.append(("not_in_optimizer", f"The optimizer does not have {some(missing)}: they "
                        "keep their values."))  # fmt: skip
    return [Experiment(
        name="optimizer", title="Optimizer", text=text, shows=tuple(shows), open=tuple(remarks),
        numbers={"trainable": len(wanted), "missing": missing, "frozen": frozen},
    )]  # fmt: skip


def _notes(
    model: nn.Module, copies: Copies, optimizer: Optimizer | None, rate: float | None
) -> Sequence[str]:
    notes = list[str]()
    if not model.training:
        notes.append("the model is in eval mode; it was examined in train mode")
    if copies.reason:
        notes.append("the model cannot be copied: it was trained itself and put back "
                     f"({copies.reason})")  # fmt: skip
    hooked = sum(bool(p._backward_hooks) for p in model.parameters())
    if hooked:
        notes.append(f"{hooked} parameters have gradient hooks, which the copies do not have")
    if optimizer is None:
        notes.append("no optimizer was given: plain SGD at the given rate" if rate else
                     "neither optimizer nor rate were given: nothing is said of yours")  # fmt: skip
    return notes
