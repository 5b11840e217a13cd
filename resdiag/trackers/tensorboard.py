"""TensorBoard: an event file per run, in `DIR/<run>`."""

import os
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from resdiag.trackers.sink import About


class TensorBoardSink:
    """Writes scalars as events.

    Args:
        folder: Where TensorBoard is started; each run is a folder in it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._writer: SummaryWriter | None = None

    def start(self, about: About) -> None:
        """Open an event file; a run that continues adds one."""
        self._writer = SummaryWriter(str(self._folder / about.name))
        rows = "\n".join(f"| {key} | {value} |" for key, value in about.config.items())
        self._writer.add_text("config", f"| key | value |\n|---|---|\n{rows}", 0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a scalar per tag."""
        assert self._writer is not None
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def finish(self, status: str) -> None:
        """Flush and close the file."""
        assert self._writer is not None
        self._writer.add_text("status", status, 0)
        self._writer.close()
