"""Copies of a model, its optimizer and its loss to experiment on; the originals do not change."""

import copy
import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resdiag.models.source import error_words

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_TABLES = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True, kw_only=True, eq=False)
class Copy:
    """What an experiment may change.

    Attributes:
        model: In the modes of the original.
        optimizer: Of the copy's parameters, with the state and settings of the original one.
        loss: As it was given, copied where it is a module.
    """

    model: nn.Module
    optimizer: Optimizer | None
    loss: Callable[..., Any] | None


class Copies:
    """Makes copies; where the model cannot be copied, the original itself, put back afterwards.

    Args:
        model: The model.
        optimizer: Of its parameters.
        loss: Of its outputs.

    Attributes:
        reason: Why the model cannot be copied; "" if it can.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None, loss: Callable[..., Any] | None
    ) -> None:
        self._model, self._optimizer, self._loss = model, optimizer, loss
        self.reason = ""
        try:
            self._copy()
        except Exception as error:  # e.g. tensors with a graph among a module's attributes
            self.reason = error_words(error, 160)

    @contextmanager
    def fresh(self) -> Iterator[Copy]:
        """A copy at the state of the originals."""
        with _kept_gradients(self._model):
            if not self.reason:
                yield self._copy()
                return
            with _put_back(self._model):
                # the copy of the optimizer keeps the parameters that it has
                same: dict[int, Any] = {id(p): p for p in self._model.parameters()}
                optimizer = _complete(self._optimizer, copy.deepcopy(self._optimizer, same), same)
                yield Copy(model=self._model, optimizer=optimizer, loss=self._loss)

    def _copy(self) -> Copy:
        loss = self._loss if isinstance(self._loss, nn.Module) else None
        memo = _without_our_hooks(self._model) | _without_graphs(self._model)
        model, optimizer, copied = copy.deepcopy((self._model, self._optimizer, loss), memo)
        return Copy(
            model=model, optimizer=_complete(self._optimizer, optimizer, memo),
            loss=self._loss if copied is None else copied,
        )  # fmt: skip


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Put back the random states of PyTorch on the CPU and CUDA devices, of Python and of NumPy."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - models may use it
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def seed_everything(seed: int) -> None:
    """The random states of one pass; called within `kept_random_state`."""
    # torch.manual_seed also seeds a CUDA that is not initialised yet, which cannot be put back
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Put back a model's buffers: running statistics that a pass moves."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@contextmanager
def _kept_gradients(model: nn.Module) -> Iterator[None]:
    """Set the gradients aside: a loss may reach the original by a closure."""
    before = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Put back weights, buffers, modes, attributes and hooks of a model, bit for bit."""
    tensors = [*model.parameters(), *model.buffers()]
    before = [(x, x.detach().clone(), x.requires_grad) for x in tensors]
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    tables = [
        (table, dict(table))
        for module in model.modules()
        for table in (vars(module).get(name, {}) for name in (*_HOOKS, *_TABLES))
    ]
    for module in model.modules():
        for name in _HOOKS:
            table = vars(module).get(name, {})
            for key in [key for key, hook in table.items() if _is_ours(hook)]:
                del table[key]
    try:
        yield
    finally:
        for table, entries in tables:
            table.clear()
            table.update(entries)
        for module, entries in attributes:
            vars(module).clear()
            vars(module).update(entries)
        with torch.no_grad():
            for x, value, requires_grad in before:
                x.copy_(value)
                if x.is_leaf:
                    x.requires_grad_(requires_grad)


def _complete(
    original: Optimizer | None, copied: Optimizer | None, memo: dict[int, Any]
) -> Optimizer | None:
    """Copy the attributes of subclasses, too, which torch leaves out when it copies an optimizer.

    Hooks are left out, and so is a `step` that a scheduler has replaced: they act on the original.
    """
    if original is None or copied is None:
        return None
    for name, value in vars(original).items():
        if name not in vars(copied) and name != "step" and "hook" not in name:
            with suppress(TypeError, RuntimeError):
                setattr(copied, name, copy.deepcopy(value, memo))
    return copied


def _without_our_hooks(model: nn.Module) -> dict[int, Any]:
    """A memo of `copy.deepcopy` by which monitors are not copied and do not see the copies."""
    memo = dict[int, Any]()
    for module in model.modules():
        for name in _HOOKS:
            table = vars(module).get(name, {})
            if any(map(_is_ours, table.values())):
                kept = {key: hook for key, hook in table.items() if not _is_ours(hook)}
                memo[id(table)] = type(table)(kept)
    return memo


def _without_graphs(model: nn.Module) -> dict[int, Any]:
    """A memo by which computed tensors that modules keep, as weight_norm does, are copied."""
    values = [value for module in model.modules() for value in vars(module).values()]
    computed = [x for x in values if isinstance(x, Tensor) and x.grad_fn is not None]
    return {id(x): x.detach().clone() for x in computed}


def _is_ours(hook: Any) -> bool:  # noqa: ANN401
    """Whether a hook belongs to a monitor or lesion of resdiag."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith("resdiag.")


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that ask for a gradient, by name, shared ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
