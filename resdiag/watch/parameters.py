"""Norms of gradients and updates of many parameters, gathered per block in a few kernels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resdiag.watch import metrics
from resdiag.watch.shards import local, shares

_Index = tuple[Tensor, Tensor, Tensor]
_KEPT = 16


class ParameterNorms:
    """Per-block norms over groups of parameters.

    Args:
        parameters: All parameters watched, in any order.
        groups: Per block, its parameters; those of no block count in the total only, and those
            of several blocks (shared weights, a block inside a block) in each of them.
        ranks: Where parameters are shards, how many ranks hold them: squared norms are then this
            rank's share of the whole. None for whole parameters.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        groups: Sequence[Sequence[nn.Parameter]],
        ranks: int | None = None,
    ) -> None:
        self._parameters = list(parameters)
        self._blocks = len(groups)
        at = {id(p): i for i, p in enumerate(self._parameters)}
        self._members = [(at[id(p)], row) for row, g in enumerate(groups) for p in g if id(p) in at]
        self._indices: dict[tuple[int, ...], _Index] = {}
        self._everything = tuple(range(len(self._parameters)))
        self._copies: list[Tensor] | None = None
        self._sizes: Tensor | None = None
        self._shares = None if ranks is None else torch.tensor(shares(self._parameters, ranks))

    def gradients(self) -> tuple[Tensor, Tensor]:
        """G1 per block (L,) and the norm over all parameters, float64; NaN without gradients."""
        held = [(i, self._local(p.grad)) for i, p in enumerate(self._parameters)]
        dense = [(i, g.coalesce().values() if g.is_sparse else g) for i, g in held if g is not None]
        return self._gather([g for _, g in dense], tuple(i for i, _ in dense))

    def remember(self) -> None:
        """Copy the parameters: call before the optimizer's step."""
        parameters = self._detached()
        if self._copies is None:  # kept from step to step: fresh memory costs more than the copy
            self._copies = [torch.empty_like(p) for p in parameters]
        torch._foreach_copy_(self._copies, parameters)
        self._sizes, _ = self._gather(parameters, self._everything)

    def updates(self) -> tuple[Tensor, Tensor]:
        """||after - before|| and ||before|| per block (L,), float64; call after the step."""
        if self._sizes is None or self._copies is None:
            nan = torch.full((self._blocks,), math.nan, dtype=torch.float64)
            return nan, nan
        torch._foreach_sub_(self._copies, self._detached())
        moved, _ = self._gather(self._copies, self._everything)
        sizes, self._sizes = self._sizes, None
        return moved, sizes

    def weights(self) -> Tensor:
        """Norm over all parameters, 0-d float64."""
        return self._gather(self._detached(), self._everything)[1]

    def _detached(self) -> list[Tensor]:
        if self._shares is None:
            return [p.detach() for p in self._parameters]
        return [local(p.detach()) for p in self._parameters]

    def _local(self, gradient: Tensor | None) -> Tensor | None:
        return gradient if gradient is None or self._shares is None else local(gradient)

    def _gather(self, tensors: list[Tensor], which: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Root of summed squares per block, and over everything; `which` parameters they are."""
        if not tensors:
            nan = torch.full((self._blocks + 1,), math.nan, dtype=torch.float64)
            return nan[:-1], nan[-1]
        squares = _norms(tensors).square()
        if self._shares is not None:
            squares = squares * self._shares[list(which)].to(squares)
        places, rows, present = self._index(which, squares.device)
        sums = squares.new_full((self._blocks,), math.nan).index_fill_(0, present, 0)
        sums.index_add_(0, rows, squares.index_select(0, places))
        return sums.sqrt(), squares.sum().sqrt()

    def _index(self, which: tuple[int, ...], device: torch.device) -> _Index:
        """Places in the list of tensors, their blocks, and the blocks that have any."""
        # kept: sending a list of numbers to an accelerator makes the host wait
        if which not in self._indices:
            if len(self._indices) >= _KEPT:
                self._indices.clear()
            place = {parameter: at for at, parameter in enumerate(which)}
            pairs = [(place[i], row) for i, row in self._members if i in place]
            lists = [p for p, _ in pairs], [r for _, r in pairs], sorted({r for _, r in pairs})
            places, rows, present = (
                torch.tensor(numbers, dtype=torch.long, device=device) for numbers in lists
            )
            self._indices[which] = places, rows, present
        return self._indices[which]


def _norms(tensors: list[Tensor]) -> Tensor:
    """Euclidean norms (P,), float64, finite whenever the elements are."""
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors, 2, torch.float64))
    return metrics.norms(tensors)
