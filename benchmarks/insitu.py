"""What small work costs in the middle of a training step, where no cache holds its code.

    python benchmarks/insitu.py                     # original-110, batch 128, two threads
    python benchmarks/insitu.py --depth 20 --steps 60

At every block's output, and at its gradient, one of a few pieces of work is done and timed, chosen
at random: nothing, an operation on 16 numbers, the norm of the tensor, its sums over channels. The
median per width of the network is printed in microseconds, beside what the same work takes in a
loop. Then the own calls of the recorder and of the naive loop are timed, in turns of a few steps,
and what it costs that torch shows each function to a mode before it runs.
"""

import argparse
import functools
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from overhead import Naive, Workload, stopwatch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from resdiag.models.resnet import build_model
from resdiag.training.cpu import disable_malloc_trim
from resdiag.watch.loop.gradients import Gradients
from resdiag.watch.loop.monitor import Monitor
from resdiag.watch.measure.reductions import norm
from resdiag.watch.record.backward import Backward
from resdiag.watch.record.forward import Recorder
from resdiag.watch.record.hooks import TappedPass

FEW = torch.randn(16)
WORK: dict[str, Callable[[Tensor], object]] = {
    "nothing": lambda x: None,
    "16 numbers": lambda x: torch.dot(FEW, FEW),
    "norm": norm,
    "channel sums": lambda x: x.sum((2, 3)).sum(0),
}
CALLS: dict[type, tuple[str, ...]] = {
    Naive: ("output", "gradients"),
    Recorder: ("started", "operands", "added", "closed", "activation", "finished"),
    Backward: ("_gradient",),
    TappedPass: ("start", "_look", "_end"),
    Gradients: ("before_update",),
    Monitor: ("step",),
}
"""What is done in a step, each without what is done inside of another of these."""

TURNS = 4


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    disable_malloc_trim()
    for name, cells in small_work(options).items():
        print(f"{name:<14}", *(f"{where} {us:6.0f}" for where, us in cells.items()), "us")
    for title, calls in own_calls(options).items():
        print(f"\n{title}: {calls.pop('all'):.1f} ms a step, of {calls.pop('step'):.0f}")
        for name, ms in sorted(calls.items(), key=lambda item: -item[1]):
            print(f"    {name:<26} {ms:6.1f}")
    shown, us = dispatch(options)
    print(f"{shown} convolutions are shown to a mode, {us:.0f} us each before it does anything")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", default="original")
    parser.add_argument("--depth", type=int, default=110)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--metrics", default="core")
    parser.add_argument("--steps", type=int, default=20)
    return parser.parse_args()


def small_work(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Microseconds per piece of work: by direction and channels, and in a loop."""
    torch.manual_seed(0)
    model = build_model(options.variant, options.depth, seed=0)
    images, labels = torch.randn(options.batch_size, 3, 32, 32), torch.arange(options.batch_size)
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)

    def work(x: Tensor, direction: str) -> None:
        name, x = random.choice(list(WORK)), x.detach()
        start = time.perf_counter()
        WORK[name](x)
        seconds[name, f"{direction} {x.shape[1]}"].append(time.perf_counter() - start)

    def hook(module: torch.nn.Module, args: object, output: Tensor) -> None:
        work(output, "forward")
        output.register_hook(lambda g: work(g, "backward"))

    for name in model.unit_names:
        model.get_submodule(name).register_forward_hook(hook)
    for _ in range(options.steps):
        F.cross_entropy(model(images), labels % 10).backward()
    cells: dict[str, dict[str, float]] = {name: {} for name in WORK}
    for name, where in sorted(seconds):
        cells[name][where] = 1e6 * statistics.median(seconds[name, where])
    x = torch.randn(options.batch_size, 16, 32, 32)
    for name, each in WORK.items():
        cells[name]["loop 16"] = 1e6 * statistics.median(
            stopwatch(functools.partial(each, x))[0] for _ in range(50)
        )
    return cells


def own_calls(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds a step that recorder and naive loop spend in their calls, and of the step."""
    spent: dict[str, float] = defaultdict(float)
    inner: list[float] = []  # of the calls that are running, what is spent in calls inside

    def wrap(kind: type, name: str) -> Callable[..., Any]:
        call = getattr(kind, name)

        @functools.wraps(call)
        def wrapped(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            inner.append(0.0)
            try:
                return call(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                spent[f"{kind.__name__}.{name.strip('_')}"] += took - inner.pop()
                if inner:
                    inner[-1] += took

        setattr(kind, name, wrapped)
        return call

    kept = {(kind, name): wrap(kind, name) for kind, names in CALLS.items() for name in names}
    workload = Workload(options.variant, options.depth, options.batch_size)
    arms = {
        options.metrics: functools.partial(workload.recorded, metrics=options.metrics),
        "naive": workload.naive,
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for _ in range(TURNS):
        for name, arm in arms.items():
            with arm() as step:
                for _ in range(max(1, options.steps // TURNS)):
                    spent.clear()
                    whole, _ = stopwatch(step)
                    found[name].append({**spent, "all": sum(spent.values()), "step": whole})
    for (kind, name), call in kept.items():
        setattr(kind, name, call)
    return {arm: _medians(steps) for arm, steps in found.items()}


def _medians(steps: list[dict[str, float]]) -> dict[str, float]:
    """The median over steps of each of their numbers, in milliseconds."""
    return {
        name: 1000 * statistics.median(step.get(name, 0.0) for step in steps) for name in steps[0]
    }


class Idle(TorchFunctionMode):
    """Runs what it is shown, and knows how long that took."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self.inside += time.perf_counter() - start
        return result


def dispatch(options: argparse.Namespace) -> tuple[int, float]:
    """Convolutions of a pass, and the microseconds that a mode adds to each."""
    torch.manual_seed(0)
    model = build_model(options.variant, options.depth, seed=0)
    images = torch.randn(options.batch_size, 3, 32, 32)
    mode, more = Idle(), list[float]()
    plain = F.conv2d

    def conv2d(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        before, start = mode.inside, time.perf_counter()
        result = plain(*args, **kwargs)
        more.append(time.perf_counter() - start - (mode.inside - before))
        return result

    F.conv2d = conv2d
    try:
        with mode:
            for _ in range(max(2, options.steps // 4)):
                more.clear()
                model(images)
    finally:
        F.conv2d = plain
    return len(more), 1e6 * statistics.median(more)


if __name__ == "__main__":
    main()
