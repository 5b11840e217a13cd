"""Tells trackers what a training records; none can end it, delay it or change it."""

import queue
import threading
from collections.abc import Sequence
from typing import TypeAlias

from resdiag.trackers.tags import SHOWN, Columns, by_step
from resdiag.trackers.tracker import RunInfo, Tracker, open_tracker

_WAITING = 256
"""Tables that may wait for a slow tracker."""
_PATIENCE_S = 60.0

_Item: TypeAlias = tuple[Columns, Columns] | str


class Feed:
    """Tells some trackers what is recorded, each in a thread of its own.

    A tracker that raises or is too slow gets nothing more, and at the end one that hangs is no
    longer waited for; `notes` says each once.

    Args:
        trackers: By the name that a note gives them.
        run: The run.
        shown: Block-level metrics to tell.
        patience: Seconds to wait for a tracker at the end.
    """

    def __init__(
        self,
        trackers: dict[str, Tracker],
        run: RunInfo,
        shown: Sequence[str] = SHOWN,
        patience: float = _PATIENCE_S,
    ) -> None:
        self._patience = patience
        self._workers = [_Worker(name, one, run, shown) for name, one in trackers.items()]

    @property
    def notes(self) -> list[str]:
        """One line for each tracker that did not get everything."""
        return [worker.note for worker in self._workers if worker.note]

    def write(self, metrics: Columns, curve: Columns) -> None:
        """Tell new rows of both tables; returns at once."""
        for worker in self._workers:
            worker.put((metrics, curve))

    def close(self, status: str) -> None:
        """End the run in every tracker; a second call does nothing."""
        for worker in self._workers:
            worker.end(status)
        for worker in self._workers:
            worker.wait(self._patience)


def open_feed(trackers: Sequence[str], run: RunInfo, shown: Sequence[str] = SHOWN) -> Feed:
    """A feed to some trackers; without any it does nothing.

    Args:
        trackers: Each as `name:place`.
        run: The run.
        shown: Block-level metrics to tell.

    Raises:
        UsageError: See `parse_tracker`.
    """
    return Feed({text: open_tracker(text) for text in dict.fromkeys(trackers)}, run, shown)


class _Worker:
    def __init__(self, name: str, tracker: Tracker, run: RunInfo, shown: Sequence[str]) -> None:
        self.note, self._is_open = "", True
        self._name, self._tracker, self._run, self._shown = name, tracker, run, shown
        self._queue: queue.Queue[_Item] = queue.Queue()
        # a daemon: a tracker that hangs for good does not keep the process alive
        self._thread = threading.Thread(target=self._serve, name=f"resdiag {name}", daemon=True)
        self._thread.start()

    def put(self, item: tuple[Columns, Columns]) -> None:
        if self.note or not self._is_open:
            return
        if self._queue.qsize() >= _WAITING:
            self.note = f"tracker {self._name} is too slow: it gets nothing more"
            return
        self._queue.put(item)

    def end(self, status: str) -> None:
        if self._is_open:
            self._is_open = False
            self._queue.put(status)

    def wait(self, patience: float) -> None:
        self._thread.join(patience)
        if self._thread.is_alive() and not self.note:
            self.note = f"tracker {self._name} did not finish within {patience:g} s"

    def _serve(self) -> None:
        try:
            self._tracker.start(self._run)
            while not isinstance(item := self._queue.get(), str):
                for step, values in by_step(*item, self._shown):
                    self._tracker.write(step, values)
            self._tracker.finish(item)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            self.note = f"tracker {self._name} failed: {type(error).__name__} {reason}"
