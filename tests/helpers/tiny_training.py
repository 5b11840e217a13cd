"""Trainings of a few tiny steps, for tests of the loop and of resuming."""

import hashlib
from dataclasses import replace
from functools import cache

import numpy as np
import torch

from resdiag.data.dataset import open_data
from resdiag.runs.config import RunConfig
from resdiag.runs.environment import environment
from resdiag.runs.folder import read_run
from resdiag.runs.store import RunWriter
from resdiag.study.cell import Options, run_cell
from resdiag.training.display import Silent
from resdiag.training.interrupt import Interrupt
from resdiag.training.loop import Training
from resdiag.training.recipe import Request


@cache
def tiny_data(train=96, test=40):
    """The first of the embedded digits."""
    digits = open_data("digits")
    return replace(
        digits,
        train_images=digits.train_images[:train],
        train_labels=digits.train_labels[:train],
        test_images=digits.test_images[:test],
        test_labels=digits.test_labels[:test],
    )


def tiny_config(**changes):
    """Depth 8, a quarter of the width, 12 steps in batches of 32."""
    plain = {
        "variant": "elu", "depth": 8, "width": 0.25, "data": "digits", "recipe": "short",
        "steps": 12, "batch_size": 32, "lr": 0.05, "milestones": (), "augment": True,
        "record_first": 3, "every": 4, "eval_every": 0, "commit_every": 5,
    }  # fmt: skip
    return RunConfig(**{**plain, **changes})


def open_training(root, data=None, **changes):
    """A training and its open writer."""
    config, data = tiny_config(**changes), data or tiny_data()
    described = environment(config.device, config.dtype)
    writer = RunWriter.open(root, config, environment=described, data=data.identity)
    return Training(config, data, writer), writer


def train(root, data=None, **changes):
    """Train to the end: the training, its status and the run as it lies on disk."""
    training, writer = open_training(root, data, **changes)
    with writer:
        status = training.run(Silent(), Interrupt())
    return training, status, read_run(writer.folder)


def run_tiny_cell(root, say=lambda line: None, **asked):
    """The same by the command's own way, on all of the embedded digits."""
    plain = {
        "variant": "elu", "depth": 8, "width": 0.25, "data": "digits", "steps": 3,
        "batch_size": 32, "augment": True,
    }  # fmt: skip
    options = {name: asked.pop(name) for name in ("force", "allow_drift") if name in asked}
    request = Request(**{**plain, **asked})
    return run_cell(request, Options(root=root, quiet=True, **options), say)


def digest(folder):
    """SHA-256 of a finished run: weights, momenta, both tables without the times."""
    run = read_run(folder)
    seal = hashlib.sha256()
    # the reader refuses a checkpoint that is not what the commit names
    tensors = next(name for name in run.commit.files if name.startswith("ckpt-"))
    seal.update(run.commit.read_file(run.path, tensors))
    for frame in (run.metrics(), run.curve().drop(columns="images_per_s")):
        for name in frame:
            seal.update(name.encode() + np.ascontiguousarray(frame[name]).tobytes())
    return f"{run.status} {run.steps} {seal.hexdigest()}"


def weights(model):
    """Every weight and running statistic, as bytes: NaN equals NaN."""
    return {
        name: value.detach().contiguous().view(torch.uint8).numpy().tobytes()
        if value.dim()
        else value.item()
        for name, value in model.state_dict().items()
    }
