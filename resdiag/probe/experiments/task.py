"""The batch and the loss of an examination, in the forms that training loops have."""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from resdiag.errors import UsageError
from resdiag.models.source import error_words
from resdiag.probe.batch import main_output
from resdiag.probe.experiments.default_loss import cross_entropy_classes, default_loss, own_loss
from resdiag.watch.base.tensors import tensors_in

LABELS = ("labels", "label", "label_ids", "targets", "target", "y")
"""Names under which a batch, or a model's `forward`, has the target."""
_MODELS = ("model", "net", "network", "module")
_FORMS = "(inputs, target), a dict, or a tuple of the model's inputs"


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """One forward pass.

    Attributes:
        loss: A scalar with its graph.
        output: What the model returned.
        name: The loss in words.
    """

    loss: Tensor
    output: object
    name: str

    @property
    def main(self) -> Tensor | None:
        """The tensor named `logits` in the output, else its first floating one."""
        return main_output(self.output)


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A batch and what is minimised on it.

    Attributes:
        batch: As it was given; one tensor as a tuple of one.
        key: Index or key of the target in the batch; None if there is none.
        loss: None for the model's own or the default loss.
        takes_model: Whether `loss` is a function of (model, batch), not of (output, target).
    """

    batch: Any
    key: int | str | None
    loss: Callable[..., Any] | None
    takes_model: bool

    @property
    def target(self) -> object:
        """The target; None if there is none."""
        return None if self.key is None else self.batch[self.key]

    @property
    def inputs(self) -> object:
        """What the batch holds besides the target."""
        if self.key is None or not isinstance(self.batch, Mapping | tuple | list):
            return self.batch
        if isinstance(self.batch, Mapping):
            return {name: value for name, value in self.batch.items() if name != self.key}
        rest = tuple(value for i, value in enumerate(self.batch) if i != self.key)
        return rest[0] if len(rest) == 1 else rest

    @property
    def first_input(self) -> Tensor | None:
        """The first tensor of the inputs."""
        return next(tensors_in(self.inputs), None)

    @property
    def samples(self) -> int | None:
        """How many samples the batch has; None where its tensors do not agree on that."""
        inputs, target = list(tensors_in(self.inputs)), list(tensors_in(self.target))
        sizes = {len(x) for x in (*inputs[:1], *target) if x.dim()}
        return sizes.pop() if inputs and inputs[0].dim() and len(sizes) == 1 else None

    def change(
        self,
        inputs: Callable[[Tensor], Tensor] | None = None,
        target: Callable[[Tensor], Tensor] | None = None,
    ) -> "Task":
        """A copy whose tensors are changed by these functions."""

        def changed(key: object, value: object) -> object:
            change = target if key == self.key else inputs
            return value if change is None else map_tensors(value, change)

        batch = self.batch
        if isinstance(batch, Mapping):
            batch = _like(batch, {key: changed(key, value) for key, value in batch.items()})
        elif isinstance(batch, tuple | list):
            batch = _like(batch, [changed(i, value) for i, value in enumerate(batch)])
        return replace(self, batch=batch)

    def pick(self, index: Tensor, *, inputs: bool = True, target: bool = True) -> "Task":
        """The samples of these indices, in the inputs, in the target, or in both."""
        count = self.samples

        def take(x: Tensor) -> Tensor:
            return x[index.to(x.device)] if x.dim() and len(x) == count else x

        return self.change(take if inputs else None, take if target else None)

    def to(self, dtype: torch.dtype) -> "Task":
        """With floating tensors of this type; a loss that is a module is copied."""

        def cast(x: Tensor) -> Tensor:
            return x.to(dtype) if x.is_floating_point() else x

        loss = self.loss
        if isinstance(loss, nn.Module):
            loss = copy.deepcopy(loss).to(dtype)
        return replace(self.change(cast, cast), loss=loss)

    def run(self, model: nn.Module) -> Pass:
        """One forward pass and its loss; the batch stays as it is, whatever the model does to it.

        Raises:
            UsageError: The model does not run on the batch, or there is no loss of this form.
        """
        task = self.change(_clone, _clone)
        if task.takes_model:
            return task._run_loss_of_model(model)
        try:
            output = task._call(model)
        except Exception as error:
            raise UsageError(
                f"the model does not run on this batch: {error_words(error, 300)}",
                f"a batch is {_FORMS}",
            ) from error
        return task._with_loss(output)

    def classes(self, taken: Pass) -> int:
        """K where the loss is the cross-entropy of K classes with the target, else 0."""
        if taken.main is None or not isinstance(self.target, Tensor):
            return 0
        return cross_entropy_classes(taken.main, self.target, float(taken.loss.detach()))

    def describe(self) -> str:
        """The form of the batch: sizes and types of its tensors."""
        words = [f"{_short(x)}" for x in islice(tensors_in(self.inputs), 3)]
        target = next(tensors_in(self.target), None)
        if target is not None:
            words.append(f"target {_short(target)}")
        return ", ".join(words)

    def _call(self, model: nn.Module) -> object:
        """The model's output."""
        named, inputs = _parameters(model.forward), self.inputs
        accepts = {name for name in LABELS if name in named}
        if isinstance(self.batch, Mapping):
            given = dict(self.batch)
            takes_any = any(p.kind is p.VAR_KEYWORD for p in named.values())
            wanted = self.loss is None or _is_required(named.get(str(self.key)))
            if self.key is not None and not (wanted and (self.key in accepts or takes_any)):
                del given[self.key]
            return model(**given)
        extra = {}
        if self.loss is None and self.key is not None and accepts:
            extra = {min(accepts, key=LABELS.index): self.target}
        if isinstance(inputs, Mapping):
            return model(**inputs, **extra)
        return model(*inputs, **extra) if isinstance(inputs, tuple) else model(inputs, **extra)

    def _with_loss(self, output: object) -> Pass:
        if self.loss is not None:
            given = (output,) if self.key is None else (output, self.target)
            try:
                value = self.loss(*given)
            except Exception as error:
                words = error_words(error, 300)
                raise UsageError(f"the loss does not take the model's output: {words}") from error
            return Pass(loss=_check_scalar(value), output=output, name=_name_of(self.loss))
        own = own_loss(output)
        if own is not None:
            return Pass(loss=_check_scalar(own), output=output, name="the model's own loss")
        value, name = default_loss(main_output(output), self.target)
        return Pass(loss=value, output=output, name=name)

    def _run_loss_of_model(self, model: nn.Module) -> Pass:
        outputs = list[object]()
        handle = model.register_forward_hook(lambda module, given, output: outputs.append(output))
        assert self.loss is not None
        try:
            value = self.loss(model, self.batch)
        except Exception as error:
            raise UsageError(f"loss(model, batch) fails: {error_words(error, 300)}") from error
        finally:
            handle.remove()
        if not outputs:
            raise UsageError(
                "loss(model, batch) does not call the model that it is given",
                "an examination trains copies: use the argument, not a variable from outside",
            )
        return Pass(loss=_check_scalar(value), output=outputs[-1], name=_name_of(self.loss))


