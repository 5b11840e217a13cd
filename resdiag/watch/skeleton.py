"""An autograd graph as a list: its nodes, how they hang together, and the leaves they end in."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

NOWHERE, LEAF, END = -1, -2, -3

_ACCUMULATES = type(get_gradient_edge(torch.ones(1, requires_grad=True)).node)


@dataclass(frozen=True)
class Skeleton:
    """What two passes through one network have in common if they ran the same operations.

    Attributes:
        kinds: What each node is the derivative of.
        edges: Node by node, where its gradients go: the index of a node and which of its outputs,
            `LEAF` or, for an operand without a gradient, `NOWHERE`; `END` after each node.
        leaves: The leaves in the order of their edges.
    """

    kinds: list[type[Node]]
    edges: list[int]
    leaves: list[Tensor]

    def fits(self, other: "Skeleton") -> bool:
        """Whether it is the same graph on the very same leaves."""
        return (
            self.kinds == other.kinds
            and self.edges == other.edges
            and len(self.leaves) == len(other.leaves)
            and all(map(is_, self.leaves, other.leaves))
        )


def walk(outputs: Sequence[Tensor]) -> tuple[list[Node], Skeleton]:
    """The nodes that lead to some tensors, breadth first, and their skeleton.

    Args:
        outputs: Tensors of one pass; those without a graph are passed over.

    >>> x = torch.ones(2, requires_grad=True)
    >>> nodes, skeleton = walk([(x * 2).relu()])
    >>> [node.name() for node in nodes]
    ['ReluBackward0', 'MulBackward0']
    >>> skeleton.fits(walk([(x * 3).relu()])[1]), skeleton.fits(walk([(x + 2).relu()])[1])
    (True, False)
    """
    nodes = list(dict.fromkeys(x.grad_fn for x in outputs if x.grad_fn is not None))
    at = {node: index for index, node in enumerate(nodes)}
    kinds, edges, leaves = list[type[Node]](), list[int](), list[Tensor]()
    for node in nodes:  # grows on the way
        kinds.append(type(node))
        for other, place in node.next_functions:
            if other is None:
                edges.append(NOWHERE)
            elif type(other) is _ACCUMULATES:
                edges.append(LEAF)
                leaves.append(other.variable)  # type: ignore[attr-defined]
            else:
                index = at.setdefault(other, len(nodes))
                if index == len(nodes):
                    nodes.append(other)
                edges += (index, place)
        edges.append(END)
    return nodes, Skeleton(kinds, edges, leaves)
