"""Gradients checked numerically: autograd beside central differences, for the model and by part."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resdiag.errors import UsageError
from resdiag.probe.experiments.copies import Copies, trainable
from resdiag.probe.experiments.experiment import Experiment, some
from resdiag.probe.experiments.parts import Part, find_parts, order_of_run
from resdiag.probe.experiments.quotients import (
    DOUBLE,
    Difference,
    LossOfParameters,
    Precision,
    jitter,
)
from resdiag.probe.experiments.task import Task
from resdiag.probe.experiments.trial import with_loss

SAMPLES = 4
"""Samples of the batch that the check takes: whether a gradient is right does not depend on it."""
_DIRECTIONS = 3  # of the whole model; of each part one
_SINGLY = 24  # parameters without a gradient that are checked one by one
_TITLE = "Gradients"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One part, or the whole model under the name "".

    Attributes:
        name: Of the part.
        differences: One per direction.
        unreached: Parameters without a gradient on which the loss depends.
        unused: Parameters without a gradient on which it does not depend.
    """

    name: str
    differences: tuple[Difference, ...]
    unreached: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def worst(self) -> Difference:
        """The direction with the largest error."""
        return max(self.differences, key=lambda difference: difference.error)

    def is_wrong(self, precision: Precision) -> bool:
        """Whether the gradient is wrong along any direction."""
        return any(one.is_wrong(precision.tolerance) for one in self.differences)


def check_gradients(
    copies: Copies, task: Task, seed: int, advance: Callable[[], None]
) -> Experiment:
    """Compare the gradient with difference quotients on a copy in float64.

    Args:
        copies: Of the model.
        task: Batch and loss.
        seed: Of the directions and of the random numbers of a pass, the same in all of them.
        advance: Called after every pass.
    """
    if copies.reason:
        return _not_done(f"it needs a copy, and the model cannot be copied: {copies.reason}")
    with copies.fresh() as made:
        model = made.model if made.model.training else made.model.train()
        task = with_loss(task, made.loss)
        if task.samples is not None and task.samples > SAMPLES:
            task = task.pick(torch.arange(SAMPLES))
        try:
            task = task.to(torch.float64)
            order_of_run(model.double(), task, [])
        except (UsageError, RuntimeError, TypeError) as error:
            return _not_done(f"no pass in float64: {error}")
        return _check(model, task, seed, advance)


def _check(model: nn.Module, task: Task, seed: int, advance: Callable[[], None]) -> Experiment:
    loss, mode = LossOfParameters(model, task, seed, advance), "train"
    if not loss.is_repeatable():
        model.eval()
        mode = "eval"
        if not loss.is_repeatable():
            return _not_done(
                "two passes with the same seed differ: it draws its own random numbers"
            )
    precision = loss.precision(trainable(model))
    if precision is None:
        return _not_done("the model computes in half precision inside, too coarse for differences")
    broken = [k for k, g in loss.gradient().items() if not bool(torch.isfinite(g).all())]
    if broken:
        text = f"the gradient of {some(broken)} is not finite"
        return Experiment(
            name="gradients", title=_TITLE, text=text, numbers={"not_finite": broken},
            shows=(("gradient_not_finite", f"{text[0].upper()}{text[1:]}, although the loss is: "
                    "look for a square root, norm or division at 0."),),
        )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    jitter(trainable(model), generator)
    gradient = loss.gradient()
    parts = order_of_run(model, task, find_parts(model))
    every = {name: p for part in parts for name, p in part.parameters.items()}
    whole = Checked(name="", differences=tuple(
        loss.compare(every, gradient, precision, generator) for _ in range(_DIRECTIONS)
    ))  # fmt: skip
    checked = [_check_part(loss, part, gradient, precision, generator) for part in parts]
    if whole.is_wrong(precision) and not any(part.is_wrong(precision) for part in checked):
        # along one direction a part can look right by chance
        checked = [_check_part(loss, part, gradient, precision, generator, _DIRECTIONS)
                   for part in parts]  # fmt: skip
    return _describe(whole, checked, precision, mode)


def _check_part(
    loss: LossOfParameters, part: Part, gradient: Mapping[str, Tensor], precision: Precision,
    generator: torch.Generator, directions: int = 1,
) -> Checked:  # fmt: skip
    """Parameters with a gradient together, those without one by one."""
    reached = {k: p for k, p in part.parameters.items() if k in gradient}
    missing = {k: p for k, p in part.parameters.items() if k not in gradient}
    differences = list[Difference]()
    if reached:
        differences += [loss.compare(reached, gradient, precision, generator)
                        for _ in range(directions)]  # fmt: skip
    unreached, unused = list[str](), list[str]()
    groups = [{k: p} for k, p in missing.items()] if len(missing) <= _SINGLY else [missing]
    for group in groups:
        one = loss.compare(group, {}, precision, generator)
        (unreached if one.depends else unused).extend(group)
        if not reached:
            differences.append(one)
    return Checked(
        name=part.name, differences=tuple(differences), unreached=tuple(unreached),
        unused=tuple(unused),
    )  # fmt: skip


