"""Whether the output depends on the input, and on each sample alone; and the loss of guessing."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from resdiag.errors import UsageError
from resdiag.probe.batch import main_output
from resdiag.probe.experiments.copies import Copies, kept_buffers, seed_everything, trainable
from resdiag.probe.experiments.default_loss import best_constant
from resdiag.probe.experiments.experiment import Experiment, percent
from resdiag.probe.experiments.quotients import jitter
from resdiag.probe.experiments.task import Pass, Task
from resdiag.probe.experiments.trial import with_loss

IGNORED = 1e-6
"""Change of the output over its size, by other inputs, up to which it does not depend on them."""
HARDLY = 1e-3
"""The same, up to which it hardly does."""
WORSE = 1.5
"""Loss over that of guessing from which on the network is confident and wrong."""
_BATCH_NORMS = nn.modules.batchnorm._BatchNorm
_NO_SAMPLES = "the samples of the batch cannot be told: its tensors differ in their first size"


def check_inputs(copies: Copies, task: Task, seed: int, advance: Callable[[], None]) -> Experiment:
    """Give the network the inputs in another order: its output and loss must change.

    Args:
        copies: Of the model.
        task: Batch and loss.
        seed: Of the random numbers of a pass, the same in all of them.
        advance: Called after every pass.
    """
    n, title = task.samples, "Input"
    if n is None or n < 2:
        reason = "the batch has one sample" if n == 1 else _NO_SAMPLES
        return Experiment(name="inputs", title=title, reason=reason)
    rolled = task.pick(torch.arange(n).roll(1), target=False)
    with _network(copies) as (model, loss):
        before, after = (_run(model, with_loss(t, loss), seed) for t in (task, rolled))
        change = _change(before.main, after.main)
        nearby = math.nan
        if change <= IGNORED and not copies.reason:
            jitter(trainable(model), torch.Generator().manual_seed(seed))
            pair = [_run(model, with_loss(t, loss), seed).main for t in (task, rolled)]
            nearby = _change(*pair)
        advance()
    losses = float(before.loss), float(after.loss)
    if not math.isfinite(change):
        reason = "the output is not finite" if before.main is not None else "no output tensor"
        return Experiment(name="inputs", title=title, reason=reason)
    text = f"inputs in another order change the output by {percent(change)} of its size, the loss "
    text += f"from {losses[0]:.4g} to {losses[1]:.4g}"
    shows, rules_out = list[tuple[str, str]](), list[tuple[str, str]]()
    remarks = list[tuple[str, str]]()
    if _same_inputs(task):
        shows.append(("same_samples", "All samples of the batch have the same input."))
    elif change <= IGNORED < nearby:
        remarks.append(("ignores_input_here", "At exactly these weights the output does not depend "
                        "on the input, next to them it does: as with a last layer of zeros, which "
                        "the first step ends."))  # fmt: skip
    elif change <= IGNORED:
        shows.append(("ignores_input", "The output does not depend on the input: other inputs "
                      "change nothing. Look for dead units, weights of 0, or an input that is not "
                      "used."))  # fmt: skip
    elif change <= HARDLY:
        shows.append(("hardly_uses_input", f"The output hardly depends on the input: other inputs "
                      f"change it by {percent(change)} of its size."))  # fmt: skip
    else:
        rules_out.append(("ignores_input", "The output depends on the input."))
    return Experiment(
        name="inputs", title=title, text=text, shows=tuple(shows), rules_out=tuple(rules_out),
        open=tuple(remarks),
        numbers={"change": change, "loss": losses[0], "loss_of_other_inputs": losses[1]},
    )  # fmt: skip


def check_samples(copies: Copies, task: Task, seed: int, advance: Callable[[], None]) -> Experiment:
    """Replace one sample, in eval mode: the outputs of the others must stay.

    Args:
        copies: Of the model.
        task: Batch and loss.
        seed: Of the random numbers of a pass, the same in all of them.
        advance: Called after every pass.
    """
    n, title = task.samples, "Samples"
    if n is None or n < 2 or _same_inputs(task):
        reason = _NO_SAMPLES if n is None else "the batch has no two different samples"
        return Experiment(name="samples", title=title, reason=reason)
    other = task.pick(_replace_one(task, n), target=False)
    with _network(copies) as (model, loss):
        model.eval()
        traces = list[dict[str, Tensor]]()
        try:
            for one in (task, other):
                with _traced(model, n) as trace:
                    output = _run(model, with_loss(one, loss), seed).main
                if output is not None and output.dim() and len(output) == n:
                    trace[""] = output
                traces.append(trace)
                advance()
        except UsageError as error:
            return Experiment(name="samples", title=title, reason=f"in eval mode {error}")
    if not all("" in trace for trace in traces):
        return Experiment(name="samples", title=title, reason="the output is not one per sample")
    changes = {name: _change(x[1:], traces[1][name][1:]) for name, x in traces[0].items()
               if name in traces[1] and x.shape == traces[1][name].shape}  # fmt: skip
    return _about_samples(model, changes, _rounding(traces[0][""]), title)


def _about_samples(
    model: nn.Module, changes: dict[str, float], rounding: float, title: str
) -> Experiment:
    change = changes[""]
    if not math.isfinite(change):
        reason = "the output in eval mode is not finite"
        return Experiment(name="samples", title=title, reason=reason)
    how = f"changes the outputs of the others by {percent(change)} of their size"
    text = "another first sample, in eval mode, "
    text += how if change > 0 else "leaves the outputs of the others as they are"
    where = next((name for name, value in changes.items() if name and value > rounding), "")
    module = dict(model.named_modules()).get(where)
    shows, rules_out = list[tuple[str, str]](), list[tuple[str, str]]()
    if change <= rounding:
        rules_out.append(("leak", "Each output depends on its own sample only."))
    elif where and isinstance(module, _BATCH_NORMS):
        text += f", through BatchNorm without running statistics ({where})"
    else:
        at = f", first in {where}" if where else ""
        shows.append(("leak", f"Outputs depend on other samples of the batch{at}: look for a "
                      "softmax, mean, reshape or transpose over the wrong dimension."))  # fmt: skip
    return Experiment(
        name="samples", title=title, text=text, shows=tuple(shows), rules_out=tuple(rules_out),
        numbers={"change": change, "module": where or None},
    )  # fmt: skip


def compare_with_guessing(task: Task, taken: Pass) -> Experiment:
    """The loss beside that of guessing, ln K, and of the best constant output.

    Args:
        task: Batch and loss.
        taken: A pass at the weights as they are.
    """
    title, value, classes = "Guessing", float(taken.loss.detach()), task.classes(taken)
    constant = best_constant(task.target, classes, taken.name)
    if not classes:
        if math.isnan(constant):
            reason = "the loss is no cross-entropy or mean square error that is known"
            return Experiment(name="guessing", title=title, reason=reason)
        text = f"the loss is {value:.4g}; the mean of the targets alone would have {constant:.4g}"
        return Experiment(name="guessing", title=title, text=text,
                          numbers={"loss": value, "best_constant": constant})  # fmt: skip
    guess = math.log(classes)
    text = f"the loss is {value:.4g}, guessing among {classes} classes has ln {classes} = "
    text += f"{guess:.4g}, the frequencies of the labels alone {constant:.4g}"
    shows, rules_out = list[tuple[str, str]](), list[tuple[str, str]]()
    if _is_softmax(taken.main):
        shows.append(("softmax_twice", "The output is already a softmax, and the cross-entropy "
                      "applies another one: give it the logits."))  # fmt: skip
    if value > WORSE * guess:
        shows.append(("worse_than_guessing", f"The loss is {value / guess:.3g} times that of "
                      "guessing: the logits are too large, or the labels belong to other "
                      "classes."))  # fmt: skip
    elif not shows:
        below = value < 0.9 * min(guess, max(constant, 1e-12))
        words = "below" if below else "about"
        rules_out.append(("initial_loss", f"The loss is {words} that of guessing, not above."))
    return Experiment(
        name="guessing", title=title, text=text, shows=tuple(shows), rules_out=tuple(rules_out),
        numbers={"loss": value, "classes": classes, "guess": guess, "best_constant": constant},
    )  # fmt: skip


def run_once(copies: Copies, task: Task, seed: int) -> Pass:
    """A pass with its graph at the weights as they are, in train mode.

    Raises:
        UsageError: The model does not run on the batch.
    """
    with _network(copies) as (model, loss), kept_buffers(model):
        seed_everything(seed)
        return with_loss(task, loss).run(model)


@contextmanager
def _network(copies: Copies) -> Iterator[tuple[nn.Module, Callable[..., Any] | None]]:
    with copies.fresh() as made:
        yield (made.model if made.model.training else made.model.train()), made.loss


def _run(model: nn.Module, task: Task, seed: int) -> Pass:
    seed_everything(seed)
    with torch.no_grad(), kept_buffers(model):
        return task.run(model)


def _change(before: Tensor | None, after: Tensor | None) -> float:
    """RMS of the change over that of the tensor; NaN if it cannot be told."""
    if before is None or after is None or before.shape != after.shape:
        return math.nan
    old, new = before.detach().double(), after.detach().double()
    size = float(old.square().mean().sqrt())
    gap = float((new - old).square().mean().sqrt())
    return gap / size if size > 0 else (0.0 if gap == 0 else gap)


def _inputs_of(task: Task) -> list[Tensor]:
    found, n = list[Tensor](), task.samples

    def keep(x: Tensor) -> Tensor:
        if x.dim() and len(x) == n:
            found.append(x)
        return x

    task.change(inputs=keep)
    return found


def _same_inputs(task: Task) -> bool:
    return all(bool((x == x[:1]).all()) for x in _inputs_of(task))


def _replace_one(task: Task, n: int) -> Tensor:
    """Indices with the first sample replaced by one that differs from it."""
    index = torch.arange(n)
    inputs = _inputs_of(task)
    index[0] = next(i for i in range(1, n) if any(bool((x[0] != x[i]).any()) for x in inputs))
    return index


@contextmanager
def _traced(model: nn.Module, n: int) -> Iterator[dict[str, Tensor]]:
    """Outputs of all modules with one entry per sample, in the order in which they are done."""
    trace, handles = dict[str, Tensor](), []
    for name, module in model.named_modules():

        def keep(module: nn.Module, given: object, output: object, name: str = name) -> None:
            x = main_output(output)
            if name and x is not None and x.dim() and len(x) == n:
                trace.setdefault(name, x.detach().clone())

        handles.append(module.register_forward_hook(keep))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def _rounding(x: Tensor) -> float:
    """Relative differences that other kernels make."""
    return 1e3 * torch.finfo(x.dtype).eps


def _is_softmax(output: Tensor | None) -> bool:
    """Whether the rows of logits (N, K) are probabilities."""
    if output is None or output.dim() != 2 or not output.is_floating_point():
        return False
    x = output.detach().float()
    return bool((x >= 0).all() and ((x.sum(1) - 1).abs() < 1e-3).all())
