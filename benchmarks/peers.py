"""resdiag beside the tools that people would otherwise take, on torchvision's resnet18 as it comes.

    python benchmarks/peers.py                       # everything, writes results/peers.json
    python benchmarks/peers.py --part checks --tools torchinstruments,torchmortem
    python benchmarks/peers.py --part time --repetitions 12
    python benchmarks/peers.py --part deep --repetitions 6   # original-110, batch 128, two threads
    python docs/generate.py                          # writes the table of the documentation

Asked of each tool: does it run; how many of its numbers differ from plain autograd on the same
network without in-place operations; are weights, buffers and random state after some steps those
of a training without it; which block do its numbers and its words point to if one is made to
explode; what does it say of networks that are well; what does a step cost.

The tools are optional; one that cannot be imported is listed as not installed.

    pip install wandb torchinstruments torchmortem monitorch torch-module-monitor traintools
    pip install transformers lightning torchlens unit-scaling delve

Two do not get on with current packages and want an environment of their own, with resdiag in it:

    pip install 'setuptools<80' cockpit-for-pytorch backpack-for-pytorch
    pip install smdebug psutil 'numpy<2.3'

Name its interpreter: `--python cockpit=PATH --python smdebug=PATH`.
Times of a machine that does anything else are worth nothing: the ratio of two unwatched models,
`null`, is the noise of each measurement.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peer_tools import TOOLS

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "peers.json"


def main() -> int:
    """Ask every tool in a process of its own; what was known of the others stays."""
    options = parse(sys.argv[1:])
    known = read(options.out)
    for name in options.tools:
        parts = ["checks", "time", "deep"] if options.part == "all" else [options.part]
        answers: dict[str, Any] = {}
        for part in parts:
            answers |= ask(name, part, options)
        known[name] = merge(known.get(name), answers)
        print(f"{name:<22} {json.dumps(answers)[:120]}", file=sys.stderr, flush=True)
        write(options.out, known)
    return 0


def parse(words: list[str]) -> argparse.Namespace:
    """The options; an unknown tool ends with the names that there are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", default=",".join(TOOLS), help="names, separated by commas")
    parser.add_argument("--part", choices=("all", "checks", "time", "deep"), default="all")
    parser.add_argument("--repetitions", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=32, help="of the timed steps")
    parser.add_argument("--timeout", type=float, default=240, help="seconds per tool and part")
    parser.add_argument("--python", action="append", default=[], metavar="TOOL=PATH")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    options.tools = options.tools.split(",")
    options.python = dict(pair.partition("=")[::2] for pair in options.python)
    for name in (*options.tools, *options.python):
        if name not in TOOLS:
            parser.error(f"unknown tool '{name}'; known: {', '.join(TOOLS)}")
    return options


def ask(name: str, part: str, options: argparse.Namespace) -> dict[str, Any]:
    """The answers of one tool, from a process that may die or hang without harm."""
    command = [options.python.get(name, sys.executable), str(HERE / "peer_trial.py"), name, part]
    command += [str(options.repetitions), str(options.batch_size)]
    path = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    with tempfile.TemporaryDirectory() as folder:  # some tools leave files where they run
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=options.timeout,
                cwd=folder,
                env={**env, "TMPDIR": folder},
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"{part}: no answer in {options.timeout:g} s"}
    return understand(done.stdout, done.returncode, part)


def understand(printed: str, code: int, part: str) -> dict[str, Any]:
    """The JSON of the last line; without one, that the process ended."""
    lines = printed.strip().splitlines()
    try:
        answers = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        return {"failed": f"{part}: the process ended with status {code}"}
    assert isinstance(answers, dict)
    return answers


def merge(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """New answers over old ones; those of another version of the tool are dropped."""
    if old is None or "missing" in new or "missing" in old:
        return new
    same = all(old.get(key) == new.get(key) for key in ("version", "torch") if key in new)
    kept = {key: value for key, value in old.items() if key != "failed"}
    return {**kept, **new} if same else new


def read(path: Path) -> dict[str, Any]:
    """Answers by tool; empty without a file."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text("utf-8"))["tools"]
    return {row["name"]: row for row in rows}


def write(path: Path, known: dict[str, Any]) -> None:
    """One JSON document: where and when it was measured, then a row per tool."""
    rows = [
        {
            "name": name,
            "label": kind.label,
            "package": kind.package,
            "records": kind.records,
            "speaks": kind.speaks,
            **known[name],
        }
        for name, kind in TOOLS.items()
        if name in known
    ]
    document = {
        "schema": 1,
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread used",
        "python": platform.python_version(),
        "tools": rows,
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
