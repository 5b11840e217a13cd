"""Runs handed to other tools: as tables, or into a tracker as if it had been told live."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resdiag.errors import UsageError
from resdiag.runs.files import make_folder, write_file
from resdiag.runs.folder import Run, load_frame
from resdiag.trackers.sink import About, Sink
from resdiag.trackers.tags import SHOWN, by_step

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray


def export_tables(runs: Sequence[Run], kind: str, folder: Path) -> list[Path]:
    """Write `metrics` and `curve` of some runs, each as one tidy table of all of them.

    Args:
        runs: Runs from folders.
        kind: "csv" or "jsonl"; NaN is empty or null there, infinities are inf or null.
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
        kind: "tensorboard", "wandb" or "mlflow".
        place: A folder for TensorBoard and W&B (an offline run, to be sent by `wandb sync`), a
            SQLite file or tracking URI for MLflow.
        shown: Block-level metrics to write.

    Returns:
        Where it is.

    Raises:
        UsageError: The tracker refuses; the message says why.
    """
    name = run.path.name
    if kind == "tensorboard":
        return str(_export_events(run, name, Path(place), shown))
    try:
        if kind == "wandb":
            from resdiag.trackers.wandb import WandbSink

            _play(run, name, WandbSink("resdiag", Path(place)), shown)
        else:
            from resdiag.trackers.mlflow import MlflowSink

            _play(run, name, MlflowSink(place), shown)
    except OSError:
        raise
    except Exception as error:  # each tracker has errors of its own, of no common kind
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{kind} at {place} refused {name}: {reason}") from error
    return place


def _export_events(run: Run, name: str, folder: Path, shown: Sequence[str]) -> Path:
    """Write the event file apart, then put it where an earlier one was."""
    from resdiag.trackers.tensorboard import TensorBoardSink

    target, draft = folder / name, folder / ".export"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        _play(run, name, TensorBoardSink(draft), shown)
        if target.exists():
            strange = [f.name for f in target.iterdir() if not f.name.startswith("events.out.")]
            if strange:
                raise UsageError(f"{target} holds more than event files: {strange[0]}")
            shutil.rmtree(target)
        (draft / name).rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _play(run: Run, name: str, sink: Sink, shown: Sequence[str]) -> None:
    """Tell a sink a whole run."""
    sink.start(About(name=name, config=run.config.to_dict(), anew=True))
    for step, values in by_step(_columns(run.metrics()), _columns(run.curve()), shown):
        sink.write(step, values)
    sink.finish(run.status)


def _columns(frame: "pd.DataFrame") -> "dict[str, NDArray[Any]]":
    return {str(name): frame[name].to_numpy() for name in frame}


def _encode(frame: "pd.DataFrame", kind: str) -> bytes:
    if kind == "csv":
        return frame.to_csv(index=False).encode()
    return str(frame.to_json(orient="records", lines=True)).encode()
