"""Weights & Biases: the run's name is its id, so that a resumed training continues one run."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from resdiag.trackers.tracker import Play, RunInfo


class WandbTracker:
    """Logs into a W&B project, as WANDB_MODE and WANDB_DIR say.

    Args:
        project: Name of the project.
        folder: Where to write an offline run, in spite of the environment; `wandb sync` sends it.
    """

    def __init__(self, project: str, folder: Path | None = None) -> None:
        self._project, self._folder = project, folder
        self._run: Any = None

    def start(self, run: RunInfo) -> None:
        """Begin the run, or continue the one of this name."""
        place: dict[str, Any] = {}
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            place = {"mode": "offline", "dir": str(self._folder)}
        self._run = wandb.init(
            project=self._project,
            id=re.sub(r"[^\w.-]", "-", run.name)[-120:],
            name=run.name,
            config=dict(run.config),
            reinit="create_new",  # a run that the training itself has open is left alone
            resume=None if self._folder else "allow",
            settings=wandb.Settings(silent=True, console="off"),
            **place,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the tags of a step."""
        self._run.log(dict(values), step=step)

    def finish(self, status: str) -> None:
        """End the run; W&B waits here until everything is sent or on the disk."""
        self._run.summary["status"] = status
        self._run.finish()


open_tracker = WandbTracker


def export_run(name: str, place: str, play: Play) -> str:
    """Write an offline run of the project `resdiag` into a folder."""
    play(WandbTracker("resdiag", Path(place)))
    return place
