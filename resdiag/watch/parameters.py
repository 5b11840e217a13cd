"""Norms of gradients and updates of many parameters, gathered per block in a few kernels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ParameterNorms:
    """Per-block norms over groups of parameters.

    Args:
        parameters: All parameters watched, in any order.
        groups: Per block, its parameters; those of no block count in the total only.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], groups: Sequence[Sequence[nn.Parameter]]
    ) -> None:
        self._parameters = list(parameters)
        self._blocks = len(groups)
        rows = {id(p): row for row, group in enumerate(groups) for p in group}
        self._rows = [rows.get(id(p), self._blocks) for p in self._parameters]
        self._before: list[Tensor] | None = None

    def gradients(self) -> tuple[Tensor, Tensor]:
        """G1 per block (L,) and the norm over all parameters, float64; NaN without gradients."""
        held = [(p.grad, row) for p, row in zip(self._parameters, self._rows, strict=True)]
        grads = [(g, row) for g, row in held if g is not None]
        return self._gather([g for g, _ in grads], [row for _, row in grads])

    def remember(self) -> None:
        """Copy the parameters: call before the optimizer's step."""
        self._before = [p.detach().clone() for p in self._parameters]

    def updates(self) -> Tensor:
        """||after - before|| / ||before|| per block (L,), float64; call after the step."""
        if self._before is None:
            return torch.full((self._blocks,), math.nan, dtype=torch.float64)
        moved = torch._foreach_sub([p.detach() for p in self._parameters], self._before)
        update, _ = self._gather(list(moved), self._rows)
        weight, _ = self._gather(self._before, self._rows)
        self._before = None
        return update / weight

    def _gather(self, tensors: list[Tensor], rows: list[int]) -> tuple[Tensor, Tensor]:
        """Root of summed squares per block, and over everything."""
        if not tensors:
            nan = torch.full((self._blocks + 1,), math.nan, dtype=torch.float64)
            return nan[:-1], nan[-1]
        squares = _norms(tensors).square()
        sums = squares.new_full((self._blocks + 1,), math.nan)
        present = torch.tensor(rows, device=squares.device)
        sums[torch.tensor(sorted(set(rows)), device=squares.device)] = 0
        sums.index_add_(0, present, squares)
        return sums[:-1].sqrt(), squares.sum().sqrt()


def _norms(tensors: list[Tensor]) -> Tensor:
    """Euclidean norms (P,), float64, finite whenever the elements are."""
    device = tensors[0].device
    if device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors, 2, torch.float64))
    fast = torch.stack(list(torch._foreach_norm(tensors))).double()
    # on the CPU the values are in host memory: redo only what float32 squares may have lost
    for index, value in enumerate(fast.numpy()):
        if not 1e-15 < value < 1e18:
            fast[index] = torch.linalg.vector_norm(tensors[index], dtype=torch.float64)
    return fast
