"""What an optimizer keeps of the gradients: first and second moment, and whether they fit."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resdiag.watch.find.blocks import Anatomy
from resdiag.watch.record.sets import Sets

_FIRST = ("exp_avg", "momentum_buffer")
_SECOND = ("exp_avg_sq", "square_avg")
"""Names in the states of PyTorch's optimizers."""

COLUMNS = ("moment_first", "moment_second", "moment_mismatch")
NO_MOMENT = "the optimizer keeps no such moment of the block's parameters"


class Moments:
    """Reads the moments of each block's parameters right after the step that used them.

    Args:
        sets: Says whether they are due, and takes them.
    """

    def __init__(self, sets: Sets) -> None:
        self._sets = sets
        self._sums: dict[tuple[int, str], list[Tensor]] = {}
        self._counts: dict[tuple[int, str], int] = {}
        self.begin()

    def begin(self) -> None:
        """Begin a step: nothing has been read."""
        self._sums, self._counts = defaultdict(list), defaultdict(int)

    @torch.no_grad()
    def read(self, optimizer: Optimizer, anatomy: Anatomy) -> None:
        """An optimizer has stepped."""
        if not self._sets.is_due("optimizer"):
            return
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        # a fused step divides by the loss scale itself; what it leaves in .grad is not documented
        scaled = getattr(optimizer, "grad_scale", None) is not None
        for row, parameters in enumerate(anatomy.parameters):
            for p in parameters:
                if id(p) in groups:
                    found = _squares(p, optimizer.state.get(p, {}), groups[id(p)], scaled=scaled)
                    for column, total in found:
                        self._sums[row, column].append(total)
                        self._counts[row, column] += p.numel()

    def write(self, rows: int) -> None:
        """The step has ended: hand on the moments of so many blocks."""
        if self._sets.is_due("optimizer"):
            for row in range(rows):
                self._write_row(row)

    def _write_row(self, row: int) -> None:
        for column in COLUMNS:
            if (row, column) in self._sums:
                total = torch.stack(self._sums[row, column]).sum()
                self._sets.put(row, {column: (total / self._counts[row, column]).sqrt()})
            else:
                self._sets.guard.miss(row, (column,), NO_MOMENT)


def _squares(
    parameter: nn.Parameter, state: Mapping[str, Any], group: Mapping[str, Any], *, scaled: bool
) -> Iterator[tuple[str, Tensor]]:
    """Sums of m^2, of v, and of g^2 / max(v, eps^2), 0-d float64, as far as they are there."""
    first, second = _named(state, _FIRST), _named(state, _SECOND)
    if first is not None:
        yield COLUMNS[0], first.double().square().sum()
    if second is None:
        return
    second = second.double()
    yield COLUMNS[1], second.sum()
    grad = parameter.grad
    if grad is not None and not grad.is_sparse and not scaled:
        if "betas" in group:
            second = second / (1 - group["betas"][1] ** torch.as_tensor(state["step"]).double())
        least = max(float(group["eps"]) ** 2, torch.finfo(torch.float64).tiny)
        yield COLUMNS[2], (grad.double().square() / second.clamp_min(least)).sum()


def _named(state: Mapping[str, Any], names: tuple[str, ...]) -> Tensor | None:
    found = next((state[name] for name in names if state.get(name) is not None), None)
    return found if isinstance(found, Tensor) else None
