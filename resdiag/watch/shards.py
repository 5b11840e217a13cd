"""What `fully_shard` does to a model: parameters become shards, and whole ones pass through.

While a block runs, its modules hold whole parameters, other objects than the shards that the
optimizer knows; and each input of a sharded module is replaced by an equal tensor of another
identity, behind which autograd reduces the gradients.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from resdiag.watch.base.tensors import mesh_of


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are shards."""
    return any(mesh_of(p) is not None for p in model.parameters())


def is_sharding(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on a module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nobody can have called it before
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


class Shards:
    """Follows tensors and parameters through the sharded modules of a model.

    Args:
        model: The root module.
        same: Told of each input (before, after) that was replaced by an equal one.
    """

    def __init__(self, model: nn.Module, same: Callable[[Tensor, Tensor], None]) -> None:
        self._model, self._same = model, same
        self._names: dict[int, str] = {}
        self._given: dict[nn.Module, list[Tensor]] = {}
        self._handles = list(self._install())

    def close(self) -> None:
        """Remove every hook; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

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
                    self._same(old, new)

        return hook


def _direct(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
