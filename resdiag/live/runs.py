"""Following runs on disk: which there are, and how each stands as of its last commit."""

import os
from dataclasses import dataclass
from pathlib import Path

from resdiag.diagnose.verdict import judge
from resdiag.errors import ResdiagError, UsageError
from resdiag.live.snapshot import Snapshot, take_snapshot
from resdiag.runs.commit import COMMIT
from resdiag.runs.folder import Run, find_runs, read_run


@dataclass(frozen=True)
class Seen:
    """A run as of one commit.

    Attributes:
        name: Its folder below the one that is followed.
        run: As it was read.
        snapshot: What is shown of it.
    """

    name: str
    run: Run
    snapshot: Snapshot


class FollowedRuns:
    """The runs at or below a folder; each is read again when it has a new commit.

    Args:
        root: A run's folder, or one that holds runs or will.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(root)
        self._seen: dict[Path, tuple[int, Seen]] = {}
        self.version = 0
        """Grows with each change."""

    def look(self) -> list[Seen]:
        """The runs as of now, the one with the newest commit first.

        A run that is being replaced while it is read is shown as of before.

        Raises:
            UsageError: The folder does not exist.
        """
        if not self._root.is_dir():
            raise UsageError(f"no folder {self._root}", "name a run, or a folder that holds runs")
        times = {folder: _time_of(folder) for folder in find_runs(self._root)}
        for gone in self._seen.keys() - times.keys():
            del self._seen[gone]
            self.version += 1
        for folder, time in times.items():
            if time and self._seen.get(folder, (0,))[0] != time:
                try:
                    self._seen[folder] = time, self._read(folder)
                    self.version += 1
                except (ResdiagError, OSError):
                    continue
        newest = sorted(self._seen.items(), key=lambda item: item[1][0], reverse=True)
        return [seen for _, (_, seen) in newest]

    def _read(self, folder: Path) -> Seen:
        run = read_run(folder)
        name = folder.relative_to(self._root).as_posix() if folder != self._root else folder.name
        return Seen(name, run, take_snapshot(run, judge(run)))


def _time_of(folder: Path) -> int:
    """When the run committed last, in nanoseconds; 0 if it has not."""
    try:
        return (folder / COMMIT).stat().st_mtime_ns
    except OSError:
        return 0
