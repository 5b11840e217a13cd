"""TensorBoard: an event file per run, in `DIR/<run>`."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from resdiag.errors import UsageError
from resdiag.trackers.tracker import Play, RunInfo


class TensorBoardTracker:
    """Writes scalars as events.

    Args:
        folder: Where TensorBoard is started; each run is a folder in it.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    def start(self, run: RunInfo) -> None:
        """Open an event file; a run that continues adds one."""
        self._writer = SummaryWriter(str(self._folder / run.name))
        rows = "\n".join(f"| {key} | {value} |" for key, value in run.config.items())
        self._writer.add_text("config", f"| key | value |\n|---|---|\n{rows}", 0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a scalar per tag."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def finish(self, status: str) -> None:
        """Flush and close the file."""
        self._writer.add_text("status", status, 0)
        self._writer.close()


open_tracker = TensorBoardTracker


def export_run(name: str, place: str, play: Play) -> str:
    """Write the event file into a draft folder, then replace that of an earlier export by it.

    Raises:
        UsageError: The run's folder holds something else too.
    """
    folder = Path(place)
    target, draft = folder / name, folder / ".export"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        play(TensorBoardTracker(draft))
        if target.exists():
            strange = [f.name for f in target.iterdir() if not f.name.startswith("events.out.")]
            if strange:
                raise UsageError(f"{target} holds more than event files: {strange[0]}")
            shutil.rmtree(target)
        (draft / name).rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return str(target)