def open_task(model: nn.Module, batch: object, loss: Callable[..., Any] | None) -> Task:
    """Find out which part of a batch is the target and what the loss takes.

    Args:
        model: Whose `forward` says how many inputs it needs.
        batch: (inputs, target), a dict of keyword arguments, a tuple of inputs, or one tensor.
        loss: A function of (output, target), of the output, or of (model, batch): of the latter
            where its first parameter is called model, net, network or module, or where it has two
            parameters and the batch has no target.

    Raises:
        UsageError: The batch or the loss is nothing of that.
    """
    if loss is not None and not callable(loss):
        raise UsageError(f"loss must be a function, not {type(loss).__name__}")
    names = [] if loss is None or isinstance(loss, nn.Module) else list(_parameters(loss))
    named_model = bool(names) and names[0] in _MODELS
    value: Any = (batch,) if isinstance(batch, Tensor) else batch
    key: int | str | None = None
    if isinstance(value, Mapping):
        key = next((name for name in LABELS if name in value), None)
    elif isinstance(value, tuple | list):
        needed = sum(_is_required(p) for p in _parameters(model.forward).values())
        nested = len(value) == 2 and not isinstance(value[0], Tensor)  # several inputs, target
        has_target = len(value) >= 2 and (needed < len(value) or named_model or nested)
        key = len(value) - 1 if has_target else None
    elif not named_model:
        raise UsageError(f"a batch is {_FORMS}, not {type(batch).__name__}")
    if not named_model and next(tensors_in(value), None) is None:
        raise UsageError("the batch holds no tensor", f"a batch is {_FORMS}")
    takes_model = named_model or (key is None and len(names) == 2)
    return Task(batch=value, key=key, loss=loss, takes_model=takes_model)


def map_tensors(value: object, change: Callable[[Tensor], Tensor]) -> Any:  # noqa: ANN401
    """The same nested tuples, lists and dicts with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return _like(value, {key: map_tensors(item, change) for key, item in value.items()})
    if isinstance(value, tuple | list):
        return _like(value, [map_tensors(item, change) for item in value])
    return value


def _like(value: Any, items: Any) -> Any:  # noqa: ANN401
    """Items in a container of the kind of `value`."""
    if hasattr(value, "_fields"):
        return type(value)(*items)
    try:
        return type(value)(items)
    except TypeError:
        return items


def _clone(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def _short(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {'x'.join(map(str, x.shape)) or 'scalar'}"


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C
        return {}


def _is_required(parameter: inspect.Parameter | None) -> bool:
    """Whether a positional parameter has no default."""
    if parameter is None or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return False
    return parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY


def _name_of(loss: Callable[..., Any]) -> str:
    name = getattr(loss, "__name__", type(loss).__name__)
    return "the loss given" if name == "<lambda>" else name


def _check_scalar(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise UsageError(f"the loss is no tensor but {type(value).__name__}")
    if value.numel() != 1 or not value.is_floating_point():
        raise UsageError(f"the loss must be one floating number, not {_short(value)}")
    return value.reshape(())
