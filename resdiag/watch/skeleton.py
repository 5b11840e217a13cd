"""An autograd graph as a list: its nodes, how they hang together, and the leaves they end in."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import Node


@dataclass(frozen=True)
class Skeleton:
    """What two passes through one network have in common if they ran the same operations.

    Attributes:
        kinds: What each node is the derivative of.
        edges: For each node, the nodes that its gradients go to and which of their outputs; -1 for
            an operand without a gradient.
        leaves: For each node that accumulates a gradient, the leaf; None for the others.
    """

    kinds: tuple[type[Node], ...]
    edges: tuple[tuple[int, ...], ...]
    leaves: tuple[Tensor | None, ...]

    def fits(self, other: "Skeleton") -> bool:
        """Whether it is the same graph on the very same leaves."""
        return (
            self.kinds == other.kinds
            and self.edges == other.edges
            and all(a is b for a, b in zip(self.leaves, other.leaves, strict=True))
        )


def walk(outputs: Sequence[Tensor]) -> tuple[list[Node], Skeleton]:
    """The nodes that lead to some tensors, breadth first, and their skeleton.

    Args:
        outputs: Tensors of one pass; those without a graph are passed over.

    >>> import torch
    >>> x = torch.ones(2, requires_grad=True)
    >>> nodes, skeleton = walk([(x * 2).relu()])
    >>> [kind.__name__ for kind in skeleton.kinds]
    ['ReluBackward0', 'MulBackward0', 'AccumulateGrad']
    >>> skeleton.fits(walk([(x * 3).relu()])[1]), skeleton.fits(walk([(x + 2).relu()])[1])
    (True, False)
    """
    roots = [x.grad_fn for x in outputs if x.grad_fn is not None]
    nodes = list(dict.fromkeys(roots))
    at = {node: index for index, node in enumerate(nodes)}
    kinds, edges, leaves = list[type[Node]](), list[tuple[int, ...]](), list[Tensor | None]()
    for node in nodes:  # grows on the way
        kinds.append(type(node))
        ahead = list[int]()
        for other, place in node.next_functions:
            if other is None:
                ahead.append(-1)
                continue
            index = at.get(other)
            if index is None:
                index = at[other] = len(nodes)
                nodes.append(other)
            ahead += (index, place)
        edges.append(tuple(ahead))
        leaves.append(None if ahead else getattr(node, "variable", None))
    return nodes, Skeleton(tuple(kinds), tuple(edges), tuple(leaves))
