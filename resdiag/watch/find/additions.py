"""The spellings of an addition: which torch calls add two tensors, and what goes into the sum."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resdiag.watch.base.functions import Call

_ADD = frozenset(
    {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
)
_SUB = frozenset(
    {torch.sub, torch.subtract, Tensor.sub, Tensor.sub_, Tensor.subtract, Tensor.subtract_}
    | {Tensor.__sub__, Tensor.__isub__}
)
_ADDCMUL = frozenset({torch.addcmul, Tensor.addcmul, Tensor.addcmul_})
_ADDMM = frozenset(
    {torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.addmm_, Tensor.baddbmm, Tensor.baddbmm_}
)
_LERP = frozenset({torch.lerp, Tensor.lerp, Tensor.lerp_})

ADDITIONS = _ADD | _SUB | _ADDCMUL | _ADDMM | _LERP


@dataclass(frozen=True)
class Operand:
    """One side of an addition.

    Attributes:
        inputs: The tensor, or the tensors from which a fused call makes it.
        scale: Factor with which it enters the sum.
        call: How it is made of several inputs; None for a tensor that is there.
    """

    inputs: tuple[Tensor, ...]
    scale: float = 1.0
    call: Call | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the operand."""
        if self.call is None:
            return self.inputs[0].shape
        if self.call.is_transform:
            return torch.Size((*self.inputs[0].shape[:-1], *self.inputs[1].shape[-1:]))
        return torch.Size(torch.broadcast_shapes(*(x.shape for x in self.inputs)))

    def make(self) -> Tensor:
        """The tensor itself, computed without a graph where a fused call never wrote it out."""
        if self.call is None:
            return self.inputs[0]
        with torch.no_grad():
            made: Tensor = self.call.function(*self.inputs)
        return made


def rest_of(x: Tensor, gate: Tensor) -> Tensor:
    """What a gate leaves of a tensor: (1 - gate) * x."""
    return x - gate * x


@dataclass(frozen=True)
class Sum:
    """An addition of two operands; a difference has a negative scale on the right."""

    left: Operand
    right: Operand
    is_difference: bool = False


def read_sum(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Sum | None:
    """The two operands of a call in `ADDITIONS`; None if one is a number.

    >>> x, gamma, f = torch.ones(2), torch.full((2,), 0.1), torch.ones(2)
    >>> read_sum(torch.addcmul, (x, gamma, f), {}).right.make().tolist()  # a layer scale
    [0.10000000149011612, 0.10000000149011612]
    """
    if len(args) == 2 and not kwargs and function in _ADD:  # by far the most common, and quick
        left, right = args
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            return Sum(Operand((left,)), Operand((right,)))
    given = [*args, *(kwargs[k] for k in ("input", "other", *_NAMED) if k in kwargs)]
    if "input" in kwargs:  # the only name that can come before positional arguments
        given = [kwargs["input"], *(g for g in given if g is not kwargs["input"])]
    tensors = tuple(g for g in given[:3] if isinstance(g, Tensor))
    if function in _ADD and len(tensors) == 2:
        scale = float(kwargs.get("alpha", 1))
        return Sum(Operand(tensors[:1]), Operand(tensors[1:], scale))
    if function in _SUB and len(tensors) == 2:
        scale = -float(kwargs.get("alpha", 1))
        return Sum(Operand(tensors[:1]), Operand(tensors[1:], scale), is_difference=True)
    if function in _LERP and len(tensors) == 2:
        weight = float(given[2])
        return Sum(Operand(tensors[:1], 1 - weight), Operand(tensors[1:], weight))
    if function in _LERP and len(tensors) == 3:
        start, end, gate = tensors
        rest, product = Call(rest_of, (), {}), Call(torch.mul, (), {})
        return Sum(Operand((start, gate), call=rest), Operand((end, gate), call=product))
    if function in _ADDCMUL and len(tensors) == 3:
        product = Call(torch.mul, (), {})
        scale = float(kwargs.get("value", 1))
        return Sum(Operand(tensors[:1]), Operand(tensors[1:], scale, product))
    if function in _ADDMM and len(tensors) == 3:
        product = Call(torch.matmul, (), {})
        scales = float(kwargs.get("beta", 1)), float(kwargs.get("alpha", 1))
        return Sum(Operand(tensors[:1], scales[0]), Operand(tensors[1:], scales[1], product))
    return None


_NAMED = ("end", "weight", "tensor1", "tensor2", "mat1", "mat2", "batch1", "batch2")
