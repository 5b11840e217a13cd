"""Reading runs: one folder, or all below one, as tidy frames; also while they are written.

pandas and pyarrow are imported with the first table, so that a wrong path is answered at once.
"""

import difflib
import importlib
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from resdiag.catalog.table import METRICS, derive, inputs_of
from resdiag.errors import UsageError
from resdiag.runs.commit import BLOCKS, COMMIT, PREVIOUS, RUN, VERDICT, Commit
from resdiag.runs.files import Damaged, from_json, read_file
from resdiag.runs.watched_config import Config, WatchedConfig, read_config
from resdiag.summary import NUMBERS, Summary, by_reason, summarise_blocks

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from resdiag.diagnose.verdict import Verdict

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Run:
    """One run as of the moment it was opened; from a folder, or from frames in memory.

    Attributes:
        config: The resolved settings.
        blocks: One entry per block: index, name, stage, transition, ...
        path: Its folder.
        environment: Where it ran.
        data: Identity of the data set.
        status: "new", "running", "done", "diverged" or "stopped".
        steps: Optimizer steps that are committed.
        unavailable: Metrics that could not be had: metric, blocks, reason.
        point: Where gradients were read, one of `catalog.POINTS`.
        notes: What could not be watched, in words.
        custom_metrics: Custom metrics among the columns: id, label, unit, site, ...
        inventory: What model, optimizers and loop consist of, see `Monitor.inventory`; empty for
            runs of `resdiag run`, whose loop is ours.
        written_verdict: The conclusion as it is written in the folder, once there is one.
        drift: Changes of environment between resumes.
        metrics_frame: Recorded block-level rows of a run that has no folder.
        curve_frame: Step-level rows of a run that has no folder.
        commit: The commit that was read.
    """

    config: Config
    blocks: list[dict[str, Any]]
    path: Path = Path()
    environment: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    status: str = "done"
    steps: int = 0
    unavailable: list[dict[str, Any]] = field(default_factory=list)
    point: str = "local"
    notes: tuple[str, ...] = ()
    custom_metrics: list[dict[str, Any]] = field(default_factory=list)
    inventory: dict[str, Any] = field(default_factory=dict)
    written_verdict: dict[str, Any] | None = None
    drift: tuple[dict[str, Any], ...] = ()
    metrics_frame: "pd.DataFrame | None" = None
    curve_frame: "pd.DataFrame | None" = None
    commit: Commit | None = None

    def metrics(self, names: Collection[str] | None = None) -> "pd.DataFrame":
        """Recorded and derived metrics, one row per (step, block).

        Args:
            names: Those to read, recorded, derived or custom; None for all. Unknown ones are left
                out.

        Raises:
            UsageError: A segment is damaged; the message names it.
        """
        import pandas as pd

        recorded = None if names is None else set().union(*map(inputs_of, names))
        frame = self.metrics_frame
        columns = columns_of(self._read("metrics", recorded) if frame is None else frame)
        columns |= derive(columns, names=names)
        if names is not None:
            kept = {"step", "block", *names}
            columns = {name: values for name, values in columns.items() if name in kept}
        order = ["step", "block", *(name for name in METRICS if name in columns)]
        return pd.DataFrame({name: columns[name] for name in dict.fromkeys([*order, *columns])})

    def curve(self) -> "pd.DataFrame":
        """Loss, error, learning rate and what else there is once per step; one row per step.

        Raises:
            UsageError: A segment is damaged; the message names it.
        """
        import pandas as pd

        frame = self._read("curve") if self.curve_frame is None else self.curve_frame
        columns = columns_of(frame)
        return pd.DataFrame({**columns, **derive(columns, per_step=True)})

    @property
    def label(self) -> str:
        """A few words for a legend: the network, and the seed if it is not 0."""
        seed = f" seed {self.config.seed}" if self.config.seed else ""
        depth = "" if isinstance(self.config, WatchedConfig) else f"-{self.config.depth}"
        return f"{self.config.model}{depth}{seed}"

    @property
    def verdict(self) -> "Verdict | None":
        """The conclusion that its folder holds; None if there is none. `judge` judges anew."""
        if self.written_verdict is None:
            return None
        # by its name: this room is below the one that judges
        verdicts = importlib.import_module("resdiag.diagnose.verdict")
        verdict: Verdict = verdicts.Verdict.from_dict(self.written_verdict)
        return verdict

    def __repr__(self) -> str:
        place = "" if self.path == Path() else f" in {self.path}"
        written = (self.written_verdict or {}).get("name", "")
        told = f", verdict {written}" if written else ""
        many = f"{len(self.blocks)} block{'s' * (len(self.blocks) != 1)}"
        steps = f"{self.steps} step{'s' * (self.steps != 1)}"
        return f"<Run {self.label}: {self.status} after {steps}, {many}{told}{place}>"

    def __str__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def summary(self) -> Summary:
        """One row per block with its numbers at the last recorded step; `print(run)`."""
        table = columns_of(self.metrics(NUMBERS))
        notes = [*by_reason(self.unavailable), *self.notes]
        return summarise_blocks(repr(self)[1:-1], self.blocks, table, notes)

    def _read(self, table: str, names: Collection[str] | None = None) -> "pd.DataFrame":
        """The segments that the commit names; those of a newer commit if they were replaced."""
        from resdiag.runs.segments import decode

        def read(commit: Commit | None) -> "pd.DataFrame":
            files = commit.parts(table) if commit else []
            parts = [(self.path / n, commit.read_file(self.path, n)) for n in files if commit]
            frame: pd.DataFrame = decode(table, parts, names).to_pandas()
            return frame

        return _consistently(self.path, self.commit, read)


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a run's folder; the run may still be in progress.

    Raises:
        UsageError: There is no run, or a file of it is damaged; the message names the file.
    """
    folder = Path(path)
    return _consistently(folder, _last_commit(folder), lambda commit: _open(folder, commit))


def find_runs(path: str | os.PathLike[str]) -> list[Path]:
    """The folders of runs at or below `path`, sorted; hidden folders and links are not entered."""
    found = []
    for folder, subfolders, files in os.walk(path):
        if RUN in files:
            found.append(Path(folder))
            subfolders.clear()
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
    return sorted(found)


def is_run_folder(path: Path) -> bool:
    """Whether a folder has files of a run, even if the most important one is missing."""
    return any((path / name).exists() for name in (RUN, COMMIT, PREVIOUS))


def latest_run(root: str | os.PathLike[str]) -> Path:
    """The run below `root` with the newest commit.

    Raises:
        UsageError: There is none.
    """
    times = {}
    for folder in find_runs(root):
        try:
            times[folder] = (folder / COMMIT).stat().st_mtime_ns
        except FileNotFoundError:  # begun, nothing committed yet
            continue
    if not times:
        hint = "`resdiag run --variant elu_pre --depth 110` makes one"
        raise UsageError(f"no run under {os.fspath(root)}", hint)
    return max(times, key=lambda folder: times[folder])


def load_frame(path: str | os.PathLike[str]) -> "pd.DataFrame":
    """All runs at or below `path` as one tidy frame, one row per (run, step, block).

    Columns: run, variant (for other models, the name), depth (for other models, the number of
    blocks), seed, data, point; step, block, stage, transition,
    depth_fraction (`(block + 0.5) / blocks`); then the metrics of `resdiag.METRICS`.

    Raises:
        UsageError: There is no run, or a file of one is damaged; the message names the file.
    """
    folders = find_runs(path)
    if not folders:
        raise _no_run(Path(path))
    import pandas as pd

    frames = [_tidy(read_run(folder)) for folder in folders]
    # an empty frame would turn the other runs' whole numbers into objects
    return pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)


def _tidy(run: Run) -> "pd.DataFrame":
    """One run's metrics with the columns that tell it, and its blocks, apart."""
    import pandas as pd

    metrics = run.metrics()
    block = metrics["block"]
    stage = {entry["index"]: entry["stage"] for entry in run.blocks}
    transition = {entry["index"]: entry["transition"] for entry in run.blocks}
    return pd.DataFrame(
        {
            "run": run.path.name or run.config.name,
            "variant": run.config.model,
            "depth": run.config.depth or len(run.blocks),
            "seed": run.config.seed,
            "data": run.config.data,
            "point": run.point,
            "step": metrics["step"],
            "block": block,
            "stage": block.map(stage),
            "transition": block.map(transition),
            "depth_fraction": (block + 0.5) / max(len(run.blocks), 1),
            **{name: metrics[name] for name in metrics.columns.drop(["step", "block"])},
        }
    )


