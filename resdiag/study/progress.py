"""What a running cell says of its progress: a small file, replaced once a second."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from resdiag.diagnose.finding import plain
from resdiag.runs.files import to_json
from resdiag.training.display import Progress

PROGRESS = "progress.json"
_EVERY_S = 1.0


class ProgressFile:
    """A `Display` that writes progress.json into a cell's folder.

    Args:
        folder: The cell's.
        steps: Steps in all.
        done: Steps done before.
    """

    def __init__(self, folder: Path, steps: int, done: int) -> None:
        self._path, self._steps, self._first = folder / PROGRESS, steps, done
        self._begin = time.monotonic()
        self._last = -math.inf
        self._write({"step": done})

    def show(self, progress: Progress) -> None:
        """Write the file if it is a second old, or if the training is over."""
        now = time.monotonic()
        if now - self._last < _EVERY_S and progress.done < self._steps:
            return
        self._last = now
        pace = (now - self._begin) / max(1, progress.done - self._first)
        self._write(
            {
                "step": progress.done,
                "loss": plain(progress.loss),
                "error": plain(progress.error),
                "images_per_s": plain(progress.images_per_s),
                "worst": progress.worst,
                "eta_s": pace * (self._steps - progress.done),
            }
        )

    def close(self) -> None:
        """Do nothing: the file stays."""

    def _write(self, about: dict[str, Any]) -> None:
        """Replace the file. A crash may lose it, so it is not synced; a full disk may, too."""
        tmp = self._path.with_name(f".{PROGRESS}.tmp")
        try:
            tmp.write_bytes(to_json({"steps": self._steps, "pid": os.getpid(), **about}))
            tmp.replace(self._path)
        except OSError:
            return


def read_progress(folder: Path) -> dict[str, Any]:
    """What a cell wrote last; empty if there is nothing."""
    try:
        document = json.loads((folder / PROGRESS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
