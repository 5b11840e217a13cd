"""Small made-up runs for tests of what is written, read, drawn and judged."""

import hashlib

import numpy as np
import torch

from resdiag.catalog.table import RECORDED
from resdiag.runs.config import RunConfig
from resdiag.runs.store import RunWriter

ENVIRONMENT = {"torch": "2.15.0", "threads": 1, "device": "cpu", "dtype": "float32", "git": "a"}
DATA = {"name": "digits", "train": 1437, "sha256": "0" * 64}


def make_config(**changes):
    plain = {
        "variant": "elu_pre", "depth": 8, "data": "digits", "recipe": "short", "steps": 15,
        "batch_size": 8, "lr": 0.1, "milestones": (), "augment": False, "record_first": 5,
        "every": 2, "eval_every": 0, "commit_every": 5,
    }  # fmt: skip
    return RunConfig(**{**plain, **changes})


def make_blocks(n=3):
    return [
        {
            "index": i, "name": f"stages.{i}.0", "owner": f"stages.{i}.0", "stage": i % 3,
            "transition": i > 0, "shortcut": "identity", "after_add": "none", "shape": [16, 8, 8],
        }
        for i in range(n)
    ]  # fmt: skip


def make_metrics(first, last, blocks=3):
    """Rows of steps first..last-1, a function of (step, block) only."""
    step = np.repeat(np.arange(first, last, dtype=np.int32), blocks)
    block = np.tile(np.arange(blocks, dtype=np.int16), last - first)
    value = (1 + step + block / 10).astype(np.float32)
    return {"step": step, "block": block, **dict.fromkeys(RECORDED, value)}


def make_curve(first, last):
    step = np.arange(first, last, dtype=np.int32)
    return {"step": step, "loss": 2.0 / (1 + step), "lr": np.full(len(step), 0.1)}


def make_checkpoint(step):
    """Tensors and state that are a function of the step only."""
    return {"w": torch.arange(6.0).reshape(2, 3) + step, "n": torch.tensor(step)}, {"best": step}


def continue_run(writer, *, until=15, every=5, acknowledge=lambda step: None):
    """Commit what is missing up to `until`, as a training loop would."""
    writer.describe(make_blocks(), [], "local")
    while writer.committed_step < until:
        first, last = writer.committed_step, writer.committed_step + every
        checkpoint = make_checkpoint(last)
        writer.commit(last, make_metrics(first, last), make_curve(first, last), *checkpoint)
        acknowledge(last)
    if writer.status == "running":
        writer.finish("done", {"name": "fine"})


def open_writer(root, config=None, **options):
    options = {"environment": ENVIRONMENT, "data": DATA, **options}
    return RunWriter.open(root, config or make_config(), **options)


def write_run(root, config=None, **options):
    with open_writer(root, config) as writer:
        continue_run(writer, **options)
    return writer.folder


def contents(folder):
    """SHA-256 of all that a run consists of, apart from the time it was created."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("run.json", "COMMIT.json", "COMMIT.prev.json")
    }
