"""What a study will cost, before it is run: time from measured speed, disk from counted numbers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from resdiag.catalog.table import RECORDED
from resdiag.data.registry import known_sizes
from resdiag.models.variants import count_blocks
from resdiag.runs.config import RunConfig
from resdiag.study.grid import Cell
from resdiag.study.ledger import ENDED, Entry
from resdiag.training.recipe import Request, resolve

_SOURCE = "one core of a 2025 server, float32"
_IMAGES_PER_S = 300.0
"""Training speed of depth 20 at full width on `_SOURCE`: half of what two threads reach together,
612 images/s (channels_last, PyTorch 2.15)."""
_START_S = 0.6
"""What a cell costs besides its images, on `_SOURCE`: start in a process that was forked, data,
tracing of the first recorded step, commits and verdict; measured at depth 20 (0.7 s of a processor
that others used too). It grows with depth: 2 to 3 s at depth 110."""
_PACKED = 0.9  # zstd on float32 metrics
_TEST_SHARE = 1 / 3  # a forward pass is a third of a training step


@dataclass(frozen=True)
class Estimate:
    """What is missing of a study will take.

    Attributes:
        seconds: Of one slot: cells one after the other; None if no size of data is known.
        bytes: On the disk, for what is missing; None likewise.
        basis: Where the speed is from.
        unknown: Cells that are not counted, as the size of their data is not known here.
    """

    seconds: float | None
    bytes: float | None
    basis: str
    unknown: int


def estimate(cells: Sequence[Cell], entries: Sequence[Entry]) -> Estimate:
    """Estimate what the cells that have not ended will cost.

    Args:
        cells: Of the study.
        entries: The ledger, in the same order.
    """
    missing = [cell for cell, entry in zip(cells, entries, strict=True) if entry.state not in ENDED]
    sizes = [(cell.request, known_sizes(cell.request.data)) for cell in missing]
    costs = [_cost(request, *size) for request, size in sizes if size]
    speeds = list(_measured(cells, entries))
    speed = sum(speeds) / len(speeds) if speeds else _IMAGES_PER_S
    basis = f"measured on {len(speeds)} cells of this study" if speeds else _SOURCE
    if missing and not costs:
        return Estimate(None, None, basis, len(missing))
    seconds = sum(work / speed + start for work, start, _ in costs)
    size = sum(size for _, _, size in costs)
    return Estimate(float(seconds), float(size), basis, len(missing) - len(costs))


def _measured(cells: Sequence[Cell], entries: Sequence[Entry]) -> Iterable[float]:
    """Speeds of the cells that have begun, as images of depth 20 and full width per second."""
    for cell, entry in zip(cells, entries, strict=True):
        images = entry.progress.get("images_per_s")
        if isinstance(images, int | float) and images > 0:
            yield images * _weight(cell.request)


def _weight(request: Request) -> float:
    """Arithmetic of one image, depth 20 at full width being 1: linear in depth, square in width."""
    return (request.depth - 2) / 18 * request.width**2


@cache
def _cost(request: Request, train: int, test: int) -> tuple[float, float, float]:
    """What a cell takes: images of depth 20 at full width, other seconds, bytes.

    The seconds are before and after the steps: the network is traced, judged and written by block.
    """
    config = resolve(request, data_name=request.data, train_size=train)
    tests = 1 + (config.steps // config.eval_every if config.eval_every else 0)
    images = config.steps * config.batch_size + tests * test * _TEST_SHARE
    start = _START_S * max(1.0, (request.depth - 2) / 18 * 0.75)
    return images * _weight(request), start, _bytes(config)


def _bytes(config: RunConfig) -> float:
    """Recorded numbers, the curve, and the last two checkpoints of weights and momenta."""
    first = min(config.record_first, config.steps)
    steps = first + (config.steps - first) // config.every if config.every else first
    blocks = 3 * count_blocks(config.depth)
    parameters = blocks / 9 * 270_000 * config.width**2  # 0.27 M at depth 20, He et al. 2015
    rows = steps * blocks * len(RECORDED) * 4 * _PACKED
    kept = min(2, -(-config.steps // config.commit_every))
    return rows + config.steps * 14 * 8 * _PACKED + kept * 2 * 4 * parameters + 20_000
