"""A run in one line: what it is, how far it is, and what it came to, from its small files."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from resdiag.errors import UsageError
from resdiag.runs.commit import COMMIT, RUN
from resdiag.runs.folder import Run, find_runs, read_run
from resdiag.runs.lock import find_holder

STATUSES = ("running", "done", "diverged", "stopped", "stale", "new", "damaged")
"""stopped and stale runs can go on: of a stale one the process is gone; new has no commit yet."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One run as of now.

    Attributes:
        path: Its folder.
        model: Id of the variant, or name of another model; "" if the run is damaged.
        depth: 6n+2; 0 where the model is none of ours.
        seed: The random seed.
        status: One of STATUSES.
        verdict: Name of the verdict that was written at its end; "" before.
        steps: Optimizer steps that are committed.
        planned: Steps in all; 0 if that is not known.
        loss: Loss of the last committed step, infinite or NaN too; None if there is none.
        test_error: Last test error, a fraction; None if there is none.
        changed: Time of the last commit, in seconds since 1970.
    """

    path: Path
    model: str = ""
    depth: int = 0
    seed: int = 0
    status: str
    verdict: str = ""
    steps: int = 0
    planned: int = 0
    loss: float | None = None
    test_error: float | None = None
    changed: float


def summarise(folder: Path) -> Summary:
    """One run; a damaged one is summarised as that."""
    changed = _changed(folder)
    try:
        run = read_run(folder)
        loss, test_error = _last_numbers(run)
    except UsageError:
        return Summary(path=folder, status="damaged", changed=changed)
    return Summary(
        path=folder,
        model=run.config.model,
        depth=run.config.depth,
        seed=run.config.seed,
        status=_status(run),
        verdict=str((run.written_verdict or {}).get("name", "")),
        steps=run.steps,
        planned=run.config.steps,
        loss=loss,
        test_error=test_error,
        changed=changed,
    )


def newest_first(root: Path) -> Iterable[Path]:
    """The folders of the runs at or below `root`, the one with the newest commit first."""
    return sorted(find_runs(root), key=lambda folder: (-_changed(folder), folder))


def _changed(folder: Path) -> float:
    for name in (COMMIT, RUN):
        try:
            return (folder / name).stat().st_mtime
        except OSError:  # nothing committed yet
            continue
    return 0.0


def _status(run: Run) -> str:
    """The committed status; of a run that has not ended, whether somebody is at it."""
    if run.status not in ("new", "running"):
        return run.status
    holder = find_holder(run.path)
    if holder is not None and holder.alive:
        return "running"
    return "new" if run.status == "new" else "stale"


def _last_numbers(run: Run) -> tuple[float | None, float | None]:
    """The last loss, and the last test error that is known."""
    if run.commit is None or not run.commit.parts("curve"):
        return None, None
    from resdiag.runs.segments import decode

    parts = [(run.path / n, run.commit.read_file(run.path, n)) for n in run.commit.parts("curve")]
    table = decode("curve", parts, ["loss", "test_error"])
    losses, errors = (table.column(name).to_pylist() for name in ("loss", "test_error"))
    known = [error for error in errors if not math.isnan(error)]
    return (losses[-1] if losses else None), (known[-1] if known else None)
