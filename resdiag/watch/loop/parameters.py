"""Observes every step of the optimizers that own a model's parameters."""

import functools
import math
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from resdiag.watch.base.hooks import Hook
from resdiag.watch.base.tensors import local, mesh_of, placements_of
from resdiag.watch.measure.reductions import norms, on_host

StepHook = Callable[[Optimizer, Collection[int] | None], None]
"""Called with an optimizer and the `id` of its parameters; None if none of them is the model's."""


class OptimizerSteps:
    """Tells about the steps of all optimizers that own a parameter of a model.

    torch's hooks for all optimizers are used, not those of one: an optimizer inside another (SAM,
    Accelerate, one per parameter) steps by itself, and the outer one's hooks would not be called.

    Those in `given` always count, e.g. owners of flattened parameters. `before` is called when the
    gradients of a step are there and the parameters still old: right before the step, or after the
    first call of its closure, which does the backward pass.
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
            members = map(id, self._model.parameters())
            ours = id(optimizer) in self._given or not ids.isdisjoint(members)
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
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: not used
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


class Shards:
    """Follows tensors and parameters through the sharded modules of a model.

    `same` is called with each input (before, after) that `fully_shard` replaced by an equal one.
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
                yield module.register_forward_pre_hook(
                    Hook(self._before), prepend=True, with_kwargs=True
                )
                yield module.register_forward_pre_hook(Hook(self._after(name)), with_kwargs=True)

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


_Index = tuple[Tensor, Tensor, Tensor]
_KEPT = 16


