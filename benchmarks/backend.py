"""Images per second of the training loop beside the recipe that people start from.

    python benchmarks/backend.py                                     # original-20, batch 128
    python benchmarks/backend.py --variant elu --arms stock,again,eager,fast
    python benchmarks/backend.py --arms stock,again,eager,bfloat16,compile --threads 2 --json

`stock` is the usual script: torchvision's RandomCrop(32, 4), RandomHorizontalFlip, ToTensor and
Normalize on PIL images, a DataLoader with two workers, eager NCHW in float32, SGD with Nesterov
momentum, `loss.item()` each step. `again` is a second one: its distance from 1 is what the numbers
can carry. `eager`, `fast`, `bfloat16` (autocast) and `compile` are `resdiag run` with that backend
or dtype, not recording; `recording` is `eager` that records every tenth step.

Each arm is a process of its own, as the allocator's settings are the process's. The arms take
turns, a few steps each, in random order; a ratio is the median over rounds of stock / arm of the
same round: above 1 is faster. It is given by the clock and by processor time (workers of the loader
included), which others on the machine disturb less.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

LIVING = ExitStack()
"""What an arm's steps run under, for as long as its process lives."""

ARMS = ("stock", "again", "eager", "fast", "bfloat16", "compile", "recording")
IMAGES = 12_800
MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


def main() -> None:
    options = parse()
    if options.arm:
        serve(options)
        return
    rounds = measure(options)
    rows = summarise(rounds, options.steps * options.batch_size)
    about = {name: getattr(options, name) for name in ("variant", "depth", "batch_size", "threads")}
    about |= {"cpu": cpu(), "steps": options.steps, "load": os.getloadavg()[0]}
    if options.json:
        print(json.dumps({"schema": 1, **about, "rows": rows}))
        return
    print(about)
    print(f"{'arm':<10} {'images/s':>9} {'clock':>22} {'processor':>22} {'n':>3}")
    for row in rows:
        shown = ["{ratio:.3f} [{q25:.3f} {q75:.3f}]".format(**row[by]) for by in ("clock", "cpu")]
        print(
            f"{row['name']:<10} {row['images_per_s']:>9.0f} "
            f"{shown[0]:>22} {shown[1]:>22} {row['n']:>3}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", default="original")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arms", default="stock,again,eager,bfloat16")
    parser.add_argument("--steps", type=int, default=10, help="of an arm's turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in options.arms.split(","):
        if name not in ARMS:
            parser.error(f"unknown arm '{name}'; known: {', '.join(ARMS)}")
    return options


def measure(options: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    """Per round and arm the seconds of a turn, by the clock and of the processor."""
    names = options.arms.split(",")
    arms = {name: start(name) for name in names}
    for arm in arms.values():
        turn(arm, 3)
    rounds = []
    for _ in range(options.rounds):
        rounds.append(
            {name: turn(arms[name], options.steps) for name in random.sample(names, len(names))}
        )
        print(f"round {len(rounds)} of {options.rounds}", file=sys.stderr, flush=True)
    for arm in arms.values():
        arm.kill()  # the loader's workers end with it
        arm.wait()
    return rounds


def start(name: str) -> "subprocess.Popen[str]":
    """The process of an arm."""
    command = [sys.executable, __file__, *sys.argv[1:], "--arm", name]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def turn(arm: "subprocess.Popen[str]", steps: int) -> dict[str, float]:
    """Have an arm do some steps."""
    assert arm.stdin is not None
    assert arm.stdout is not None
    print(steps, file=arm.stdin, flush=True)
    answer: dict[str, float] = json.loads(arm.stdout.readline())
    return answer


def summarise(rounds: list[dict[str, dict[str, float]]], images: int) -> list[dict[str, Any]]:
    """Speed of every arm, and how many times that of `stock` it is."""
    rows = []
    for name in rounds[0]:
        row: dict[str, Any] = {"name": name, "n": len(rounds)}
        row["images_per_s"] = images / statistics.median(r[name]["clock"] for r in rounds)
        for by in ("clock", "cpu"):
            ratios = [r["stock"][by] / r[name][by] for r in rounds]
            q25, median, q75 = statistics.quantiles(ratios, n=4)
            row[by] = {"ratio": median, "q25": q25, "q75": q75}
        rows.append(row)
    return sorted(rows, key=lambda row: ARMS.index(row["name"]))


def serve(options: argparse.Namespace) -> None:
    """An arm's process: a number of steps in, their seconds out."""
    import psutil
    import torch

    torch.set_num_threads(options.threads)
    me = psutil.Process()

    def spent() -> float:
        used = [p.cpu_times() for p in (me, *me.children(recursive=True))]
        return sum(times.user + times.system for times in used)

    with tempfile.TemporaryDirectory() as folder:
        make = make_stock if options.arm in ("stock", "again") else make_ours
        step = make(options, Path(folder))
        for line in sys.stdin:
            begun, used = time.perf_counter(), spent()
            for _ in range(int(line)):
                step()
            answer = {"clock": time.perf_counter() - begun, "cpu": spent() - used}
            print(json.dumps(answer), flush=True)


def make_stock(options: argparse.Namespace, folder: Path) -> Callable[[], None]:
    """A step of the usual script."""
    import torch
    import torch.nn.functional as F
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    from resdiag.models.resnet import build_model

    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, 4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    pixels = torch.randint(0, 256, (IMAGES, 32, 32, 3), dtype=torch.uint8).numpy()

    class Pictures(Dataset):
        def __len__(self) -> int:
            return IMAGES

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return transform(Image.fromarray(pixels[index])), index % 10

    loader = DataLoader(Pictures(), options.batch_size, shuffle=True, num_workers=2, drop_last=True)
    model = build_model(options.variant, options.depth, seed=0)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    losses: list[float] = []

    def batches() -> Iterator[list[torch.Tensor]]:
        while True:
            yield from loader

    stream = batches()

    def step() -> None:
        images, labels = next(stream)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    return step


def make_ours(options: argparse.Namespace, folder: Path) -> Callable[[], None]:
    """A step of `resdiag run`."""
    import torch

    from resdiag.data.dataset import ImageData
    from resdiag.runs.config import RunConfig
    from resdiag.runs.environment import environment
    from resdiag.runs.store import RunWriter
    from resdiag.training.loop import Training

    config = RunConfig(
        variant=options.variant, depth=options.depth, data="made", recipe="short", steps=10**8,
        batch_size=options.batch_size, lr=0.1, milestones=(), augment=True, record_first=0,
        every=10 if options.arm == "recording" else 0, eval_every=0, commit_every=10**8,
        dtype="bfloat16" if options.arm == "bfloat16" else "float32",
        backend=options.arm if options.arm in ("fast", "compile") else "eager",
    )  # fmt: skip
    images, labels = (
        torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8),
        torch.arange(IMAGES),
    )
    data = ImageData(
        name="made", train_images=images, train_labels=labels % 10, test_images=images[:10],
        test_labels=labels[:10], classes=list("0123456789"), mean=torch.tensor(MEAN),
        std=torch.tensor(STD), flip=True, identity={"name": "made"}, note="",
    )  # fmt: skip
    described = environment(config.device, config.dtype)
    writer = RunWriter.open(folder, config, environment=described, data=data.identity)
    training = Training(config, data, writer)
    LIVING.enter_context(training.backend())
    steps = iter(range(10**8))
    return lambda: training.train_step(next(steps))


def cpu() -> str:
    """The processor's name."""
    from resdiag.runs.environment import environment

    return str(environment("cpu", "float32")["device_name"] or platform.machine())


if __name__ == "__main__":
    main()
