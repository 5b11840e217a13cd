"""Sees every step of the optimizers that own a model's parameters, whoever calls them."""

import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

Told = Callable[[Optimizer, Collection[int] | None], None]
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
        self, model: nn.Module, given: Iterable[Optimizer], before: Told, after: Told
    ) -> None:
        self._model, self._given = model, {id(optimizer) for optimizer in given}
        self._before, self._after = before, after
        self._owned: weakref.WeakKeyDictionary[Optimizer, tuple[int, frozenset[int]]] = (
            weakref.WeakKeyDictionary()
        )
        # the hooks are global: they must not keep a model alive whose monitor was never closed
        ours = weakref.ref(self)

        def begins(*args: Any) -> Any:  # noqa: ANN401
            steps = ours()
            return None if steps is None else steps._step_begins(*args)

        def ends(*args: Any) -> None:  # noqa: ANN401
            steps = ours()
            if steps is not None:
                steps._step_ends(*args)

        handles = [
            register_optimizer_step_pre_hook(begins),
            register_optimizer_step_post_hook(ends),
        ]
        self._remove = weakref.finalize(self, _remove, handles)

    def close(self) -> None:
        """Remove the hooks; safe to call twice."""
        self._remove()

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
        wrapped = self._telling(closure, optimizer, owned)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _step_ends(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self._after(optimizer, self._parameters(optimizer))

    def _telling(
        self, closure: Callable[[], Any], optimizer: Optimizer, owned: Collection[int] | None
    ) -> Callable[[], Any]:
        """The closure; its first call is followed by `before`."""
        calls = 0

        def call() -> Any:  # noqa: ANN401
            nonlocal calls
            result = closure()
            calls += 1
            if calls == 1:
                self._before(optimizer, owned)
            return result

        return call

    def _parameters(self, optimizer: Optimizer) -> frozenset[int] | None:
        """The `id` of its parameters; None if none is the model's."""
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._owned.get(optimizer)
        if known is None or known[0] != count:  # a group may be added, e.g. when thawing
            ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
            ours = id(optimizer) in self._given or any(
                id(p) in ids for p in self._model.parameters()
            )
            known = self._owned[optimizer] = count, frozenset(ids) if ours else frozenset()
        return known[1] or None


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
