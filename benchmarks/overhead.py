"""What recording costs: step time with a monitor over step time without, interleaved in one run.

    python benchmarks/overhead.py --variant original --depth 110 --batch-size 128 --threads 2

One network is trained all the time, and each repetition runs one step of every arm in random order:
what the arm watches with is attached before its step and removed after it, so that all arms share
weights, optimizer and memory. (Two instances of one network differ by up to 3 % in their speed, by
where their memory lies.) A ratio is the median over repetitions of the arm's step over the mean of
the plain steps right before and after it: a machine drifts by several per cent within seconds.
`null` is one more plain step: its distance from 1 is what the numbers can carry. Recording every
10th and 50th step is put together from a recorded and 9 or 49 idle steps of the same repetition.
Beside the time on the clock stands the time of the processor: on a machine that does other things
too it is the steadier of the two, with one thread; threads that wait for each other count as busy.
Freed memory is kept, as `resdiag run` does: page faults would hide the differences.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from resdiag.errors import UsageError
from resdiag.models.resnet import build_model
from resdiag.models.variants import count_blocks, find_variant
from resdiag.training.cpu import disable_malloc_trim
from resdiag.watch.loop.attach import attach
from resdiag.watch.loop.monitor import Monitor

STRIDES = (10, 50)
SLICE = 16
"""Samples of which the arm `slice` takes moments and gradient norms."""

Arm: TypeAlias = Callable[[], AbstractContextManager[Callable[[], None]]]
"""Attaches something to the network: a `with` whose value does one training step."""

Times: TypeAlias = dict[str, list[tuple[float, float]]]
"""Per arm, of each repetition the seconds of its step and those of a plain step beside it."""


def measure(
    variant: str,
    depth: int,
    batch_size: int,
    repetitions: int,
    tick: Callable[[], None] = lambda: None,
) -> tuple[Times, Times]:
    """Seconds of every arm's step on the clock and on the processor.

    `tick` is called after each repetition.
    """
    workload = Workload(variant, depth, batch_size)
    arms: dict[str, Arm] = {
        "null": workload.plain,
        "naive": workload.naive,
        "core": lambda: workload.recorded(metrics="core"),
        "slice": lambda: workload.recorded(metrics="core", moment_samples=SLICE),
        "full": workload.recorded,
        "idle": workload.idle,
    }
    for _ in range(2):
        workload.step()
    times: Times = {name: [] for name in arms}
    busy: Times = {name: [] for name in arms}
    for _ in range(repetitions):
        before = stopwatch(workload.step)
        for name in random.sample(list(arms), len(arms)):
            with arms[name]() as step:
                clock, processor = stopwatch(step)
            after = stopwatch(workload.step)
            times[name].append((clock, (before[0] + after[0]) / 2))
            busy[name].append((processor, (before[1] + after[1]) / 2))
            before = after
        tick()
    return times, busy


def stopwatch(step: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock and of the processor."""
    begun, start = time.process_time(), time.perf_counter()
    step()
    return time.perf_counter() - start, time.process_time() - begun


class Naive:
    """What people write: mean and std of each block's output, gradient norms, `.item()`."""

    def __init__(self) -> None:
        self.log: list[float] = []

    def output(self, module: nn.Module, args: object, output: torch.Tensor) -> None:
        """A forward hook."""
        self.log.extend([output.mean().item(), output.std().item()])

    def gradients(self, model: nn.Module) -> None:
        """After the backward pass."""
        gradients = (p.grad for p in model.parameters())
        self.log.extend(g.norm().item() for g in gradients if g is not None)


class Workload:
    """A network in training on one batch of noise.

    Args:
        variant: Variant id.
        depth: Weighted layers.
        batch_size: Images of 32x32.
    """

    def __init__(self, variant: str, depth: int, batch_size: int) -> None:
        disable_malloc_trim()
        torch.manual_seed(0)
        self._model = build_model(variant, depth, seed=0)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-3, momentum=0.9)
        self._images = torch.randn(batch_size, 3, 32, 32)
        self._labels = torch.randint(0, 10, (batch_size,))

    def step(self) -> None:
        """One step with whatever is attached."""
        train_step(self._model, self._optimizer, self._images, self._labels)

    def plain(self) -> AbstractContextManager[Callable[[], None]]:
        """Nothing is attached."""
        return nullcontext(self.step)

    @contextmanager
    def recorded(self, **choices: Any) -> Iterator[Callable[[], None]]:  # noqa: ANN401
        """A monitor records the step; those before found the blocks and learned how passes go on.

        Args:
            **choices: Of `attach`.
        """
        with attach(self._model, optimizer=self._optimizer, **choices) as monitor:
            step = self._then(monitor)
            for _ in range(3):
                step()
            yield step

    @contextmanager
    def idle(self) -> Iterator[Callable[[], None]]:
        """A monitor is attached, and the step is not due."""
        with attach(self._model, optimizer=self._optimizer, every=10**9) as monitor:
            monitor.start_at(1)
            yield self._then(monitor)

    @contextmanager
    def naive(self) -> Iterator[Callable[[], None]]:
        """The loop that people write."""
        loop = Naive()

        def step() -> None:
            self.step()
            loop.gradients(self._model)

        blocks = map(self._model.get_submodule, self._model.unit_names)
        handles = [block.register_forward_hook(loop.output) for block in blocks]
        try:
            yield step
        finally:
            for handle in handles:
                handle.remove()

    def _then(self, monitor: Monitor) -> Callable[[], None]:
        """A step of the network and of its monitor."""

        def step() -> None:
            self.step()
            monitor.step()

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
    ratios = {name: [arm / plain for arm, plain in pairs] for name, pairs in times.items()}
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


def plain_seconds(times: Times) -> float:
    """Median seconds of a plain step."""
    return statistics.median(plain for pairs in times.values() for _, plain in pairs)


def machine() -> dict[str, Any]:
    """Where it was measured."""
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one network and print its rows, or with `--json` one document.

    `ratio` is that of the clock with its quartiles, `cpu` that of the processor's time.
    """
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    setting = {name: getattr(options, name) for name in ("variant", "depth", "batch_size")}
    times, busy = measure(**setting, repetitions=options.repetitions)
    rows = summarise(times, busy)
    if options.json:
        plain = {"plain_s": plain_seconds(times)}
        print(json.dumps({"schema": 1, **setting, **machine(), **plain, "rows": rows}))
        return
    print(f"{setting}, {machine()}, plain step: {plain_seconds(times):.3f} s", file=sys.stderr)
    print(f"{'name':8}{'every':>6}{'ratio':>8}{'q25':>8}{'q75':>8}{'cpu':>8}{'n':>5}")
    for row in rows:
        ratios = "".join(f"{row[name]:8.3f}" for name in ("ratio", "q25", "q75", "cpu"))
        print(f"{row['name']:8}{row['every']:6}{ratios}{row['n']:5}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variant", default="original", help="id or the paper's letter")
    parser.add_argument("--depth", type=int, default=110, help="weighted layers, 6n+2")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=12, help="steps of every arm")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        row = find_variant(options.variant)
        count_blocks(options.depth)
    except UsageError as error:
        parser.error(str(error))
    if not row.shortcut:
        parser.error(f"variant '{row.id}' has no residual blocks to record")
    options.variant = row.id
    return options


if __name__ == "__main__":
    main()
