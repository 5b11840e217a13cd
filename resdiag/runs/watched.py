"""Runs of any model: what a monitor recorded, as a run in memory or as a run folder."""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from resdiag.catalog.table import RECORDED
from resdiag.errors import UsageError, unknown
from resdiag.runs.config import RunConfig

if TYPE_CHECKING:
    import pandas as pd

    from resdiag.runs.folder import Run
    from resdiag.watch.loop.monitor import Monitor


@dataclass(frozen=True, kw_only=True)
class WatchedConfig:
    """What is known of a run that resdiag did not train.

    Attributes:
        model: The model's name.
        kind: "training", or "probe" for one pass without an update.
        variant: Id of the variant where the model is one of ours, else "".
        depth: 6n+2 where the model is one of ours, else 0.
        data: Name of the data, or "".
        batch_size: Samples per step; 0 if it is not known.
        optimizer: Name of the optimizer's class, or "".
        lr: Learning rate of the first step; None if it is not known.
        steps: Steps that were planned; 0 if that is not known.
        seed: The random seed.
        settings: Anything else that tells it from another run.
    """

    model: str
    kind: str = "training"
    variant: str = ""
    depth: int = 0
    data: str = ""
    batch_size: int = 0
    optimizer: str = ""
    lr: float | None = None
    steps: int = 0
    seed: int = 0
    settings: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = {"model": str, "kind": str, "variant": str, "data": str, "optimizer": str,
                 "depth": int, "batch_size": int, "steps": int, "seed": int, "settings": dict,
                 "lr": int | float | None}  # fmt: skip
        for name, kind in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise UsageError(f"config key '{name}' cannot be {value!r:.60}")
        if not self.model:
            raise UsageError("a run needs the name of its model")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "WatchedConfig":
        """Build a config from plain data.

        Raises:
            UsageError: A key is unknown, missing or mistyped.
        """
        names = [entry.name for entry in fields(cls)]
        for key in document:
            if key not in names:
                raise unknown("config key", str(key)[:80], names)
        return cls(**document)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        model = re.sub(r"[^A-Za-z0-9_.]+", "-", self.model).strip("-.")[:64] or "model"
        return f"{self.kind}-{model}-s{self.seed}-{self.digest()[:8]}"


Config: TypeAlias = RunConfig | WatchedConfig
"""What a run was asked to do: one of ours, or any other."""


def read_config(document: object) -> Config:
    """The config of a `run.json`, of either kind.

    Raises:
        UsageError: A key is unknown, missing or mistyped.
    """
    if isinstance(document, Mapping) and "model" in document:
        return WatchedConfig.from_dict(document)
    return RunConfig.from_dict(document)  # type: ignore[arg-type]  # it checks that itself


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
    recorded = [name for name in ("step", "block", *RECORDED, *custom) if name in frame]
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
        metrics_frame=frame[recorded],
        curve_frame=per_step,
    )


def opened(run: "Run | Monitor") -> "Run":
    """A run as it is, or what a monitor holds as a run."""
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
        writer.describe(run.blocks, run.unavailable, run.point, run.notes, run.custom_metrics)
        tables = [
            {str(name): frame[name].to_numpy() for name in frame.columns}
            for frame in (run.metrics_frame, run.curve_frame)
        ]
        writer.commit(run.steps, tables[0], tables[1], None, None, run.status)
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

    columns = list(CURVE.names)
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