class ParameterNorms:
    """Per-block norms over groups of parameters.

    Those of no block count in the total only, and those of several blocks (shared weights, a block
    inside a block) in each of them. Where parameters are shards that `ranks` hold, squared norms
    are this rank's share of the whole.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        groups: Sequence[Sequence[nn.Parameter]],
        ranks: int | None = None,
    ) -> None:
        self._parameters = list(parameters)
        self._blocks = len(groups)
        at = {id(p): i for i, p in enumerate(self._parameters)}
        self._members = [(at[id(p)], row) for row, g in enumerate(groups) for p in g if id(p) in at]
        self._indices: dict[tuple[int, ...], _Index] = {}
        self._everything = tuple(range(len(self._parameters)))
        self._copies: list[Tensor] | None = None
        self._sizes: Tensor | None = None
        self._shares = None if ranks is None else torch.tensor(_shares(self._parameters, ranks))
        self._taken: set[int] = set()
        self._parts: list[tuple[tuple[int, ...], Tensor]] = []

    def forget(self) -> None:
        """Begin a step: nothing has been taken."""
        self._taken.clear()
        self._parts.clear()

    def take(self, owned: Collection[int] | None = None, scale: Tensor | float = 1.0) -> None:
        """Measure the gradients that are there and were not taken before in this step.

        Of the parameters whose `id` is in `owned`, those of the optimizer that is about to step;
        None for all. `scale` is what the loss was multiplied with, to be divided out again.
        """
        due = [
            (i, p.grad)
            for i, p in enumerate(self._parameters)
            if i not in self._taken and (owned is None or id(p) in owned)
        ]
        self._taken.update(i for i, _ in due)
        there = [(i, g if self._shares is None else local(g)) for i, g in due if g is not None]
        dense = [(i, g.coalesce().values() if g.is_sparse else g) for i, g in there]
        if dense:
            which = tuple(i for i, _ in dense)
            self._parts.append((which, self._squares([g for _, g in dense], which, scale)))

    @property
    def has_taken(self) -> bool:
        """Whether a gradient was found since `forget`."""
        return bool(self._parts)

    def missing(self) -> list[int]:
        """Blocks none of whose parameters had a gradient."""
        found = {i for which, _ in self._parts for i in which}
        seen = {row for i, row in self._members if i in found}
        return [row for row in range(self._blocks) if row not in seen]

    def gradients(self) -> tuple[Tensor, Tensor]:
        """G1 per block (L,) and the norm over all parameters, float64; NaN without gradients."""
        if not self._parts:
            return self._unknown()
        which = tuple(i for part, _ in self._parts for i in part)
        return self._sum(torch.cat([part for _, part in self._parts]), which)

    def remember(self) -> None:
        """Copy the parameters: call before the optimizer's step."""
        parameters = self._detached()
        if self._copies is None:  # kept from step to step: fresh memory costs more than the copy
            self._copies = [torch.empty_like(p) for p in parameters]
        torch._foreach_copy_(self._copies, parameters)
        self._sizes, _ = self._gather(parameters, self._everything)

    def updates(self) -> tuple[Tensor, Tensor]:
        """||after - before|| and ||before|| per block (L,), float64; call after the step."""
        if self._sizes is None or self._copies is None:
            return (self._unknown()[0],) * 2
        torch._foreach_sub_(self._copies, self._detached())
        moved, _ = self._gather(self._copies, self._everything)
        sizes, self._sizes = self._sizes, None
        return moved, sizes

    def weights(self) -> Tensor:
        """Norm over all parameters, 0-d float64."""
        return self._gather(self._detached(), self._everything)[1]

    def _detached(self) -> list[Tensor]:
        parameters = [p.detach() for p in self._parameters]
        return parameters if self._shares is None else list(map(local, parameters))

    def _gather(self, tensors: list[Tensor], which: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Root of summed squares per block, and over everything; `which` parameters they are."""
        return self._sum(self._squares(tensors, which), which) if tensors else self._unknown()

    def _unknown(self) -> tuple[Tensor, Tensor]:
        nan = torch.full((self._blocks + 1,), math.nan, dtype=torch.float64)
        return nan[:-1], nan[-1]

    def _squares(
        self, tensors: list[Tensor], which: tuple[int, ...], scale: Tensor | float = 1.0
    ) -> Tensor:
        """Squared norms (P,); of shards, this rank's share of them."""
        if on_host(tensors[0].device):
            sizes = norms(tensors)
        else:
            sizes = torch.stack(torch._foreach_norm(tensors, 2, torch.float64))
        squares = (sizes / scale).square()
        return squares if self._shares is None else squares * self._shares[list(which)].to(squares)

    def _sum(self, squares: Tensor, which: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        places, rows, present = self._index(which, squares.device)
        sums = squares.new_full((self._blocks,), math.nan).index_fill_(0, present, 0)
        sums.index_add_(0, rows, squares.index_select(0, places))
        return sums.sqrt(), squares.sum().sqrt()

    def _index(self, which: tuple[int, ...], device: torch.device) -> _Index:
        """Places in the list of tensors, their blocks, and the blocks that have any."""
        # kept: sending a list of numbers to an accelerator makes the host wait
        if which not in self._indices:
            if len(self._indices) >= _KEPT:
                self._indices.clear()
            place = {parameter: at for at, parameter in enumerate(which)}
            pairs = [(place[i], row) for i, row in self._members if i in place]
            places, rows = [p for p, _ in pairs], [r for _, r in pairs]
            send = functools.partial(torch.tensor, dtype=torch.long, device=device)
            self._indices[which] = send(places), send(rows), send(sorted(set(rows)))
        return self._indices[which]


def _shares(parameters: Sequence[Tensor], ranks: int) -> list[float]:
    """At which weights the squares of all ranks' parts add up to those of the parameters.

    A shard counts once; what every rank has, a `ranks`-th; in between are copies of shards.
    """
    out = []
    for parameter in parameters:
        mesh = mesh_of(parameter)
        copies = ranks if mesh is None else 1
        for dimension, placement in enumerate(placements_of(parameter)):
            copies *= mesh.size(dimension) if placement.is_replicate() else 1
        out.append(1 / copies)
    return out
