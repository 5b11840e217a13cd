"""The state of a study, read from its files and nothing else: any number of readers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resdiag.diagnose.finding import plain
from resdiag.errors import ResdiagError
from resdiag.runs.commit import COMMIT, RUN, VERDICT, Commit
from resdiag.runs.files import list_folder
from resdiag.runs.lock import find_holder
from resdiag.study.failure import read_failure
from resdiag.study.progress import read_progress
from resdiag.study.study import Study

STATES = ("done", "running", "stale", "failed", "diverged", "missing")
"""done and diverged are results; stale was begun and no process has it; failed is not tried
again before `study retry`; missing was never begun."""
ENDED = ("done", "diverged")
_REPORTED = ("loss", "error", "images_per_s", "worst")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One cell as of now.

    Attributes:
        id: Of the cell.
        state: One of STATES.
        folder: Of the cell: its run, its log, its progress.
        run: Folder of its run; None before there is one.
        step: Steps done: committed, or more while it runs.
        steps: Steps in all; 0 if not known yet.
        progress: What it wrote last: loss, error, images_per_s, worst, eta_s.
        message: Why it failed, or who runs it.
    """

    id: str
    state: str
    folder: Path
    run: Path | None = None
    step: int = 0
    steps: int = 0
    progress: dict[str, Any]
    message: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The entry for JSON."""
        eta = self.progress.get("eta_s") if self.state == "running" else None
        return {
            "id": self.id,
            "state": self.state,
            "step": self.step,
            "steps": self.steps,
            "run": str(self.run) if self.run else None,
            **{name: plain(self.progress.get(name)) for name in _REPORTED},
            "eta_s": plain(eta),
            "message": self.message,
        }


def read_ledger(study: Study, runs: Path) -> list[Entry]:
    """The state of every cell of a study, in its order."""
    return [read_entry(study.folder(runs) / cell.id) for cell in study.cells]


def read_entry(folder: Path) -> Entry:
    """The state of the cell that lies in `folder`, which need not exist."""
    run, commit = find_run(folder)
    progress = read_progress(folder)
    committed = commit.step if commit else 0
    state, message = _state(folder, run, commit)
    step = progress.get("step") if state == "running" else committed
    return Entry(
        id=folder.name,
        state=state,
        folder=folder,
        run=run,
        step=max(committed, _count(step)),
        steps=_count(progress.get("steps")),
        progress=progress,
        message=message,
    )


def _state(folder: Path, run: Path | None, commit: Commit | None) -> tuple[str, str]:
    """State and message; a commit or a living owner counts more than an earlier failure.

    A run has ended when its verdict is written, which comes after its last step: a process may
    die in between.
    """
    if commit and commit.status in ENDED and VERDICT in commit.files:
        return commit.status, ""
    holder = find_holder(folder)
    if holder and holder.alive:
        return "running", f"process {holder.pid} on {holder.host}"
    failure = read_failure(folder)
    if failure:
        return "failed", failure.message
    if commit and commit.status in ENDED:
        return "stale", "trained to its end, not judged yet"
    if holder:
        return "stale", f"process {holder.pid} on {holder.host} is gone"
    return ("stale", "stopped") if run else ("missing", "")


def find_run(folder: Path) -> tuple[Path | None, Commit | None]:
    """The run of a cell and its last commit; of several the one that was committed to last."""
    found: list[tuple[int, Path, Commit | None]] = []
    for name in list_folder(folder):
        path = folder / name
        if not (path / RUN).is_file() or path.is_symlink():
            continue
        try:
            commit, when = Commit.read(path / COMMIT), (path / COMMIT).stat().st_mtime_ns
        except (ResdiagError, OSError):  # nothing committed yet, or damaged: the cell will say
            commit, when = None, 0
        found.append((when, path, commit))
    if not found:
        return None, None
    _, path, commit = max(found, key=lambda item: item[0])
    return path, commit


def count_states(entries: Sequence[Entry]) -> dict[str, int]:
    """Number of cells by state, in the order of STATES."""
    counted = Counter(entry.state for entry in entries)
    return {state: counted[state] for state in STATES if counted[state]}


def _count(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0