def _consistently(folder: Path, commit: Commit | None, read: Callable[[Commit | None], T]) -> T:
    """Read as of `commit`, or of a newer one if the writer has replaced its files meanwhile."""
    while True:
        try:
            return read(commit)
        except Damaged:
            newer = _last_commit(folder)
            if newer == commit:
                raise
            commit = newer


def _last_commit(folder: Path) -> Commit | None:
    """The commit of a run; None if it has begun and not committed yet."""
    if (folder / COMMIT).exists() or (folder / PREVIOUS).exists():  # a lost one is damage
        return Commit.read(folder / COMMIT)
    if not (folder / RUN).exists():
        raise _no_run(folder)
    return None


def _open(folder: Path, commit: Commit | None) -> Run:
    """Put a run together from the small files of one commit."""
    run = _read_json(folder, commit, RUN) or {}
    blocks = (_read_json(folder, commit, BLOCKS) if commit else None) or {}
    if not isinstance(run.get("environment"), dict) or not isinstance(run.get("data"), dict):
        raise Damaged(f"{folder / RUN} is damaged: a key is missing")
    return Run(
        config=read_config(run.get("config", {})),
        blocks=_entries(folder, blocks, "blocks", {"index": int, "stage": int, "transition": bool}),
        path=folder,
        environment=run["environment"],
        data=run["data"],
        status=commit.status if commit else "new",
        steps=commit.step if commit else 0,
        unavailable=_entries(folder, blocks, "unavailable", {"metric": str}),
        point=str(blocks.get("point", "local")),
        notes=tuple(map(str, blocks.get("notes", ()))),
        custom_metrics=_entries(
            folder, blocks, "custom_metrics", {"id": str, "label": str, "unit": str}
        ),
        inventory=inventory if isinstance(inventory := blocks.get("inventory"), dict) else {},
        written_verdict=_read_json(folder, commit, VERDICT) if commit else None,
        drift=commit.drift if commit else (),
        commit=commit,
    )


