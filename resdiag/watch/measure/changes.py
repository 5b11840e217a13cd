"""What operations do to tensors: changes, slopes and saturation, and what shortcuts hand back."""

import math
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks

from resdiag.watch.base.functions import Call, compose
from resdiag.watch.measure.reductions import (
    PIECE,
    TRUSTED,
    Scalar,
    channel_dimension,
    is_fast,
    look,
    norm,
    norms,
    on_host,
    quotient,
)

SATURATED_SLOPE = 0.05
"""An activation's output counts as saturated if its slope is below this."""


def relative_change(changed: Tensor, reference: Tensor) -> Scalar:
    """||changed - reference||_F / ||reference||_F: P1 of (H, u), P2 of (f(h), h), P4 of f^(n).

    0 when both are 0.

    References:
        Shah et al. 2016, arXiv:1604.04112, section 3.2.3.

    >>> round(relative_change(torch.tensor([0.0, 4.0]), torch.tensor([3.0, 4.0])), 6)
    0.6
    """
    difference = norm(changed.detach() - reference.detach())
    if isinstance(difference, Tensor):
        return torch.where(difference == 0, difference, difference / norm(reference))
    return quotient(difference, norm(reference)) if difference else 0.0


def change_by(calls: Sequence[Call], u: Tensor) -> Scalar:
    """`relative_change` of u to what activations make of it; a cache holds `u`, on the CPU.

    >>> round(change_by([Call(torch.relu, (), {})], torch.tensor([-3.0, 4.0])), 6)
    0.6
    """
    u = u.detach()
    # u - max(u, 0) in one operation
    size = _size(u.clamp(max=0) if is_relu(calls) else compose(calls)(u) - u)
    return quotient(size, _size(u)) if size else 0.0


def relative_changes(changed: Sequence[Tensor], reference: Sequence[Tensor]) -> list[Scalar]:
    """`relative_change` of many pairs; of pairs on the CPU in a few kernels."""
    if not changed or not all(map(is_fast, (*changed, *reference))):
        return [relative_change(a, b) for a, b in zip(changed, reference, strict=True)]
    before = [x.detach() for x in reference]
    differences = torch._foreach_sub([x.detach() for x in changed], before)
    pairs = zip(norms(differences).tolist(), norms(before).tolist(), strict=True)
    return [quotient(difference, size) if difference else 0.0 for difference, size in pairs]


