"""The measurements behind the documentation's performance page.

    python benchmarks/performance.py                     # everything, about half an hour
    python benchmarks/performance.py --part overhead --repetitions 12
    python docs/generate.py                              # writes the tables

Each part replaces its own entry in results/performance.json, with the day, the machine and its
load. Times of a machine that does anything else are worth little: see `null` beside each ratio.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import growth
import overhead as ratios
import slices
import steps
import storage_forms
import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "performance.json"
BACKENDS = {
    "original": "stock,again,eager,recording,bfloat16,compile",
    "elu": "stock,again,eager,fast",
}
SETTINGS = (("original", 110, 128), ("elu", 110, 128), ("original", 20, 32))


def main() -> None:
    """Measure the parts asked for."""
    options = parse(sys.argv[1:])
    known = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {"schema": 1}
    for name in options.part or PARTS:
        before = os.getloadavg()[0]
        print(f"{name}: load {before:.1f}", file=sys.stderr, flush=True)
        torch.set_num_threads(options.threads)
        result = PARTS[name](options)
        known[name] = {"where": where(before, options.threads), "result": result}
        options.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure what recording and training cost.")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all of them")
    parser.add_argument("--repetitions", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(words)


def where(load: float, threads: int) -> dict[str, Any]:
    """Day, machine, versions, and what else the machine did."""
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, threads used: {threads}",
        "python": platform.python_version(),
        "torch": torch.__version__.partition("+")[0],
        "load_before": round(load, 2),
    }


def overhead(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The ratios of `overhead.py` for several networks."""
    rows = []
    for variant, depth, batch_size in SETTINGS:
        times, busy = ratios.measure(variant, depth, batch_size, options.repetitions)
        setting = {"variant": variant, "depth": depth, "batch_size": batch_size}
        rows += [setting | row for row in ratios.summarise(times, busy)]
    return rows


def backends(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What `backend.py` prints: images per second beside the usual script."""
    rows = []
    for variant, arms in BACKENDS.items():
        words = ["--variant", variant, "--arms", arms, "--threads", str(options.threads)]
        command = [sys.executable, str(HERE / "backend.py"), *words, "--steps", "5", "--json"]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        answer = json.loads(printed)
        setting = {key: answer[key] for key in ("variant", "depth", "batch_size")}
        rows += [setting | row for row in answer["rows"]]
    return rows


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "overhead": overhead,
    "growth": lambda options: growth.measure(options.repetitions),
    "storage": lambda options: storage_forms.measure(4096),
    "steps": lambda options: steps.measure(options.repetitions),
    "backends": backends,
    "slices": lambda options: slices.measure(),
}

if __name__ == "__main__":
    main()
