"""Continuing a run: its checkpoint, its last whole commit, and whether it is the run that is meant.

A checkpoint is safetensors, which cannot execute code, and JSON.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from resdiag.errors import UsageError
from resdiag.runs.commit import COMMIT, PREVIOUS, RUN, Commit, our_files
from resdiag.runs.environment import differences
from resdiag.runs.files import Damaged, from_json, write_file
from resdiag.runs.watched_config import Config, read_config

_log = logging.getLogger(__name__)
_START_AGAIN = "--force starts this run again and deletes what is there"


@dataclass(frozen=True)
class Checkpoint:
    """A state of training.

    Attributes:
        step: Optimizer steps done.
        tensors: Weights, momenta, buffers, random states; on the CPU.
        state: Everything else, as JSON holds it.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def pack(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Tensors as the bytes of a safetensors file; they may be views and on any device."""
    # cloned: safetensors refuses tensors that share memory
    return save({key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()})


def unpack(data: bytes, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of `pack`, on the CPU.

    Raises:
        Damaged: `data`, read from `path`, is not a safetensors file.
    """
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise Damaged(f"{path} is damaged: not safetensors ({type(error).__name__})") from error


def recover(folder: Path) -> tuple[Commit | None, Commit | None]:
    """The last whole commit and the one before it, which replaces a damaged last one.

    Raises:
        UsageError: There were commits and none of them is whole.
        StorageError: The folder cannot be written.
    """
    last, problem = _load(folder, COMMIT)
    before, other = _load(folder, PREVIOUS)
    if problem is None:
        if other is not None and (folder / PREVIOUS).exists():
            _log.warning("%s; the last commit is whole", other.message)
        return last, before
    if before is not None:
        _log.warning("%s; continuing from the commit at step %d", problem.message, before.step)
        write_file(folder / COMMIT, before.to_bytes())
        return before, before
    if _has_commits(folder):
        raise UsageError(f"{problem.message}; no other commit is whole", _START_AGAIN)
    return None, None


def _load(folder: Path, name: str) -> tuple[Commit | None, Damaged | None]:
    """A commit all of whose files are whole, or what is wrong with it."""
    try:
        commit = Commit.read(folder / name)
        commit.verify(folder)
    except Damaged as damage:
        return None, damage
    return commit, None


def _has_commits(folder: Path) -> bool:
    """Whether the run ever got as far as a commit: a lost one must not look like a new run."""
    parts = [name for name in our_files(folder) if name.startswith("curve/part-")]
    return len(parts) > 1 or (folder / COMMIT).exists() or (folder / PREVIOUS).exists()


def check_same(
    folder: Path,
    commit: Commit,
    config: Config,
    environment: Mapping[str, Any],
    data: Mapping[str, Any],
    allow_drift: bool,
) -> tuple[dict[str, Any], ...]:
    """Check that a folder holds this run, begun in this environment.

    Returns:
        The drifts to note in the next commit: those of `commit`, and this one if allowed.

    Raises:
        UsageError: Config or data differ, or the environment does and `allow_drift` is false.
    """
    run = from_json(commit.read_file(folder, RUN), folder / RUN)
    _refuse_other(folder, read_config(run.get("config", {})), config)
    if run.get("data") != json.loads(json.dumps(dict(data))):
        raise UsageError(
            f"{folder} was begun with other data of the same name",
            "--runs another folder keeps both; " + _START_AGAIN,
        )
    if commit.status in ("done", "diverged"):
        return commit.drift  # nothing more will be computed
    before = commit.drift[-1]["environment"] if commit.drift else run.get("environment")
    changes = differences(before if isinstance(before, dict) else {}, environment)
    if not changes:
        return commit.drift
    if not allow_drift:
        raise UsageError(
            f"{folder} was begun in another environment: {'; '.join(changes)}",
            "--allow-drift continues and marks the run; " + _START_AGAIN,
        )
    note = {"step": commit.step, "differences": changes, "environment": dict(environment)}
    return (*commit.drift, note)


def _refuse_other(folder: Path, stored: Config, wanted: Config) -> None:
    """Raise if the folder holds another config, naming what differs."""
    old, new = stored.to_dict(), wanted.to_dict()
    changes = [
        f"{key}: {old[key]!r} -> {new.get(key)!r}" for key in old if old[key] != new.get(key)
    ]
    if changes:
        raise UsageError(f"{folder} holds another run: {'; '.join(changes)}", _START_AGAIN)