def slope(function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """Derivative f'(u) of an elementwise function, same shape as `u`.

    >>> slope(torch.relu, torch.tensor([-1.0, 2.0])).tolist()
    [0.0, 1.0]
    """
    # own saved-tensor hooks: those around us (activation checkpointing) would count our tensors
    with torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
        at = u.detach().requires_grad_()
        (derivative,) = torch.autograd.grad(function(at).sum(), at)
    return derivative


def slope_at(calls: Sequence[Call], u: Tensor, output: Tensor) -> Tensor:
    """`slope` of activations applied one after the other, given what they made of `u`.

    For ReLU and ELU the derivative is read off: 1 where u > 0, elsewhere 0 and H + 1.
    """
    if is_relu(calls):
        return (u > 0).to(u.dtype)
    is_elu = len(calls) == 1 and _is_plain_elu(calls[0])
    if is_elu and calls[0].kwargs.keys() <= {"alpha", "inplace"}:
        return (output + 1).clamp_max(1)
    return slope(compose(calls), u)


def is_relu(calls: Sequence[Call]) -> bool:
    """Whether calls are one ReLU, in place or not."""
    names = [call.name for call in calls]
    return names == ["relu"] and not calls[0].args and calls[0].kwargs.keys() <= {"inplace"}


def _is_plain_elu(call: Call) -> bool:
    return call.name == "elu" and not call.args and call.kwargs.get("alpha", 1.0) == 1.0


class Saturation:
    """The activations of one forward pass, and the blocks that they ran in."""

    def __init__(self) -> None:
        self._seen: list[tuple[Call, Tensor]] = []
        self._inside: list[tuple[int, list[Tensor]]] = []

    def clear(self) -> None:
        """Forget the pass."""
        self._seen.clear()
        self._inside.clear()

    def add(self, call: Call, x: Tensor) -> None:
        """An activation is about to be applied to some samples of its input."""
        self._seen.append((call, saturated(call, x)))

    def assign(self, row: int, activations: Iterable[Call]) -> None:
        """Say which of the activations ran inside a block."""
        calls = {id(call) for call in activations}
        self._inside.append((row, [gate for call, gate in self._seen if id(call) in calls]))

    def forget(self, rows: Container[int]) -> None:
        """Blocks are not to be counted."""
        self._inside = [(row, gates) for row, gates in self._inside if row not in rows]

    def count(
        self, features: Callable[[int, Tensor], int | None]
    ) -> Iterator[tuple[int, list[Tensor], list[int]]]:
        """Closed units of every block: row, counts per channel of each gate, sizes of the gates.

        `features` gives the dimension of the channels in a tensor of a row, if it is known.
        """
        counted = _count_closed(
            (gate, features(row, gate)) for row, gates in self._inside for gate in gates
        )
        for row, gates in self._inside:
            yield row, [counted[id(gate)] for gate in gates], [gate.numel() for gate in gates]


def fractions(counts: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Scalar, Scalar]:
    """Shares of saturated units, and of channels all of whose units are: dead ones."""
    # NaN counts, of a graph that did not write them, stay NaN
    pairs = zip(counts, sizes, strict=True)
    full = [(count == size // len(count)) + 0 * count for count, size in pairs]
    return _total(counts) / sum(sizes), _total(full) / sum(map(len, counts))


def saturated(call: Call, x: Tensor) -> Tensor:
    """Which units have a slope below `SATURATED_SLOPE`; the usual two without computing slopes."""
    if call.name == "relu":
        return x <= 0
    if _is_plain_elu(call):
        return x < math.log(SATURATED_SLOPE)
    return slope(call, x).abs() < SATURATED_SLOPE


def _count_closed(gates: Iterable[tuple[Tensor, int | None]]) -> dict[int, Tensor]:
    """Closed units per channel of each gate, those of one shape counted at once."""
    alike: dict[tuple[torch.Size, int], list[Tensor]] = defaultdict(list)
    for gate, features in gates:
        alike[gate.shape, channel_dimension(gate.dim(), features)].append(gate)
    counted: dict[int, Tensor] = {}
    for (shape, at), same in alike.items():
        others = tuple(d + 1 for d in range(len(shape)) if d != at)
        closed = torch.stack(same).count_nonzero(others) if others else torch.stack(same).long()
        counted |= {id(gate): count for gate, count in zip(same, closed.unbind(), strict=True)}
    return counted


def _total(counts: Sequence[Tensor]) -> Scalar:
    """The sum of everything in some tensors of counts."""
    if on_host(counts[0].device):
        return float(sum(float(count.numpy().sum()) for count in counts))
    return torch.cat([count.reshape(-1) for count in counts]).sum(dtype=torch.float64)


def share(part: Tensor, total: Tensor) -> Scalar:
    """Projection share <part, total> / ||total||^2; the shares of the parts of `total` sum to 1.

    Outside 0..1 where the parts, e.g. of dL/dx through shortcut and branch, partly cancel.

    >>> round(share(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])), 6)
    0.5
    """
    part, total = part.detach(), total.detach()
    a, b = _flat(part), _flat(total)
    same = part.stride() == total.stride() and is_fast(part) and is_fast(total)
    if same and a is not None and b is not None:
        square, inner = _dot(b, b), _dot(a, b)
        if TRUSTED[0] ** 2 < square < TRUSTED[1] ** 2 and math.isfinite(inner):
            return inner / square
    # normalised before the product: squares of a large float64 norm stay finite, products do too
    size = norm(total)
    if isinstance(size, Tensor):
        return (part.double() * (total.double() / size)).sum() / size
    return quotient(look((part.double() * (total.double() / size)).sum()), size)


class ShortcutGradient:
    """What came through the shortcuts in a backward pass, until the whole gradient is there."""

    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        self._head = head
        self._via: dict[int, Tensor] = {}
        self._scales: dict[int, float] = {}

    def clear(self) -> None:
        """Forget the pass."""
        self._via.clear()
        self._scales.clear()

    def pass_on(self, row: int, scale: float) -> None:
        """A block's shortcut is its input, times a factor: what comes to the sum goes through."""
        self._scales[row] = scale

    def hold(self, row: int, g: Tensor) -> None:
        """The gradient of a block's sum has come."""
        if row in self._scales:
            # a copy: autograd adds to a gradient in place while no other reference exists
            self._via[row] = self._head(g) * self._scales[row]

    def collect(self, row: int, g: Tensor) -> None:
        """A part of the gradient has come through a shortcut that is not the input itself."""
        head = self._head(g)
        self._via[row] = head.clone() if row not in self._via else self._via[row] + head

    def take(self, row: int) -> Tensor | None:
        """All that came, for the last time."""
        return self._via.pop(row, None)


TANGLED = "what comes through the shortcut cannot be told from what comes through the branch"


def entries(h: Tensor, x: Tensor) -> list[tuple[Node, int]] | None:
    """Nodes between x and h that take x itself, and at which input: where its gradient leaves.

    None where a split hands on the gradients of all its pieces as one.
    """
    target = x.grad_fn
    stack, seen = [h.grad_fn], set[Node]()
    found: list[tuple[Node, int]] = []
    while stack and len(seen) < 256:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node.name().startswith(("Split", "Unbind")):
            return None
        seen.add(node)
        for index, (before, output) in enumerate(node.next_functions):
            leaf = target is None and getattr(before, "variable", None) is x
            if leaf or (target is not None and before is target and output == x.output_nr):
                found.append((node, index))
            elif before is not None and before is not target:
                stack.append(before)
    return found


def _dot(a: Tensor, b: Tensor) -> float:
    """Inner product from float32 products of pieces."""
    if len(a) <= PIECE:
        return look(torch.dot(a, b))
    pairs = zip(a.split(PIECE), b.split(PIECE), strict=True)
    return math.fsum(look(torch.dot(p, q)) for p, q in pairs)


def _size(x: Tensor) -> float:
    """`norm` of a tensor on the CPU that a cache holds."""
    flat = _flat(x) if is_fast(x) else None
    square = 0.0 if flat is None else _dot(flat, flat)
    return math.sqrt(square) if TRUSTED[0] ** 2 < square < TRUSTED[1] ** 2 else float(norm(x))


def _flat(x: Tensor) -> Tensor | None:
    """The elements in the order in which they lie in memory, if they lie densely."""
    if x.is_contiguous():
        return x.view(-1)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).reshape(-1)
    return None