def _describe(
    whole: Checked, parts: Sequence[Checked], precision: Precision, mode: str
) -> Experiment:
    wrong = [p for p in parts if p.is_wrong(precision) and not _is_cut(p)]
    cut = [p for p in parts if p.unreached]
    unused = [name for p in parts for name in p.unused]
    error = whole.worst.error
    how = "float64" if precision is DOUBLE else "float32, because the model casts inside"
    text = f"relative error {error:.1e} along {_DIRECTIONS} random directions of all parameters "
    text += f"({how}, {mode} mode, the same random numbers in every pass)"
    shows, rules_out, remarks = list[tuple[str, str]](), list[tuple[str, str]](), []
    if cut:
        shows.append(("no_gradient", _about_cut(parts, cut)))
    if wrong and not (cut and _is_before(parts, wrong, cut)):
        shows.append(("gradient_wrong", _about_wrong(parts, wrong)))
    if not shows and not whole.is_wrong(precision):
        rules_out.append(
            ("gradient", f"The gradient is right to {error:.0e}, in the model and in each of "
                         f"{len(parts)} parts.")
        )  # fmt: skip
    elif not shows:
        shows.append(("gradient_wrong", "The gradient of the whole model is wrong, that of no "
                      f"part: autograd gives {_beside(whole.worst)}."))  # fmt: skip
    if unused:
        remarks.append(
            ("unused", f"The loss does not depend on {some(unused)}: no gradient is right there.")
        )
    return Experiment(
        name="gradients",
        title=_TITLE,
        text=text,
        numbers={
            "error": error, "precision": str(precision.dtype).removeprefix("torch."), "mode": mode,
            "parts": [
                {
                    "name": p.name, "error": p.worst.error, "numeric": p.worst.numeric,
                    "autograd": p.worst.autograd, "wrong": p.is_wrong(precision),
                    "unreached": list(p.unreached), "unused": list(p.unused),
                }
                for p in parts
            ],
        },
        lines=tuple(
            f"{p.name:<40}{p.worst.error:>9.1e}  {_state(p, precision)}"
            for p in parts if p.is_wrong(precision) or p.unreached
        ),
        shows=tuple(shows),
        rules_out=tuple(rules_out),
        open=tuple(remarks),
    )  # fmt: skip


def _about_cut(parts: Sequence[Checked], cut: Sequence[Checked]) -> str:
    """Where the gradient ends, from the order in which the parts run."""
    names = [name for p in cut for name in p.unreached]
    whole = [p.name for p in cut if _is_cut(p)]
    text = f"No gradient reaches {some(whole or names)}, although the loss depends on "
    text += "it" if len(whole or names) == 1 else "them"
    last = max(parts.index(p) for p in cut)
    if whole and last + 1 < len(parts):
        text += f": it is cut between {parts[last].name} and {parts[last + 1].name}"
    return f"{text} (a detach, .data, torch.no_grad, NumPy or rounding in the forward pass)."


def _about_wrong(parts: Sequence[Checked], wrong: Sequence[Checked]) -> str:
    """Which gradients are wrong: all before a faulty operation, and none after it."""
    last = wrong[-1]
    text = f"The gradient of {some([p.name for p in wrong])} is wrong: for {last.name} autograd "
    text += f"gives {_beside(last.worst)}"
    after = parts[parts.index(last) + 1 :]
    if after:
        text += f"; from {after[0].name} to the loss it is right, so the fault lies in {last.name} "
        text += "or just after it"
    text += (
        ". Look for custom backward functions, detach and in-place changes, unless it is meant, "
    )
    return f"{text}as in a straight-through estimator or a stop-gradient."


def _beside(one: Difference) -> str:
    if one.numeric == 0:
        return f"{one.autograd:.4g}, differences 0"
    ratio = one.autograd / one.numeric
    return f"{one.autograd:.4g}, differences {one.numeric:.4g} (a ratio of {ratio:.3g})"


def _is_cut(part: Checked) -> bool:
    """Whether no parameter of the part that matters has a gradient."""
    return bool(part.unreached) and all(one.autograd == 0 for one in part.differences)


def _is_before(parts: Sequence[Checked], wrong: Sequence[Checked], cut: Sequence[Checked]) -> bool:
    return max(map(parts.index, wrong)) <= max(map(parts.index, cut))


def _state(part: Checked, precision: Precision) -> str:
    if part.unreached:
        return "no gradient"
    return "wrong" if part.is_wrong(precision) else "right"


def _not_done(reason: str) -> Experiment:
    return Experiment(name="gradients", title=_TITLE, reason=reason)
