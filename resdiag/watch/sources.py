"""Where a tensor of a forward pass can be had from once only the pass's autograd graph is left.

A node keeps what its backward pass needs: a convolution its input, a ReLU its output, a BatchNorm
its input and the batch's mean and 1 / sqrt(sigma^2 + eps). A tensor is known by its edge: the node
that made it, and which of the node's outputs it was. So what a later node keeps can be told to be
the very output of an earlier one, unchanged since.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from resdiag.watch.base.functions import Call, compose
from resdiag.watch.base.tensors import tensors_in
from resdiag.watch.measure.batchnorm import Gone, Normalised, affine, kept

Edge: TypeAlias = tuple[Node, int]
"""A tensor of the pass: the node that made it, and which of the node's outputs it is."""


def edge_of(x: Tensor) -> Edge | None:
    """The edge of a tensor; None for one without a graph."""
    return None if x.grad_fn is None else (x.grad_fn, x.output_nr)


@dataclass(frozen=True)
class Kept:
    """A node keeps the tensor itself."""

    node: int
    name: str

    def tensor(self, nodes: Sequence[Node], samples: int | None = None) -> Tensor:
        """Its first samples, None for all; not to be written to."""
        return kept(nodes[self.node], self.name)[:samples]


@dataclass(frozen=True)
class Normed:
    """It is a BatchNorm's output, which keeps its input and the batch's statistics."""

    node: int

    def tensor(self, nodes: Sequence[Node], samples: int | None = None) -> Tensor:
        """Its first samples, computed again as the layer does, None for all."""
        node = nodes[self.node]
        x, (gamma, beta) = kept(node, "input")[:samples], _terms(node)
        scale = gamma * kept(node, "result2")
        shift = torch.addcmul(beta, kept(node, "result1"), scale, value=-1)
        shape = (-1, *[1] * (x.dim() - 2))
        return torch.mul(x, scale.view(shape)).add_(shift.view(shape))

    def moments(self, nodes: Sequence[Node]) -> Normalised:
        """What its moments follow from."""
        node = nodes[self.node]
        size = kept(node, "input").numel()
        return Normalised(node, *_terms(node), lambda: self.tensor(nodes), size)


@dataclass(frozen=True)
class Added:
    """It is the plain sum of two others."""

    left: "Source"
    right: "Source"

    def tensor(self, nodes: Sequence[Node], samples: int | None = None) -> Tensor:
        """The sum over the first samples, None for all."""
        left, right = self.left.tensor(nodes, samples), self.right.tensor(nodes, samples)
        return left.add_(right) if isinstance(self.left, Normed) else left + right


@dataclass(frozen=True)
class Led:
    """Calls without parameters lead to it from another one."""

    origin: "Source"
    path: tuple[Call, ...]

    def tensor(self, nodes: Sequence[Node], samples: int | None = None) -> Tensor:
        """The calls on the first samples, None for all."""
        return compose(self.path)(self.origin.tensor(nodes, samples))


Source: TypeAlias = Kept | Normed | Added | Led


class Sources:
    """Looks for sources in the graph of a pass that has just ended.

    Args:
        nodes: The nodes of the graph.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes, self._at = nodes, {node: index for index, node in enumerate(nodes)}
        self._kept = {edge: source for node in nodes for edge, source in self._kept_by(node)}

    def place(self, edge: Edge | None) -> tuple[int, int] | None:
        """An edge with its node's index in place of the node; None if it is not in the graph."""
        index = None if edge is None else self._at.get(edge[0])
        return None if index is None or edge is None else (index, edge[1])

    def find(self, edge: Edge | None) -> Source | None:
        """Where a tensor can be had, None if nowhere."""
        place = self.place(edge)
        if place is None:
            return None
        node = self._nodes[place[0]]
        if place[1] == 0 and affine(node) is not None:
            return Normed(place[0])
        return self._kept.get(place)

    def led(self, origin: Edge | None, path: tuple[Call, ...] | None) -> Source | None:
        """Where the result of a parameter-free path can be had."""
        start = self.find(origin)
        if start is None or path is None or any(_has_tensors(call) for call in path):
            return None
        return Led(start, path)

    def _kept_by(self, node: Node) -> Iterator[tuple[tuple[int, int], Kept]]:
        for name in dir(node):
            if not name.startswith("_raw_saved_"):
                continue
            short = name.removeprefix("_raw_saved_")
            try:
                kept(node, short)
                place = self.place(edge_of(getattr(node, f"_saved_{short}")))
            except Gone:
                continue
            if place is not None:
                yield place, Kept(self._at[node], short)


def _terms(node: Node) -> tuple[Tensor, Tensor]:
    """A BatchNorm's scale and shift (C,).

    Raises:
        Gone: It does not use the batch's statistics any more.
    """
    terms = affine(node)
    if terms is None:
        raise Gone("training")
    return terms


def _has_tensors(call: Call) -> bool:
    return any(True for _ in tensors_in((call.args, call.kwargs)))
