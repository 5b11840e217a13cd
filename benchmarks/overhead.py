"""What recording costs: step time with a monitor over step time without, interleaved in one run.

    python benchmarks/overhead.py --depth 110 --batch-size 128 --threads 2 --repetitions 12

Each repetition runs one training step of every arm in random order; a ratio is the median over
repetitions of arm / plain of the same repetition. `null` is a second unwatched model: its distance
from 1 is what the numbers can carry. Recording every 10th and 50th step is put together from a
recorded and 9 or 49 idle steps of the same repetition.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from resdiag.models.resnet import build_model
from resdiag.watch.monitor import Monitor, attach

STRIDES = (10, 50)
Arm = Callable[[], None]


def main() -> None:
    """Parse, measure, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="original")
    parser.add_argument("--depth", type=int, default=110)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    times = measure(options.variant, options.depth, options.batch_size, options.repetitions)
    rows = summarise(times)
    if options.json:
        print(json.dumps({"schema": 1, "machine": machine(), **vars(options), "rows": rows}))
        return
    print(f"{options.variant}-{options.depth}, batch {options.batch_size}, {machine()}")
    print(f"plain step: {statistics.median(times['plain']):.3f} s")
    for row in rows:
        print("{name:<6} {every:>3} {ratio:.3f}  [{q25:.3f} {q75:.3f}]  n={n}".format(**row))


def measure(variant: str, depth: int, batch_size: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds per step of every arm, aligned by repetition."""
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, 32, 32)
    labels = torch.randint(0, 10, (batch_size,))
    arms = {
        "plain": make_arm(variant, depth, images, labels, every=0),
        "null": make_arm(variant, depth, images, labels, every=0),
        "naive": make_naive_arm(variant, depth, images, labels),
        "core": make_arm(variant, depth, images, labels, every=1, metrics="core"),
        "full": make_arm(variant, depth, images, labels, every=1),
        "idle": make_arm(variant, depth, images, labels, every=10**9),
    }
    for arm in arms.values():
        arm()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repetitions):
        for name in random.sample(list(arms), len(arms)):
            start = time.perf_counter()
            arms[name]()
            times[name].append(time.perf_counter() - start)
    return times


def make_arm(
    variant: str,
    depth: int,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    every: int,
    metrics: str = "full",
) -> Arm:
    """A training step, recorded every `every`-th time; 0 for no monitor at all."""
    model = build_model(variant, depth, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    monitor: Monitor | None = None
    if every:
        monitor = attach(model, optimizer=optimizer, every=every, metrics=metrics)

    def step() -> None:
        train_step(model, optimizer, images, labels)
        if monitor is not None:
            monitor.step()

    return step


def make_naive_arm(variant: str, depth: int, images: torch.Tensor, labels: torch.Tensor) -> Arm:
    """What people write by hand: mean and std of each block's output, gradient norms, `.item()`."""
    model = build_model(variant, depth, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    log: list[float] = []

    def hook(module: nn.Module, args: object, output: torch.Tensor) -> None:
        log.extend([output.mean().item(), output.std().item()])

    for name in model.unit_names:
        model.get_submodule(name).register_forward_hook(hook)

    def step() -> None:
        train_step(model, optimizer, images, labels)
        log.extend(p.grad.norm().item() for p in model.parameters() if p.grad is not None)

    return step


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor
) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()


def summarise(times: dict[str, list[float]]) -> list[dict[str, object]]:
    """Median ratio and quartiles per arm."""
    plain = times["plain"]
    ratios = {
        name: [a / b for a, b in zip(values, plain, strict=True)]
        for name, values in times.items()
        if name != "plain"
    }
    strided = {
        (name, every): [
            (recorded + (every - 1) * idle) / every
            for recorded, idle in zip(ratios[name], ratios["idle"], strict=True)
        ]
        for name in ("core", "full")
        for every in STRIDES
    }
    single = {(name, int(name not in ("null", "idle"))): values for name, values in ratios.items()}
    rows: list[dict[str, object]] = []
    for (name, every), values in (single | strided).items():
        q25, median, q75 = statistics.quantiles(values, n=4)
        rows.append(
            {
                "name": name,
                "every": every,
                "ratio": median,
                "q25": q25,
                "q75": q75,
                "n": len(values),
            }
        )
    return rows


def machine() -> str:
    """Where it was measured."""
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
