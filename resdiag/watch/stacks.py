"""Sums that are written as `torch.stack([h, f]).sum(0)`."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from resdiag.watch.base.tensors import TensorTable, tensors_in
from resdiag.watch.sums import Operand, Sum

_OPERANDS = 2


class Stacks:
    """Pairs of tensors that were stacked in one pass."""

    def __init__(self) -> None:
        self._pairs = TensorTable[tuple[list[weakref.ref[Tensor]], int]]()

    def clear(self) -> None:
        """Forget the pass."""
        self._pairs.clear()

    def add(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor) -> bool:
        """Remember two stacked tensors; whether there were two."""
        tensors = list(tensors_in(args[:1]))
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % result.dim()
        if len(tensors) != _OPERANDS:
            return False
        kept = [weakref.ref(tensor) for tensor in tensors]
        self._pairs.set(result, (kept, dim))
        return True

    def read(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Sum | None:
        """The sum over the stacking dimension of two stacked tensors, if the call is one."""
        if func not in (torch.sum, Tensor.sum) or len(args) != _OPERANDS:
            return None
        kept, dim = self._pairs.get(args[0]) or ([], 0)
        if not kept or args[1] not in (dim, (dim,), [dim]):
            return None
        left, right = (tensor() for tensor in kept)
        if left is None or right is None:
            return None
        return Sum(Operand((left,)), Operand((right,)))
