"""Which modules a command line brings with it, asked of a fresh interpreter."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# one interpreter that has imported what every command needs, and a fork of it for each command
_PROGRAM = """
import json, os, sys
from resdiag.cli.main import app
for words in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        code = app.run(words)
        sys.stdout.flush()
        print("IMPORTED", json.dumps([code, list(sys.modules)]), file=sys.stderr, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@functools.cache
def modules_of_commands(*lines):
    """For each command line, a tuple of words: its exit code and the modules imported then."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(lines)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    told = [line for line in done.stderr.splitlines() if line.startswith("IMPORTED ")]
    answers = [json.loads(line.removeprefix("IMPORTED ")) for line in told]
    return {words: tuple(answer) for words, answer in zip(lines, answers, strict=True)}
