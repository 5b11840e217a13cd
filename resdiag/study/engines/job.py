"""What every engine is given and does alike: the missing cells, and what the end of one means."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import resdiag
from resdiag.study.failure import LOG, read_failure, read_log, write_failure
from resdiag.study.ledger import find_run
from resdiag.study.progress import PROGRESS
from resdiag.study.study import Study
from resdiag.study.work import STOPPED, Task

AGAIN_S = 5.0
"""Seconds before a cell that another driver has is tried again."""
_MOST_BETWEEN_LOOKS_S = 5.0
_LINE = 200


@dataclass(frozen=True, kw_only=True)
class Job:
    """A study's missing cells, and how to start them.

    Attributes:
        study: The study.
        plan: Path of its plan, which every machine must see.
        cells: Ids of the cells to bring to their end.
        runs: Folder that holds the study's folder.
        data_root: Folder of downloaded data sets; "" for the default places.
        device: auto, cpu, cuda or cuda:N.
        allow_drift: Continue in a changed environment.
        say: Told one line now and then.
        look: Called while cells run, at least once a second; it shows what has changed.
        slots: Cells at a time; None leaves it to the engine.
    """

    study: Study
    plan: Path
    cells: tuple[str, ...]
    runs: Path
    data_root: str = ""
    device: str = "auto"
    allow_drift: bool = False
    say: Callable[[str], None]
    look: Callable[[], None] = lambda: None
    slots: int | None = None

    def folder(self, cell: str) -> Path:
        """A cell's folder."""
        return self.study.folder(self.runs) / cell

    def log(self, cell: str) -> str:
        """The file for what a cell prints, absolute."""
        return str((self.folder(cell) / LOG).absolute())

    def task(self, cell: str) -> dict[str, Any]:
        """A cell's `Task` as plain data."""
        return asdict(
            Task(
                study=str(self.plan.absolute()),
                cell=cell,
                runs=str(self.runs.absolute()),
                data_root=self.data_root and str(Path(self.data_root).absolute()),
                device=self.device,
                allow_drift=self.allow_drift,
            )
        )

    def environment(self) -> dict[str, str]:
        """What a cell's process needs to find this very resdiag, and to use as many threads."""
        package = str(Path(resdiag.__file__).parents[1])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = str(self.study.file.resources.threads)
        return {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": threads}

    def sign_of_life(self, cell: str) -> tuple[int, ...]:
        """A value that changes while a cell makes progress."""
        times = []
        for name in (PROGRESS, LOG):
            try:
                times.append((self.folder(cell) / name).stat().st_mtime_ns)
            except OSError:
                times.append(0)
        return tuple(times)


@dataclass
class _Attempt:
    """One start of a cell.

    Attributes:
        step: Committed when it began.
        sign: What `sign_of_life` was when it was last looked at.
        quiet: Seconds in which that did not change; None while it waits in a queue.
        hung: Whether it was quiet for too long.
    """

    step: int
    sign: tuple[int, ...]
    quiet: float | None
    hung: bool = False


class Attempts:
    """Attempts at a job's cells: which are to be started, and what the end of one means.

    Args:
        job: Whose cells; `job.say` is told what goes wrong.

    Attributes:
        waiting: By cell that is to be started, when, in seconds of `time.monotonic`.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.waiting = dict.fromkeys(job.cells, 0.0)
        self._open: dict[str, _Attempt] = {}
        self._deaths: dict[str, int] = {}
        self._looked = time.monotonic()

    def due(self) -> list[str]:
        """The cells that are to be started now."""
        now = time.monotonic()
        return [cell for cell, when in self.waiting.items() if when <= now]

    def begin(self, cell: str, *, queued: bool = False) -> None:
        """Note that a cell is started, or queued: then its first sign of life starts the clock."""
        self.waiting.pop(cell, None)
        sign = self._job.sign_of_life(cell)
        self._open[cell] = _Attempt(self._committed(cell), sign, None if queued else 0.0)

    def find_hung(self) -> list[str]:
        """The cells that have just exceeded the study's `patience_s` without a sign of life.

        Time without a check does not count: after the machine slept, no cell counts as hung.
        """
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, _MOST_BETWEEN_LOOKS_S), now
        return [cell for cell in self._open if self._is_newly_hung(cell, passed)]

    def _is_newly_hung(self, cell: str, passed: float) -> bool:
        attempt, sign = self._open[cell], self._job.sign_of_life(cell)
        if sign != attempt.sign:
            attempt.sign, attempt.quiet = sign, 0.0
        elif attempt.quiet is not None:
            attempt.quiet += passed
        if attempt.hung or (attempt.quiet or 0.0) <= self._job.study.file.resources.patience_s:
            return False
        attempt.hung = True
        return True

    def drop(self, cell: str, *, again: bool = True) -> None:
        """Forget an attempt that ended through no fault of the cell; start it again, or do not."""
        self._open.pop(cell, None)
        if again:
            self.waiting[cell] = 0.0

    def end(self, cell: str, code: int, reason: str = "") -> None:
        """Decide what the end of a cell's process means: it is done, has failed, or waits again.

        Args:
            cell: Its id.
            code: Its exit code; negative for a signal or another sudden death.
            reason: How it ended, where the code does not say.
        """
        attempt = self._open.pop(cell)
        if code == 0:
            self._deaths.pop(cell, None)
        elif code in STOPPED:  # stopped by us, or another driver has it
            self.waiting[cell] = time.monotonic() + AGAIN_S
        elif code > 0:
            reason = reason or f"ended with exit code {code}{self._last_line(cell)}"
            self._fail(cell, "error", reason)
        else:
            self._count_death(cell, attempt, reason or _describe(code))

    def _count_death(self, cell: str, attempt: _Attempt, reason: str) -> None:
        """A cell died: start it again, unless it died too often without a commit in between."""
        moved = self._committed(cell) > attempt.step
        self._deaths[cell] = 1 if moved else self._deaths.get(cell, 0) + 1
        needs = self._job.study.file.resources
        if attempt.hung:
            reason = f"no progress for {needs.patience_s:g} s, and killed for it"
        if self._deaths[cell] <= needs.restarts:
            self._job.say(f"{cell}: {reason}; started again")
            self.waiting[cell] = 0.0
        else:
            self._fail(cell, "hung" if attempt.hung else "signal", reason)

    def _fail(self, cell: str, kind: str, reason: str) -> None:
        """Write down that a cell failed, unless it has done so itself."""
        folder = self._job.folder(cell)
        if kind != "error" or read_failure(folder) is None:
            write_failure(folder, kind, reason, f"see {LOG} in its folder")
        self._job.say(f"{cell}: failed; see {folder / LOG}")

    def _last_line(self, cell: str) -> str:
        """The last line that a cell printed, for a message."""
        lines = read_log(self._job.folder(cell)).split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"; its last line: {last[:_LINE]}" if last else "; it printed nothing"

    def _committed(self, cell: str) -> int:
        _, commit = find_run(self._job.folder(cell))
        return commit.step if commit else 0


def _describe(code: int) -> str:
    """Words for the end by a signal.

    >>> _describe(-11), _describe(-9), _describe(-99)
    ('killed by SIGSEGV', 'killed by SIGKILL (out of memory?)', 'killed by signal 99')
    """
    known = {number.value: number.name for number in signal.Signals}
    name = known.get(-code, f"signal {-code}")
    return f"killed by {name}" + (" (out of memory?)" if code == -9 else "")
