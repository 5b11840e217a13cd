"""What recording costs in two checkouts, in turns: did a change make it dearer?

    git worktree add /tmp/before HEAD~30
    python benchmarks/versions.py /tmp/before . --pairs 20

One process per checkout keeps a network in training with a monitor that records every second step;
the processes take turns, a few steps each, so that a busy machine is busy for both. A ratio is the
median over pairs of a recorded step's time over that of the step beside it that is not recorded;
`processor` is the same of the processor's time. Both checkouts need `resdiag.attach`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

NETWORKS = {
    "original-110 b128": ("original", 110, 128, 32),
    "elu-110 b128": ("elu", 110, 128, 32),
    "original-20 b32": ("original", 20, 32, 32),
    "resnet18 b32": ("resnet18", 18, 32, 64),
}
"""Variant, depth, batch size, and height of the images."""

TURN = 2
"""Pairs of steps that one checkout runs before the other does."""

ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""glibc keeps freed memory, as after `disable_malloc_trim`, which not every checkout has."""

WORKER = """
import json, sys, time, warnings
import torch, torch.nn.functional as F
import resdiag
from resdiag.models.resnet import build_model
variant, depth, batch, size, metrics, threads = json.loads(sys.argv[1])
warnings.simplefilter("ignore")
torch.set_num_threads(threads)
torch.manual_seed(0)
if variant == "resnet18":
    from torchvision.models import resnet18
    model = resnet18(num_classes=10)
else:
    model = build_model(variant, depth, seed=0)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
monitor = resdiag.attach(model, optimizer=optimizer, metrics=metrics, every=2)
def step():
    begun, start = time.process_time(), time.perf_counter()
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    monitor.step()
    return time.perf_counter() - start, time.process_time() - begun
for _ in range(6):
    step()
for line in sys.stdin:
    print(json.dumps([(step(), step()) for _ in range(int(line))]), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkouts", nargs=2, type=Path)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    options = parser.parse_args()
    print(f"{'network':<20}{'metrics':<8}{'checkout':<24}clock [quartiles]      processor")
    for network in options.networks.split(","):
        for metrics in ("core", "full"):
            for checkout, pairs in compare(network, metrics, options).items():
                clock, processor = (
                    [recorded[at] / idle[at] for recorded, idle in pairs] for at in (0, 1)
                )
                low, middle, high = statistics.quantiles(clock, n=4)
                print(
                    f"{network:<20}{metrics:<8}{checkout:<24}"
                    f"{middle:.3f} [{low:.3f} {high:.3f}]   {statistics.median(processor):.3f}",
                    flush=True,
                )


def compare(network: str, metrics: str, options: argparse.Namespace) -> dict[str, list[Any]]:
    """Pairs of a recorded step and one that is not, by checkout."""
    workers = {str(path): start(path, network, metrics, options) for path in options.checkouts}
    found: dict[str, list[Any]] = defaultdict(list)
    while min(len(found[name]) for name in workers) < options.pairs:
        for name, worker in workers.items():
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write(f"{TURN}\n")
            worker.stdin.flush()
            found[name] += json.loads(worker.stdout.readline())
    for worker in workers.values():
        worker.communicate()
    return found


def start(
    checkout: Path, network: str, metrics: str, options: argparse.Namespace
) -> "subprocess.Popen[str]":
    """A process that trains with the code of one checkout."""
    settings = json.dumps([*NETWORKS[network], metrics, options.threads])
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, settings],
        cwd=checkout,
        env={**os.environ, **ALLOCATOR, "PYTHONPATH": str(checkout.resolve())},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


if __name__ == "__main__":
    main()