def _read_json(folder: Path, commit: Commit | None, name: str) -> dict[str, Any] | None:
    """A file of the commit, or of a run without one; None if the commit does not name it."""
    if commit is None:
        return from_json(read_file(folder / name), folder / name)
    if name not in commit.files:
        return None
    return from_json(commit.read_file(folder, name), folder / name)


def _entries(
    folder: Path, document: Mapping[str, Any], key: str, kinds: Mapping[str, type]
) -> list[dict[str, Any]]:
    """A list of objects that have certain keys."""
    entries = document.get(key, [])
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(k), kinds[k]) for k in kinds)
        for entry in entries
    ):
        raise Damaged(f"{folder / BLOCKS} is damaged: '{key}' is not a list of {key}")
    return entries


def columns_of(frame: "pd.DataFrame") -> "dict[str, np.ndarray]":
    """A frame's columns by name, as arrays."""
    return {str(name): frame[name].to_numpy() for name in frame.columns}


def _no_run(path: Path) -> UsageError:
    """There is no run here; name the nearest one beside it."""
    beside = {file.parent.name: file.parent for file in path.parent.glob(f"*/{RUN}")}
    near = difflib.get_close_matches(path.name, beside, n=1)
    return UsageError(
        f"no run at {path}" + ("" if path.exists() else ": there is no such folder"),
        f"did you mean {beside[near[0]]}?" if near else f"a run is a folder with a {RUN}",
    )
