"""Which units of the activations inside the blocks are saturated, and which are dead."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from resdiag.watch import metrics
from resdiag.watch.calls import Call


class Gates:
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

    def count(
        self, features: Callable[[int, Tensor], int | None]
    ) -> Iterator[tuple[int, list[Tensor], list[int]]]:
        """Closed units of every block: row, counts per channel of each gate, sizes of the gates.

        Args:
            features: The dimension of the channels in a tensor of a row, if it is known.
        """
        counted = _count_closed(
            (gate, features(row, gate)) for row, gates in self._inside for gate in gates
        )
        for row, gates in self._inside:
            yield row, [counted[id(gate)] for gate in gates], [gate.numel() for gate in gates]


def fractions(
    counts: Sequence[Tensor], sizes: Sequence[int]
) -> tuple[metrics.Scalar, metrics.Scalar]:
    """Shares of saturated units, and of channels all of whose units are: dead ones."""
    full = [count == size // len(count) for count, size in zip(counts, sizes, strict=True)]
    channels = sum(len(count) for count in counts)
    return _total(counts) / sum(sizes), _total(full) / channels


def saturated(call: Call, x: Tensor) -> Tensor:
    """Which units have a slope below `SATURATED_SLOPE`; the usual two without computing slopes."""
    if call.name == "relu":
        return x <= 0
    if call.name == "elu" and call.kwargs.get("alpha", 1.0) == 1.0 and not call.args:
        return x < math.log(metrics.SATURATED_SLOPE)
    return metrics.slope(call, x).abs() < metrics.SATURATED_SLOPE


def _count_closed(gates: Iterable[tuple[Tensor, int | None]]) -> dict[int, Tensor]:
    """Closed units per channel of each gate, those of one shape counted at once."""
    alike: dict[tuple[torch.Size, int], list[Tensor]] = defaultdict(list)
    for gate, features in gates:
        alike[gate.shape, metrics.channel_dimension(gate.dim(), features)].append(gate)
    counted: dict[int, Tensor] = {}
    for (shape, at), same in alike.items():
        others = tuple(d + 1 for d in range(len(shape)) if d != at)
        closed = torch.stack(same).count_nonzero(others) if others else torch.stack(same).long()
        counted |= {id(gate): count for gate, count in zip(same, closed.unbind(), strict=True)}
    return counted


def _total(counts: Sequence[Tensor]) -> metrics.Scalar:
    """The sum of everything in some tensors of counts."""
    if metrics.on_host(counts[0].device):
        return float(sum(int(count.numpy().sum()) for count in counts))
    return torch.cat([count.reshape(-1) for count in counts]).sum(dtype=torch.float64)
