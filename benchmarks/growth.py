"""How the cost of a recorded step grows with the network's depth, the batch, and the run's length.

What is measured is the time of the processor in a recorded step less that in an idle one of the
same repetition, on one thread: seconds, not ratios, because that is what grows.
"""

import random
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from overhead import Arm, Workload, stopwatch, train_step

from resdiag.models.resnet import build_model
from resdiag.watch.loop.attach import attach

DEPTHS, BATCHES = (20, 32, 56, 110), (8, 32, 128)
BATCH, DEPTH = 32, 20


def measure(repetitions: int) -> dict[str, Any]:
    """Rows of {"depth", "blocks", "batch_size", "metrics", "ms", "step_ms"}, and the long run."""
    torch.set_num_threads(1)
    settings = [(depth, BATCH) for depth in DEPTHS]
    settings += [(DEPTH, batch) for batch in BATCHES if batch != BATCH]
    rows = [row for depth, batch in settings for row in cost(depth, batch, repetitions)]
    return {"rows": rows, "steps": long_run()}


def cost(depth: int, batch_size: int, repetitions: int) -> Iterator[dict[str, Any]]:
    """What one recorded step costs more than an idle one."""
    workload = Workload("original", depth, batch_size)
    arms: dict[str, Arm] = {
        "idle": workload.idle,
        "core": lambda: workload.recorded(metrics="core"),
        "full": workload.recorded,
    }
    workload.step()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repetitions):
        for name in random.sample(list(arms), len(arms)):
            with arms[name]() as step:
                times[name].append(stopwatch(step)[1])
    for metrics in ("core", "full"):
        more = [a - b for a, b in zip(times[metrics], times["idle"], strict=True)]
        yield {
            "depth": depth,
            "blocks": (depth - 2) // 2,
            "batch_size": batch_size,
            "metrics": metrics,
            "ms": 1000 * statistics.median(more),
            "step_ms": 1000 * statistics.median(times["idle"]),
            "n": repetitions,
        }


def long_run(steps: int = 2000, part: int = 200) -> dict[str, Any]:
    """The first and the last recorded steps of a long run on two images: does anything pile up?"""
    torch.manual_seed(0)
    model = build_model("original", 8, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 10, (2,))
    times: list[float] = []
    with attach(model, optimizer=optimizer) as monitor:
        for _ in range(steps):

            def step() -> None:
                train_step(model, optimizer, images, labels)
                monitor.step()

            times.append(stopwatch(step)[1])
        held = sum(column.nbytes for table in monitor.drain() for column in table.values())
    return {
        "steps": steps,
        "first_ms": 1000 * statistics.median(times[part // 10 : part]),
        "last_ms": 1000 * statistics.median(times[-part:]),
        "bytes_per_step": held / steps,
        "blocks": 3,
    }
