"""The spellings of an addition: which torch calls add two tensors, and what goes into the sum."""

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resdiag.watch.base.functions import Call
from resdiag.watch.base.tensors import TensorTable, tensors_in
from resdiag.watch.find.dataflow import Dataflow

_ADD = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
_SUB = {torch.sub, torch.subtract, Tensor.sub, Tensor.sub_, Tensor.subtract, Tensor.subtract_}
_SUB |= {Tensor.__sub__, Tensor.__isub__}
_ADDCMUL = {torch.addcmul, Tensor.addcmul, Tensor.addcmul_}
_ADDMM = {torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.addmm_, Tensor.baddbmm, Tensor.baddbmm_}
_LERP = {torch.lerp, Tensor.lerp, Tensor.lerp_}

_NAMED = ("end", "weight", "tensor1", "tensor2", "mat1", "mat2", "batch1", "batch2")
_OPERANDS = 2

ADDITIONS = frozenset(_ADD | _SUB | _ADDCMUL | _ADDMM | _LERP)


@dataclass(frozen=True)
class Operand:
    """One side of an addition."""

    inputs: tuple[Tensor, ...]  # the tensor, or the tensors from which a fused call makes it
    scale: float = 1.0  # factor with which it enters the sum
    call: Call | None = None  # how it is made of several inputs; None for a tensor that is there

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
    first, rest, alpha = tensors[:1], tensors[1:], float(kwargs.get("alpha", 1))
    if function in _ADD and len(tensors) == 2:
        return Sum(Operand(first), Operand(rest, alpha))
    if function in _SUB and len(tensors) == 2:
        return Sum(Operand(first), Operand(rest, -alpha), is_difference=True)
    if function in _LERP and len(tensors) == 2:
        weight = float(given[2])
        return Sum(Operand(first, 1 - weight), Operand(rest, weight))
    if len(tensors) < 3:
        return None
    product = Call(torch.matmul if function in _ADDMM else torch.mul, (), {})
    if function in _LERP:
        start, end, gate = tensors
        remains = Operand((start, gate), call=Call(rest_of, (), {}))
        return Sum(remains, Operand((end, gate), call=product))
    if function in _ADDCMUL:
        return Sum(Operand(first), Operand(rest, float(kwargs.get("value", 1)), product))
    if function in _ADDMM:
        return Sum(Operand(first, float(kwargs.get("beta", 1))), Operand(rest, alpha, product))
    return None


class Stacks:
    """Pairs of tensors that were stacked in one pass."""

    def __init__(self) -> None:
        self._pairs = TensorTable[tuple[list[weakref.ref[Tensor]], int]]()

    def add(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor) -> None:
        """Remember the tensors that were stacked, if they are two."""
        tensors = list(tensors_in(args[:1]))
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % result.dim()
        if len(tensors) == _OPERANDS:
            self._pairs.set(result, ([weakref.ref(tensor) for tensor in tensors], dim))

    def read(self, func: Callable[..., Any], args: tuple[Any, ...]) -> Sum | None:
        """The sum over the stacking dimension of two stacked tensors, if the call is one."""
        if func not in (torch.sum, Tensor.sum) or len(args) != _OPERANDS:
            return None
        kept, dim = self._pairs.get(args[0]) or ([], 0)
        if not kept or args[1] not in (dim, (dim,), [dim]):
            return None
        left, right = (tensor() for tensor in kept)
        return None if left is None or right is None else Sum(Operand((left,)), Operand((right,)))


@dataclass(eq=False, kw_only=True)
class Ways:
    """What is known of the two ways from a block's input x to its addition."""

    swapped: bool = False  # whether the right operand is the shortcut
    stream: int = 0  # number of the shortcut in the pass
    shortcut_count: int  # parameterised operations on the shortcut: 0 for an identity
    path: tuple[Call, ...] | None  # from x to the shortcut if they can be repeated, else None
    parameters: list[nn.Parameter]  # of branch, shortcut and (at the block's end) after-add
    activations: list[Call]
    calls: tuple[Call, ...] = ()  # the operations on the branch, in order
    shortcut_calls: tuple[Call, ...] = ()  # the operations on the shortcut, in order
    features: int | None = None  # the channel dimension of the sum, None if no operation says it
    # in t * f(x) + (1 - t) * x a gate multiplies the shortcut; the two products are the ways
    is_gated: bool = False


@dataclass(eq=False, kw_only=True)
class Addition(Ways):
    """The description of one residual addition, without its tensors."""

    owner: str  # name of the module whose forward is running ("" is the model itself)
    ordinal: int  # number of residual additions that `owner` has done before in this pass
    entered: torch.Size | None  # shape of x; None if it was freed
    shape: torch.Size  # shape of the sum
    dtype: torch.dtype  # of the shortcut's elements
    shortcut_scale: float  # factor inside the addition (torch.add's alpha), mostly 1
    branch_scale: float
    branch_module: str = ""  # the module whose output is the branch, or ""
    shortcut_module: str = ""
    # one more branch for the unit that the addition before began; `calls` etc. are of both
    extends: bool = False
    after: tuple[Call, ...] = ()  # the after-add's calls, set at the end of the block

    @property
    def kind(self) -> str:
        """What the shortcut is, in a word."""
        return "gated" if self.is_gated else "projection" if self.shortcut_count else "identity"

    @property
    def key(self) -> tuple[str, int]:
        """What names the block in every pass."""
        return self.owner, self.ordinal


