"""What recording costs: step time with a monitor over step time without, interleaved in one run.

Each repetition runs one training step of every arm in random order; a ratio is the median over
repetitions of arm / plain of the same repetition. `null` is a second unwatched model: its distance
from 1 is what the numbers can carry. Recording every 10th and 50th step is put together from a
recorded and 9 or 49 idle steps of the same repetition. Beside the time on the clock stands the time
of the processor: on a machine that does other things too it is the steadier of the two, with one
thread; threads that wait for each other count as busy. Freed memory is kept, as `resdiag run` does:
page faults would hide the differences.
"""

import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from resdiag.models.resnet import build_model
from resdiag.training.pages import keep_pages
from resdiag.watch.monitor import Monitor, attach

STRIDES = (10, 50)
Arm = Callable[[], None]
Times: TypeAlias = dict[str, list[float]]


def measure(
    variant: str,
    depth: int,
    batch_size: int,
    repetitions: int,
    tick: Callable[[], None] = lambda: None,
) -> tuple[Times, Times]:
    """Seconds per step of every arm on the clock and on the processor, aligned by repetition.

    `tick` is called after each repetition.
    """
    keep_pages()
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
    times: Times = {name: [] for name in arms}
    busy: Times = {name: [] for name in arms}
    for _ in range(repetitions):
        for name in random.sample(list(arms), len(arms)):
            begun, start = time.process_time(), time.perf_counter()
            arms[name]()
            times[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - begun)
        tick()
    return times, busy


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
    """Forward, backward, update."""
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()


def summarise(times: Times, busy: Times | None = None) -> list[dict[str, Any]]:
    """Median ratio and quartiles per arm; `cpu` is the median ratio of `busy`, where given."""
    cpu = {(row["name"], row["every"]): row["ratio"] for row in summarise(busy)} if busy else {}
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
    rows: list[dict[str, Any]] = []
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
            | ({"cpu": cpu[name, every]} if cpu else {})
        )
    return rows


def machine() -> dict[str, Any]:
    """Where it was measured."""
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
