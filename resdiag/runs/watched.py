"""Runs of any model: what a monitor recorded, as a run in memory or as a run folder."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from resdiag.catalog.set_metrics import OF_BLOCKS, OF_STEPS
from resdiag.catalog.table import RECORDED
from resdiag.errors import UsageError, unknown
from resdiag.runs.watched_config import WatchedConfig

if TYPE_CHECKING:
    import pandas as pd

    from resdiag.runs.folder import Run
    from resdiag.watch.loop.monitor import Monitor

Source: TypeAlias = "Run | Monitor | str | os.PathLike[str]"
"""A run, a monitor, or the folder of a run."""


def as_run(
    monitor: "Monitor",
    *,
    config: WatchedConfig | None = None,
    model: str = "",
    data: str = "",
    classes: int | None = None,
    curve: "Mapping[str, Sequence[float]] | pd.DataFrame | None" = None,
    seed: int = 0,
) -> "Run":
    """What a monitor has recorded and not drained, as a run in memory.

    Args:
        monitor: Open or closed.
        config: What the run is; None makes it from the monitor and the arguments below.
        model: The model's name; its class if empty.
        data: Name of the data.
        classes: Classes of the loss; as many as logits where a cross-entropy was recognised.
        curve: Columns of the step-level table that a monitor cannot see, such as loss: one value
            per step, from step 0 or at the steps in its column "step".
        seed: Seed of the training, for labels.

    Raises:
        UsageError: `curve` has a column that the table has not, or columns of different lengths.
    """
    from resdiag.runs.folder import Run

    about = monitor.metadata
    per_step = _curve_frame(monitor.to_frame(per="step"), curve)
    classes = about["classes"] if classes is None else classes
    known = per_step["lr"].dropna()
    config = config or WatchedConfig(
        model=model or about["model"],
        data=data,
        optimizer=about["optimizer"],
        lr=float(known.iloc[0]) if len(known) and math.isfinite(known.iloc[0]) else None,
        seed=seed,
    )
    frame = monitor.to_frame()
    custom = [entry["id"] for entry in monitor.custom_metrics]
    recorded = [name for name in ("step", "block", *RECORDED, *OF_BLOCKS, *custom) if name in frame]
    return Run(
        config=config,
        blocks=[block.to_dict() for block in monitor.blocks],
        data={"name": data or "?", **({} if classes is None else {"classes": classes})},
        status="diverged" if _is_lost(curve) or monitor.has_nonfinite_loss else "done",
        steps=about["steps"],
        unavailable=monitor.unavailable,
        point=monitor.point,
        notes=tuple(monitor.warnings),
        custom_metrics=[dict(entry) for entry in monitor.custom_metrics],
        inventory=monitor.inventory,
        metrics_frame=frame[recorded],
        curve_frame=per_step,
    )


def load_runs(runs: "Source | Sequence[Source]") -> "list[Run]":
    """One run or several, each as `load_run` takes it."""
    if isinstance(runs, Sequence) and not isinstance(runs, str):
        return [load_run(run) for run in runs]
    return [load_run(runs)]


def load_run(run: "Source") -> "Run":
    """The run in a folder, which may still be in progress; or what a monitor holds, as a run.

    Args:
        run: A run's folder, or a monitor. A `Run` is returned as it is.

    Raises:
        UsageError: There is no run in the folder, or a file of it is damaged; the message names
            the file.
    """
    from resdiag.runs.folder import read_run

    if isinstance(run, str | os.PathLike):
        return read_run(run)
    # not by its class: a monitor's is not to be had without PyTorch
    return as_run(cast("Monitor", run)) if hasattr(run, "to_frame") else run


def write_run(
    run: "Run",
    path: str | os.PathLike[str],
    *,
    environment: Mapping[str, Any],
    verdict: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a run that is in memory as a run folder, which `load_run` reads.

    Raises:
        UsageError: The folder holds a run and `overwrite` is false.
        StorageError: It cannot be written.
    """
    from resdiag.runs.commit import RUN
    from resdiag.runs.folder import columns_of
    from resdiag.runs.store import RunWriter

    folder = Path(path)
    if (folder / RUN).exists() and not overwrite:
        raise UsageError(f"{folder} holds a run already", "overwrite=True replaces it")
    assert run.metrics_frame is not None
    assert run.curve_frame is not None
    writer = RunWriter.open(
        folder.parent,
        run.config,
        environment=environment,
        data=run.data,
        force=overwrite,
        folder=folder,
    )
    with writer:
        writer.describe(
            run.blocks, run.unavailable, run.point, run.notes, run.custom_metrics, run.inventory
        )
        metrics, curve = columns_of(run.metrics_frame), columns_of(run.curve_frame)
        writer.commit(run.steps, metrics, curve, None, None, run.status)
        writer.finish(run.status, verdict)
    return folder


def _is_lost(curve: "Mapping[str, Sequence[float]] | pd.DataFrame | None") -> bool:
    """Whether a loss was told that is not finite."""
    told = () if curve is None or "loss" not in curve else curve["loss"]
    return any(not math.isfinite(value) for value in told)


def _curve_frame(
    recorded: "pd.DataFrame", given: "Mapping[str, Sequence[float]] | pd.DataFrame | None"
) -> "pd.DataFrame":
    """The step-level table: what the monitor knows beside what the loop knows."""
    import pandas as pd

    from resdiag.runs.segments import CURVE

    columns = [*CURVE.names, *(name for name in OF_STEPS if name in recorded)]
    if "step" not in recorded:
        recorded = pd.DataFrame({"step": pd.Series(dtype="int32")})
    frame = recorded.set_index("step")
    if given is not None:
        try:
            told = pd.DataFrame(dict(given))
        except ValueError as error:
            raise UsageError(f"curve: {error}") from error
        for name in told.columns:
            if name not in columns:
                raise unknown("column of the curve", str(name), columns)
        told["step"] = told["step"] if "step" in told else range(len(told))
        told = told.set_index("step").astype("float64")
        frame = told.combine_first(frame)
    frame = frame.reindex(columns=columns[1:]).astype("float64").sort_index()
    frame.index = frame.index.astype("int32").rename("step")
    return frame.reset_index()
