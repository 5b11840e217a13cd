"""How much of the gradient at a block's input came through its shortcut."""

from collections.abc import Callable

import torch
from torch import Tensor


class Shares:
    """What came through the shortcuts of one backward pass, held until the whole gradient is there.

    Args:
        head: The samples of a tensor that are looked at.
    """

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
        scale = self._scales.get(row)
        if scale is not None:
            # a copy: autograd adds to a gradient in place as long as nobody else holds it
            self._via[row] = self._head(g) * scale

    def collect(self, row: int, g: Tensor) -> None:
        """A part of the gradient has come through a shortcut that is not the input itself."""
        head = self._head(g)
        self._via[row] = head.clone() if row not in self._via else self._via[row] + head

    def take(self, row: int) -> Tensor | None:
        """All that came, for the last time."""
        return self._via.pop(row, None)


TANGLED = "what comes through the shortcut cannot be told from what comes through the branch"


def entries(h: Tensor, x: Tensor) -> list[tuple[torch.autograd.graph.Node, int]] | None:
    """Nodes between x and h that take x itself, and at which input: where its gradient leaves.

    None where a split hands on the gradients of all its pieces as one.
    """
    target = x.grad_fn
    stack, seen = [h.grad_fn], set[torch.autograd.graph.Node]()
    found: list[tuple[torch.autograd.graph.Node, int]] = []
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
