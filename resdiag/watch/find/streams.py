"""A gate on the shortcut, as in a Highway network: the spellings of t * f + (1 - t) * x."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resdiag.watch.base.functions import Call
from resdiag.watch.find.additions import Operand, Sum, rest_of
from resdiag.watch.find.dataflow import Depth, Lineage, reach
from resdiag.watch.find.module_stack import Frame

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


def read_mix(lineage: Lineage, spelled: Sum, left: int, right: int) -> Mix | None:
    """The mixture that a sum of two operands is; None if it is none."""
    if spelled.left.scale != 1 or abs(spelled.right.scale) != 1:
        return None
    if spelled.right.scale > 0:
        for one in _products(lineage, left):
            for other in _products(lineage, right):
                if _share_one(lineage, one, other):
                    return Mix(one.value, other.value, one.gate, (left, right))
    return _read_step(lineage, spelled, left, right)


def _products(lineage: Lineage, number: int) -> Iterator[_Product]:
    """The readings of a tensor as a product of a gate and another tensor."""
    node = lineage.node(number)
    while node.call is not None and len(set(node.parents)) == 1 and not node.is_transform:
        number = node.parents[0]  # what dropout or a layer scale did to the product
        node = lineage.node(number)
    if node.call is None or len(set(node.parents)) != len(node.parents) or len(node.parents) != 2:
        return
    one, other = node.parents
    if node.call.function is rest_of:
        yield _Product(number, one, other, is_rest=True)
    elif node.call.is_product:
        yield _Product(number, one, other)
        yield _Product(number, other, one)


def _share_one(lineage: Lineage, one: _Product, other: _Product) -> bool:
    """Whether what one gate takes is what the other leaves."""
    signs = dict(_origins(lineage, one.gate))
    wanted = one.is_rest == other.is_rest
    return any(
        n in signs and (signs[n] != sign) == wanted for n, sign in _origins(lineage, other.gate)
    )


def _origins(lineage: Lineage, number: int) -> Iterator[tuple[int, bool]]:
    """What a gate is an affine function of, itself first, and whether it falls as that grows."""
    falls = False
    yield number, falls
    while len(lineage.node(number).parents) == 1:
        call, (before,) = lineage.node(number).call, lineage.node(number).parents
        if call is None or call.name not in (*_COMPLEMENTS, *_HARMLESS):
            return
        second = call.args[0] if call.args else call.kwargs.get("other")
        is_second = isinstance(second, Tensor) and lineage.number(second) == before
        subtracted = call.name in ("sub", "subtract") and is_second
        falls ^= call.name in _COMPLEMENTS or subtracted
        number = before
        yield number, falls


def _read_step(lineage: Lineage, spelled: Sum, left: int, right: int) -> Mix | None:
    """A step x + t * (f - x) towards f, or x - t * (x - f)."""
    ahead = spelled.right.scale > 0
    orders = [(left, spelled.left, right, spelled.right)]
    if ahead:
        orders.append((right, spelled.right, left, spelled.left))
    for start, at, step, by in orders:
        for product in _products(lineage, step):
            node = lineage.node(product.value)
            if product.number != step or not node.is_difference:
                continue
            end, begin = node.parents if ahead else node.parents[::-1]
            if begin != start:
                continue
            shares = _shares(lineage, at, by, product)
            if start == left:
                return Mix(start, end, product.gate, (left, right), shares)
            return Mix(end, start, product.gate, (left, right), shares and shares[::-1])
    return None


def _shares(
    lineage: Lineage, start: Operand, step: Operand, product: _Product
) -> tuple[Operand, Operand] | None:
    """What a step leaves of its start, and what it takes of its goal; None if the gate is gone."""
    gate = lineage.node(product.number).gate
    gate = next((x for x in step.inputs if lineage.number(x) == product.gate), gate)
    if gate is None:
        return None

    def goal(x: Tensor, t: Tensor, *factors: Tensor) -> Tensor:
        return t * x + step.scale * functools.reduce(torch.mul, factors)

    pair = start.inputs[0], gate
    rest = Operand(pair, call=Call(rest_of, (), {}))
    return rest, Operand((*pair, *step.inputs), call=Call(goal, (), {}))


def are_pieces(
    lineage: Lineage, origin: int, on_shortcut: Sequence[int], on_branch: Sequence[int]
) -> bool:
    """Whether two ways begin with different pieces of their origin, of which there are more.

    Two pieces that make up the whole are two streams.
    """
    one, other = (
        {node.piece: node.size for n in way if origin in (node := lineage.node(n)).parents}
        for way in (on_shortcut, on_branch)
    )
    if not one or "" in {**one, **other} or not one.keys().isdisjoint(other):
        return False
    sizes = [*one.values(), *other.values()]
    return len(sizes) != 2 or sum(sizes) < lineage.node(origin).size


def was_added(lineage: Lineage, number: int) -> bool:
    """Whether a tensor, or a view of it, has been an operand of an addition."""
    users = lineage.users()

    def is_view(n: int) -> bool:
        node = lineage.node(n)
        return len(set(node.parents)) == 1 and not node.is_transform and not node.is_opaque

    views = reach(number, lambda n: filter(is_view, users.get(n, ())))
    return any(
        (call := lineage.node(user).call) is not None
        and call.is_sum
        and len(set(lineage.node(user).parents)) > 1
        for view in views
        for user in users.get(view, ())
    )


def is_cut(lineage: Lineage, branch: int, depths: Mapping[int, Depth]) -> bool:
    """Whether every way to a branch is detached between two of its parameterised maps.

    What follows begins anew, as a position does that was embedded from a predicted box. A branch
    that is detached as a whole is a fault in a block.

    `depths` are of what is on the ways from the origin.
    """
    whole = depths[branch][0]

    def ahead(number: int) -> Iterator[int]:
        node = lineage.node(number)
        if node.name != "detach" or depths[number][0] == whole:
            yield from (parent for parent in node.parents if parent in depths)

    return all(depths[number][0] for number in reach(branch, ahead))


def is_inner(lineage: Lineage, origin: int, frames: Sequence[Frame]) -> bool:
    """Whether a tensor is no stream's, but a layer's own: mapped, or normalised, on its way in.

    Either the module that adds has mapped its input to it, as a state-space mixer does before it
    computes C h + D x, or one of those that called it has normalised its input to it, as a pre-norm
    block does for its layer. What follows a residual sum is the stream's, and so is what the model
    itself makes of its input.
    """
    for frame in frames[1:]:
        scope, queue, seen = frame.scope, [origin], {origin}
        maps = normalises = summed = False
        while queue:
            number = queue.pop()
            node = lineage.node(number)
            if number in scope.entries or number < scope.start or node.stream is not None:
                summed = summed or (node.stream is not None and number not in scope.entries)
                continue
            maps = maps or node.depth[0] > 0
            normalises = normalises or (node.call is not None and node.call.normalises)
            queue.extend(set(node.parents) - seen)
            seen.update(node.parents)
        if (maps and frame is frames[-1]) or (normalises and not maps and not summed):
            return True
    return False
