"""Tensors inside what functions take and return, values kept for tensors, and parts of DTensors."""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

V = TypeVar("V")


def tensors_in(values: object) -> Iterator[Tensor]:
    """Tensors inside nested tuples, lists, dicts and dataclass-like outputs, in order."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from tensors_in(value)
    elif is_dataclass(values):
        for field_ in fields(values):
            yield from tensors_in(getattr(values, field_.name))


def first_floating(tensors: Iterable[Tensor]) -> Tensor | None:
    """The first tensor of a floating type, or None."""
    return next((x for x in tensors if x.is_floating_point()), None)


class TensorTable(Generic[V]):
    """A value for a tensor, kept as long as that very object lives; the tensor is not held.

    `versioned`: a value is lost as well when somebody writes to its tensor.
    """

    __slots__ = ("_kept", "_versioned")

    def __init__(self, *, versioned: bool = False) -> None:
        # a WeakKeyDictionary compares keys with ==, which is elementwise for tensors; an `id` alone
        # is given again to the next tensor that is made
        self._kept: dict[int, tuple[weakref.ref[Tensor], V, int]] = {}
        self._versioned = versioned

    def get(self, tensor: Tensor) -> V | None:
        """The tensor's value, None if it has none."""
        found = self._kept.get(id(tensor))
        if found is None or found[0]() is not tensor:
            return None
        return found[1] if not self._versioned or found[2] == tensor._version else None

    def set(self, tensor: Tensor, value: V, version: int | None = None) -> None:
        """Keep a value for a tensor, as it is now or as it was at an earlier `version`."""
        if version is None:
            version = tensor._version if self._versioned else 0
        self._kept[id(tensor)] = weakref.ref(tensor), value, version

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()


def mesh_of(tensor: Tensor) -> Any:  # noqa: ANN401 - torch.distributed.tensor is slow to import
    """The device mesh of a DTensor; None for any other tensor."""
    return getattr(tensor, "device_mesh", None)


def placements_of(tensor: Tensor) -> Sequence[Any]:
    """How a DTensor lies on its mesh, one placement per dimension of the mesh."""
    placements: Sequence[Any] = getattr(tensor, "placements", ())
    return placements


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    part: Tensor = tensor if mesh_of(tensor) is None else cast(Any, tensor).to_local()
    return part