_COMPLEMENTS = ("rsub", "neg")
_HARMLESS = (
    frozenset({"add", "radd", "sub", "subtract", "to", "clone", "contiguous", "type_as", "float"})
    | {"sigmoid"}  # sigmoid(-z) = 1 - sigmoid(z)
    | {"view", "reshape", "flatten", "squeeze", "unsqueeze", "expand", "expand_as", "view_as"}
    | {"transpose", "permute", "T", "mT"}
)


@dataclass(frozen=True)
class Mix:
    """Two tensors of which a gate takes complementary shares."""

    left: int  # number of the tensor of which the left operand is a share
    right: int  # the same of the right operand
    gate: int  # number of the gate
    operands: tuple[int, int]  # numbers of the operands of the addition
    shares: tuple[Operand, Operand] | None = None  # None: the operands; else of x + t * (f - x)


@dataclass(frozen=True)
class _Product:
    """One reading of a product: `gate` times `value`, or what the gate leaves of it."""

    number: int
    value: int
    gate: int
    is_rest: bool = False


def read_mix(flow: Dataflow, spelled: Sum, left: int, right: int) -> Mix | None:
    """The mixture that a sum of two operands is, or None."""
    if spelled.left.scale != 1 or abs(spelled.right.scale) != 1:
        return None
    if spelled.right.scale > 0:
        for one in _products(flow, left):
            for other in _products(flow, right):
                if _share_one(flow, one, other):
                    return Mix(one.value, other.value, one.gate, (left, right))
    return _read_step(flow, spelled, left, right)


def _products(flow: Dataflow, number: int) -> Iterator[_Product]:
    """The readings of a tensor as a product of a gate and another tensor."""
    node = flow.node(number)
    while node.call is not None and len(set(node.parents)) == 1 and not node.is_transform:
        number = node.parents[0]  # what dropout or a layer scale did to the product
        node = flow.node(number)
    if node.call is None or len(set(node.parents)) != len(node.parents) or len(node.parents) != 2:
        return
    one, other = node.parents
    if node.call.function is rest_of:
        yield _Product(number, one, other, is_rest=True)
    elif node.call.is_product:
        yield _Product(number, one, other)
        yield _Product(number, other, one)


def _share_one(flow: Dataflow, one: _Product, other: _Product) -> bool:
    """Whether what one gate takes is what the other leaves."""
    signs = dict(_origins(flow, one.gate))
    wanted = one.is_rest == other.is_rest
    return any(
        n in signs and (signs[n] != sign) == wanted for n, sign in _origins(flow, other.gate)
    )


def _origins(flow: Dataflow, number: int) -> Iterator[tuple[int, bool]]:
    """What a gate is an affine function of, itself first, and whether it falls as that grows."""
    falls = False
    yield number, falls
    while len(flow.node(number).parents) == 1:
        call, (before,) = flow.node(number).call, flow.node(number).parents
        if call is None or call.name not in (*_COMPLEMENTS, *_HARMLESS):
            return
        second = call.args[0] if call.args else call.kwargs.get("other")
        is_second = isinstance(second, Tensor) and flow.number(second) == before
        falls ^= call.name in _COMPLEMENTS or (call.name in ("sub", "subtract") and is_second)
        number = before
        yield number, falls


def _read_step(flow: Dataflow, spelled: Sum, left: int, right: int) -> Mix | None:
    """A step x + t * (f - x) towards f, or x - t * (x - f)."""
    ahead = spelled.right.scale > 0
    orders = [(left, spelled.left, right, spelled.right)]
    if ahead:
        orders.append((right, spelled.right, left, spelled.left))
    for start, at, step, by in orders:
        for product in _products(flow, step):
            node = flow.node(product.value)
            if product.number != step or not node.is_difference:
                continue
            end, begin = node.parents if ahead else node.parents[::-1]
            if begin != start:
                continue
            shares = _shares(flow, at, by, product)
            if start == left:
                return Mix(start, end, product.gate, (left, right), shares)
            return Mix(end, start, product.gate, (left, right), shares and shares[::-1])
    return None


def _shares(
    flow: Dataflow, start: Operand, step: Operand, product: _Product
) -> tuple[Operand, Operand] | None:
    """What a step leaves of its start, and what it takes of its goal; None if the gate is gone."""
    gate = flow.node(product.number).gate
    gate = next((x for x in step.inputs if flow.number(x) == product.gate), gate)
    if gate is None:
        return None

    def goal(x: Tensor, t: Tensor, *factors: Tensor) -> Tensor:
        return t * x + step.scale * functools.reduce(torch.mul, factors)

    pair = start.inputs[0], gate
    rest = Operand(pair, call=Call(rest_of, (), {}))
    return rest, Operand((*pair, *step.inputs), call=Call(goal, (), {}))
