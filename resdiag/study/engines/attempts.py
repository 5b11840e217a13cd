"""Attempts at cells: whether one gets on, and what its end means. The same in every engine."""

import time
from dataclasses import dataclass

from resdiag.study.engines.job import Job
from resdiag.study.failure import LOG, name_signal, read_failure, read_log, write_failure
from resdiag.study.ledger import find_run
from resdiag.study.work import STOPPED

AGAIN_S = 5.0
"""Seconds before a cell that somebody else has is asked for again."""
_GLANCE_S = 5.0
_SIGINT = 130
_LINE = 200


@dataclass
class _Attempt:
    """One start of a cell.

    Attributes:
        step: Committed when it began.
        sign: Its sign of life when it was last looked at.
        quiet: Seconds without a new sign; None while it waits for its turn.
        hung: Whether it was found not to get on.
    """

    step: int
    sign: tuple[int, ...]
    quiet: float | None
    hung: bool = False


class Attempts:
    """The starts of a job's cells.

    Args:
        job: Whose cells; it is told what goes wrong.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._open: dict[str, _Attempt] = {}
        self._strikes: dict[str, int] = {}
        self._looked = time.monotonic()

    def begin(self, cell: str, *, queued: bool = False) -> None:
        """A cell is started, or queued for a machine: then its first sign of life starts it."""
        sign = self._job.sign_of_life(cell)
        self._open[cell] = _Attempt(self._committed(cell), sign, None if queued else 0.0)

    def find_hung(self) -> list[str]:
        """The cells that have just been quiet for longer than the study has patience.

        Time in which nobody looked does not count: a machine that slept is no hung cell.
        """
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, _GLANCE_S), now
        return [cell for cell, attempt in self._open.items() if self._hangs(cell, attempt, passed)]

    def _hangs(self, cell: str, attempt: _Attempt, passed: float) -> bool:
        sign = self._job.sign_of_life(cell)
        if sign != attempt.sign:
            attempt.sign, attempt.quiet = sign, 0.0
        elif attempt.quiet is not None:
            attempt.quiet += passed
        if attempt.hung or (attempt.quiet or 0.0) <= self._job.study.file.resources.patience_s:
            return False
        attempt.hung = True
        return True

    def drop(self, cell: str) -> None:
        """An attempt ended by what was no fault of the cell."""
        self._open.pop(cell, None)

    def end(self, cell: str, code: int, words: str = "") -> float | None:
        """A cell's process has ended.

        Args:
            cell: Its id.
            code: Its exit code; negative for a signal or another sudden death.
            words: How it ended, where the code does not say.

        Returns:
            Seconds after which the cell is to be started again; None if it is over: done, failed.
        """
        attempt = self._open.pop(cell)
        if code == 0:
            self._strikes.pop(cell, None)
            return None
        if code in (STOPPED, _SIGINT):  # stopped by us, or somebody else's
            return AGAIN_S
        if code > 0:
            self._fail(cell, "error", words or f"ended with exit code {code}{self._last(cell)}")
            return None
        return self._strike(cell, attempt, words or _describe(code))

    def _strike(self, cell: str, attempt: _Attempt, words: str) -> float | None:
        """A cell died: try again, unless that happened too often without a commit between."""
        moved = self._committed(cell) > attempt.step
        self._strikes[cell] = 1 if moved else self._strikes.get(cell, 0) + 1
        needs = self._job.study.file.resources
        if attempt.hung:
            words = f"no progress for {needs.patience_s:g} s, and killed for it"
        if self._strikes[cell] <= needs.restarts:
            self._job.say(f"{cell}: {words}; started again")
            return 0.0
        self._fail(cell, "hung" if attempt.hung else "signal", words)
        return None

    def _fail(self, cell: str, kind: str, words: str) -> None:
        """Note that a cell failed, unless it has said so itself."""
        folder = self._job.folder(cell)
        if kind != "error" or read_failure(folder) is None:
            write_failure(folder, kind, words, f"see {LOG} in its folder")
        self._job.say(f"{cell}: failed; see {folder / LOG}")

    def _last(self, cell: str) -> str:
        """The last line that a cell printed, which tells more than a number."""
        lines = read_log(self._job.folder(cell)).split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"; its last words: {last[:_LINE]}" if last else " and no word"

    def _committed(self, cell: str) -> int:
        _, commit = find_run(self._job.folder(cell))
        return commit.step if commit else 0


def _describe(code: int) -> str:
    """Words for the end by a signal.

    >>> _describe(-11), _describe(-9)
    ('killed by SIGSEGV', 'killed by SIGKILL (out of memory?)')
    """
    return f"killed by {name_signal(-code)}" + (" (out of memory?)" if code == -9 else "")
