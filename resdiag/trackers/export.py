"""Recorded runs for other tools: as tables, or into a tracker as if it had been told live."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resdiag.errors import ResdiagError, UsageError
from resdiag.runs.files import make_folder, write_file
from resdiag.runs.folder import Run, columns_of, load_frame
from resdiag.trackers.tags import SHOWN, by_step
from resdiag.trackers.tracker import TRACKERS, RunInfo, Tracker

if TYPE_CHECKING:
    import pandas as pd


def export_tables(runs: Sequence[Run], kind: str, folder: Path) -> list[Path]:
    """Write `metrics` and `curve` of some runs, each as one tidy table of all of them.

    Args:
        runs: Runs from folders.
        kind: One of TABLES; NaN is empty or null there, infinities are inf or null.
        folder: Where to write; files of an earlier export are replaced, each whole or not at all.

    Returns:
        The files.
    """
    import pandas as pd

    metrics = pd.concat([load_frame(run.path) for run in runs], ignore_index=True)
    curves = [run.curve().assign(run=run.path.name) for run in runs]
    curve = pd.concat(curves, ignore_index=True)
    make_folder(folder)
    files = []
    for name, frame in (("metrics", metrics), ("curve", curve)):
        files.append(folder / f"{name}.{kind}")
        write_file(files[-1], _encode(frame, kind))
    return files


def export_tracker(run: Run, kind: str, place: str, shown: Sequence[str] = SHOWN) -> str:
    """Write one run into a tracker's store, as a new run there.

    Args:
        run: A run from a folder.
        kind: Name of a tracker, see `TRACKERS`.
        place: What its `export_place` says.
        shown: Block-level metrics to write.

    Returns:
        Where it is.

    Raises:
        UsageError: The tracker refuses; the message says why.
    """
    row, name = TRACKERS[kind], run.path.name

    def play(tracker: Tracker) -> None:
        tracker.start(RunInfo(name=name, config=run.config.to_dict(), is_new=True))
        for step, values in by_step(columns_of(run.metrics()), columns_of(run.curve()), shown):
            tracker.write(step, values)
        tracker.finish(run.status)

    try:
        if row.export:
            return row.export(name, place, play)
        play(row.open(place))
    except (OSError, ResdiagError):
        raise
    except Exception as error:  # each tracker has errors of its own, of no common kind
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{kind} at {place} refused {name}: {reason}") from error
    return place


def _encode(frame: "pd.DataFrame", kind: str) -> bytes:
    if kind == "csv":
        return frame.to_csv(index=False).encode()
    return str(frame.to_json(orient="records", lines=True)).encode()
