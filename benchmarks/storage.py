"""What a long record costs to write, to keep and to draw.

    python benchmarks/storage.py                          # 64,000 steps of 54 blocks, every 50th
    python benchmarks/storage.py --every 1 --json
    python benchmarks/storage.py --steps 6400 --repetitions 1

The values are a slow drift with 5 % of noise, every recorded column of every block, committed every
100 steps as a training does. Printed: processor time of all that writes (encoding, merging,
hashing, the commit itself) and of what of it the training's thread spends, per recorded step; bytes
on the disk per value; time and processor time of `resdiag plot KIND` on the result, which includes
the start of Python. A machine that does anything else makes wall time larger, less so processor
time.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from resdiag.catalog.table import RECORDED
from resdiag.runs.config import RunConfig
from resdiag.runs.store import RunWriter
from resdiag.training.checkpoint import Committer

COMMIT_EVERY = 100
CURVE = ("epoch", "loss", "error", "lr", "images_per_s", "grad_norm", "head_mean", "head_bias")


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as root:
        answers = write(Path(root), options.steps, options.blocks, options.every)
        for kind in options.kinds.split(","):
            answers[f"plot_{kind}"] = draw(Path(root), kind, options.repetitions)
    if options.json:
        print(json.dumps({"schema": 1, **vars(options), **answers}))
        return
    for name, value in answers.items():
        print(f"{name:<32} {value}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=64_000)
    parser.add_argument("--blocks", type=int, default=54)
    parser.add_argument("--every", type=int, default=50, help="recorded distance in steps")
    parser.add_argument("--kinds", default="gradnorms,skip,curves", help="plots, with commas")
    parser.add_argument("--repetitions", type=int, default=3, help="of each plot")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def write(root: Path, steps: int, blocks: int, every: int) -> dict[str, Any]:
    """Write a run by way of the training's own committer."""
    config = RunConfig(
        variant="original", depth=6 * (blocks // 3) + 2, data="made", recipe="short", steps=steps,
        batch_size=128, lr=0.1, milestones=(), augment=True, record_first=0, every=every,
        eval_every=0, commit_every=COMMIT_EVERY,
    )  # fmt: skip
    writer = RunWriter.open(root, config, environment={}, data={"name": "made"})
    spent = own = 0.0
    with writer:
        writer.describe(describe(blocks), [])
        with Committer(writer, None) as committer:
            for piece in pieces(steps, blocks, every):
                before, mine = time.process_time(), time.thread_time()
                committer.commit(**piece)
                own += time.thread_time() - mine
                committer.wait()
                spent += time.process_time() - before
        writer.finish("done", None)
    recorded = -(-steps // every)
    files = list((writer.folder / "metrics").glob("*.parquet"))
    size = sum(file.stat().st_size for file in files)
    return {
        "recorded_steps": recorded,
        "segments": len(files),
        "megabytes": round(size / 1e6, 2),
        "bytes_per_value": round(size / (recorded * blocks * len(RECORDED)), 3),
        "us_per_recorded_step": round(spent / recorded * 1e6, 1),
        "us_per_recorded_step_training": round(own / recorded * 1e6, 1),
    }


def describe(blocks: int) -> list[dict[str, Any]]:
    """What the rows are about."""
    names = [f"stages.{i * 3 // blocks}.{i % (blocks // 3)}" for i in range(blocks)]
    return [
        {
            "index": i, "name": name, "owner": name, "stage": i * 3 // blocks,
            "transition": i in (blocks // 3, 2 * blocks // 3), "shortcut": "identity",
            "after_add": "relu", "shape": [16, 32, 32],
        }
        for i, name in enumerate(names)
    ]  # fmt: skip


def pieces(steps: int, blocks: int, every: int) -> Iterator[dict[str, Any]]:
    """The commits of a run."""
    dice = np.random.default_rng(0)
    for first in range(0, steps, COMMIT_EVERY):
        last = min(first + COMMIT_EVERY, steps)
        seen = np.arange(first, last, dtype=np.int32)
        metrics = rows(seen[seen % every == 0], blocks, dice)
        curve = {name: 1 + dice.random(last - first) for name in CURVE}
        yield {
            "step": last, "metrics": metrics, "curve": {"step": seen, **curve}, "tensors": b"",
            "state": {}, "status": "running",
        }  # fmt: skip


def rows(steps: np.ndarray, blocks: int, dice: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows of the recorded steps: everything is finite."""
    step, block = np.repeat(steps, blocks), np.tile(np.arange(blocks, dtype=np.int16), len(steps))
    drift = (1 + 0.3 * np.sin(step / 9000) + block / 30).astype(np.float32)
    columns = {"step": step, "block": block}
    for name in RECORDED:
        noise = dice.standard_normal(len(step), dtype=np.float32)
        columns[name] = 0 * drift if name.endswith("_nonfinite") else drift * (1 + noise / 20)
    return columns


def draw(root: Path, kind: str, repetitions: int) -> dict[str, float]:
    """Median seconds of `resdiag plot`, by the clock and of the processor."""
    code = "import sys; from resdiag.cli.main import app; app(sys.argv[1:])"
    command = [sys.executable, "-c", code, "plot", kind, "--runs", str(root)]
    wall, spent = [], []
    for _ in range(repetitions):
        used, start = children(), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall.append(time.perf_counter() - start)
        spent.append(children() - used)
    return {"s": round(statistics.median(wall), 2), "cpu_s": round(statistics.median(spent), 2)}


def children() -> float:
    """Processor seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
