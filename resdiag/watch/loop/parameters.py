"""Sees every step of the optimizers that own a model's parameters, whoever calls them."""

import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from resdiag.watch.base.tensors import mesh_of

StepHook = Callable[[Optimizer, Collection[int] | None], None]
"""Called with an optimizer and the `id` of its parameters; None if none of them is the model's."""


class OptimizerSteps:
    """Tells about the steps of all optimizers that own a parameter of a model.

    torch's hooks for all optimizers are used, not those of one: an optimizer inside another (SAM,
    Accelerate, one per parameter) steps by itself, and the outer one's hooks would not be called.

    Args:
        model: Whose parameters count.
        given: Optimizers that count whatever they own, e.g. of flattened parameters.
        before: Called when the gradients of a step are there and the parameters still old: right
            before the step, or after the first call of its closure, which does the backward pass.
        after: Called right after the step.
    """

    def __init__(
        self, model: nn.Module, given: Iterable[Optimizer], before: StepHook, after: StepHook
    ) -> None:
        self._model, self._given = model, {id(optimizer) for optimizer in given}
        self._before, self._after = before, after
        self._owned = weakref.WeakKeyDictionary[Optimizer, tuple[int, frozenset[int]]]()
        # the hooks are global: they must not keep a model alive whose monitor was never closed
        begins, ends = weakref.WeakMethod(self._step_begins), weakref.WeakMethod(self._step_ends)
        hooks = ExitStack()
        hooks.callback(register_optimizer_step_pre_hook(_weakly(begins)).remove)
        hooks.callback(register_optimizer_step_post_hook(_weakly(ends)).remove)
        self.close = weakref.finalize(self, hooks.close)
        """Removes the hooks; safe to call twice."""

    def owners(self) -> list[int]:
        """The `id` of the optimizers known to own a parameter of the model."""
        return [*self._given, *(id(one) for one, (_, ids) in self._owned.items() if ids)]

    def _step_begins(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        owned = self._parameters(optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._before(optimizer, owned)
            return None
        called = False

        def wrapped() -> Any:  # noqa: ANN401
            nonlocal called
            result = closure()
            if not called:
                called = True
                self._before(optimizer, owned)
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _step_ends(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self._after(optimizer, self._parameters(optimizer))

    def _parameters(self, optimizer: Optimizer) -> frozenset[int] | None:
        """The `id` of its parameters; None if none is the model's."""
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._owned.get(optimizer)
        if known is None or known[0] != count:  # a group may be added, e.g. when thawing
            ids = frozenset(id(p) for group in optimizer.param_groups for p in group["params"])
            ours = id(optimizer) in self._given or any(
                id(p) in ids for p in self._model.parameters()
            )
            known = self._owned[optimizer] = count, ids if ours else frozenset()
        return known[1] or None


def _weakly(method: "weakref.WeakMethod[Any]") -> Callable[..., Any]:
    def call(*args: Any) -> Any:  # noqa: ANN401
        alive = method()
        return None if alive is None else alive(*args)

    return call


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are shards."""
    return any(mesh_of(p) is not None for p in model.parameters())


def is_sharding(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on a module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nobody can have called it before
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


class Shards:
    """Follows tensors and parameters through the sharded modules of a model.

    `same` is told of each input (before, after) that `fully_shard` replaced by an equal one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.same: Callable[[Tensor, Tensor], None] = lambda before, after: None
        self._model = model
        self._names: dict[int, str] = {}
        self._given: dict[nn.Module, list[Tensor]] = {}
        self._hooks = ExitStack()
        for handle in self._install():
            self._hooks.callback(handle.remove)

    def close(self) -> None:
        """Remove every hook; safe to call twice."""
        self._hooks.close()

    def owned(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """The model's own parameters in the place of the whole ones that were seen in a pass."""
        own = dict(self._model.named_parameters()) if self._names else {}
        return [own.get(self._names.get(id(p), ""), p) for p in parameters]

    def _install(self) -> Iterator[RemovableHandle]:
        for name, module in self._model.named_modules():
            if is_sharding(module):
                # the first one runs before fully_shard's own, the second one after it
                yield module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
                yield module.register_forward_pre_hook(self._after(name), with_kwargs=True)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given[module] = _direct(args, kwargs)

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            prefix = f"{name}." if name else ""
            for own, parameter in module.named_parameters():
                if mesh_of(parameter) is None:
                    self._names[id(parameter)] = prefix + own
            given = self._given.pop(module, [])
            for old, new in zip(given, _direct(args, kwargs), strict=False):
                equal = old.shape == new.shape and old.data_ptr() == new.data_ptr()
                if old is not new and equal and old.dtype == new.dtype:
                    self.same(old, new)

        return hook


def _direct(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def may_reduce() -> bool:
    """Whether a reduction over ranks may rewrite gradients; a DDP of one rank does so too."""
    return dist.is_available() and dist.is_initialized()
