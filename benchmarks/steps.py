"""Where the time of a training step goes, and the floor below which this machine cannot take it.

The profile is torch's own, each operation's time without those it calls, summed by kind. Two floors
stand beside it: arithmetic, the counted floating-point operations over the rate of a large matrix
product; traffic, the bytes that every operation reads and writes once over the rate of a large
copy. A step cannot be faster than the larger of the two unless operations are fused or skipped.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from overhead import train_step
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from resdiag.models.resnet import build_model
from resdiag.training.cpu import disable_malloc_trim
from resdiag.watch.loop.attach import attach

KINDS = (  # the first whose word is in the operation's name
    ("convolution, backward", ("convolution_backward",)),
    ("convolution, forward", ("convolution", "conv2d")),
    ("batch norm, backward", ("batch_norm_backward",)),
    ("batch norm, forward", ("batch_norm",)),
    ("activation, backward", ("threshold_backward", "elu_backward")),
    ("activation, forward", ("relu", "elu", "clamp_min")),
    ("optimizer", ("_foreach", "SGD", "Optimizer")),
    ("sums of residual blocks and gradients", ("aten::add", "aten::add_")),
)
REST = "everything else, Python between operations not counted"


def measure(repetitions: int) -> list[dict[str, Any]]:
    """A row per depth: profile, floors, and the same with the recorder on."""
    disable_malloc_trim()
    peak, rate = arithmetic_rate(), copy_rate()
    return [row(depth, peak, rate, repetitions) for depth in (20, 110)]


def row(
    depth: int, peak: float, rate: float, repetitions: int, batch_size: int = 128
) -> dict[str, Any]:
    """One network."""
    torch.manual_seed(0)
    images, labels = torch.randn(batch_size, 3, 32, 32), torch.randint(0, 10, (batch_size,))
    plain, recorded = step_of(depth, images, labels), step_of(depth, images, labels, record=True)
    for run in (plain, recorded, plain, recorded):
        run()
    times = [(seconds(plain), seconds(recorded)) for _ in range(repetitions)]
    model = build_model("original", depth, seed=0)
    flops, moved = counted(lambda: F.cross_entropy(model(images), labels).backward())
    return {
        "depth": depth,
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "step_ms": 1000 * statistics.median(a for a, _ in times),
        "recorded_ms": 1000 * statistics.median(b for _, b in times),
        "kinds": kinds(plain, max(2, repetitions // 4)),
        "kinds_recorded": kinds(recorded, max(2, repetitions // 4)),
        "gflop": flops / 1e9,
        "gbyte": moved / 1e9,
        "gflop_per_s": peak / 1e9,
        "gbyte_per_s": rate / 1e9,
        "arithmetic_floor_ms": 1000 * flops / peak,
        "traffic_floor_ms": 1000 * moved / rate,
        "n": repetitions,
    }


def step_of(
    depth: int, images: Tensor, labels: Tensor, *, record: bool = False
) -> Callable[[], None]:
    """A training step, with the full set of metrics or without."""
    model = build_model("original", depth, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    monitor = attach(model, optimizer=optimizer) if record else None

    def step() -> None:
        train_step(model, optimizer, images, labels)
        if monitor is not None:
            monitor.step()

    return step


def kinds(run: Callable[[], None], steps: int) -> dict[str, float]:
    """Milliseconds per step by kind of operation."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            run()
    sums = dict.fromkeys([*(kind for kind, _ in KINDS), REST], 0.0)
    for event in seen.key_averages():
        sums[kind_of(event.key)] += event.self_cpu_time_total / 1000 / steps
    return sums


def kind_of(name: str) -> str:
    """The kind of an operation by its name in the profile.

    >>> kind_of("aten::mkldnn_convolution"), kind_of("aten::sum") == REST
    ('convolution, forward', True)
    """
    if name.startswith("autograd::") or "Backward" in name:
        return REST
    return next((kind for kind, words in KINDS if any(word in name for word in words)), REST)


def counted(run: Callable[[], None]) -> tuple[int, int]:
    """Floating-point operations, and bytes read and written if every operation does so once."""
    traffic = _Traffic()
    with FlopCounterMode(display=False) as flops, traffic:
        run()
    return flops.get_total_flops(), traffic.bytes


class _Traffic(TorchDispatchMode):
    """Adds up the sizes of what operations take and return; a view moves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        there = {x.untyped_storage().data_ptr() for x in leaves}
        is_view = (
            bool(made)
            and all(x.untyped_storage().data_ptr() in there for x in made)
            and not func._schema.is_mutable
        )
        if not is_view:
            self.bytes += sum(x.numel() * x.element_size() for x in [*leaves, *made])
        return result


def arithmetic_rate(size: int = 1536) -> float:
    """Floating-point operations a second of a large matrix product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / best(lambda: torch.mm(a, b))


def copy_rate(megabytes: int = 256) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    a = torch.randn(megabytes * 2**18)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / best(lambda: b.copy_(a))


def best(run: Callable[[], object], repetitions: int = 7) -> float:
    """Seconds of the fastest repetition."""
    run()
    return min(seconds(run) for _ in range(repetitions))


def seconds(run: Callable[[], object]) -> float:
    """Time on the clock."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
