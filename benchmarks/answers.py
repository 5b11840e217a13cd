"""How soon the command line answers what needs no computation: help, lists and mistakes.

    python benchmarks/answers.py                 # processor time and wall time, best of five
    python benchmarks/answers.py --json

The tests assert what makes these answers fast, that no heavy package is imported; this is the time.
0.4 s of processor time was the bound on two cores of a virtual machine.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINES = (
    "--help",
    "run --help",
    "version",
    "variants",
    "run --variant elu --depth 57",
    "run --variant elu --depth 8 --device tpu",
    "plot gradnorms missing",
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [measure(line, options.repetitions) for line in LINES]
    if options.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row['processor_s']:6.2f} s  {row['wall_s']:6.2f} s  resdiag {row['line']}")


def measure(line: str, repetitions: int) -> dict[str, str | float]:
    """Least processor time and least wall time of a command line."""
    times = [run(line) for _ in range(repetitions)]
    busy, wall = (min(column) for column in zip(*times, strict=True))
    return {"line": line, "processor_s": busy, "wall_s": wall}


def run(line: str) -> tuple[float, float]:
    """Processor time and wall time of one run of a command line."""
    before, begun = os.times(), time.perf_counter()
    command = [sys.executable, "-m", "resdiag", *line.split()]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    wall, after = time.perf_counter() - begun, os.times()
    busy = after.children_user + after.children_system
    return busy - before.children_user - before.children_system, wall


if __name__ == "__main__":
    main()
