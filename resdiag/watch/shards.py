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


def mesh_of(tensor: Tensor) -> Any:  # noqa: ANN401 - torch.distributed.tensor is slow to import
    """The device mesh of a DTensor; None for any other tensor."""
    return getattr(tensor, "device_mesh", None)


def placements_of(tensor: Tensor) -> Sequence[Any]:
    """How a DTensor lies on its mesh, one placement per dimension of the mesh."""
    placements: Sequence[Any] = getattr(tensor, "placements", ())
    return placements


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are shards."""
    return any(mesh_of(p) is not None for p in model.parameters())


def is_sharding(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on a module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nobody can have called it before
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    if mesh_of(tensor) is None:
        return tensor
    dtensor: Any = tensor
    part: Tensor = dtensor.to_local()
    return part


def shares(parameters: Sequence[Tensor], ranks: int) -> list[float]:
    """At which weights the squares of all ranks' parts add up to those of the parameters.

    A shard counts once; what every rank has, a `ranks`-th; in between are copies of shards.
    """
    out = []
    for parameter in parameters:
        mesh, copies = mesh_of(parameter), 1
        if mesh is None:
            copies = ranks
        for dimension, placement in enumerate(placements_of(parameter)):
            copies *= mesh.size(dimension) if placement.is_replicate() else 1
        out.append(1 / copies)
    return out


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
