"""Feeds sinks from a training: no sink can end it, hold it up or change it."""

import queue
import threading
from collections.abc import Sequence
from typing import TypeAlias

from resdiag.trackers.sink import About, Sink, open_sink
from resdiag.trackers.tags import SHOWN, Columns, by_step

_WAITING = 256
"""Tables that may wait for a slow sink."""
_PATIENCE_S = 60.0

_Item: TypeAlias = tuple[Columns, Columns] | str


class Feed:
    """Hands what is recorded to some sinks, each in a thread of its own.

    A sink that raises is left out from then on, one that is too slow misses tables, one that hangs
    is left behind at the end; each is said once, in `notes`.

    Args:
        sinks: By the name that a note gives them.
        about: The run.
        shown: Block-level metrics to hand on.
        patience: Seconds to wait for a sink at the end.
    """

    def __init__(
        self,
        sinks: dict[str, Sink],
        about: About,
        shown: Sequence[str] = SHOWN,
        patience: float = _PATIENCE_S,
    ) -> None:
        self._patience = patience
        self._lanes = [_Lane(name, sink, about, shown) for name, sink in sinks.items()]

    @property
    def notes(self) -> list[str]:
        """What did not arrive, one line per sink that had trouble."""
        return [lane.note for lane in self._lanes if lane.note]

    def write(self, metrics: Columns, curve: Columns) -> None:
        """Hand on new rows of both tables; returns at once."""
        for lane in self._lanes:
            lane.put((metrics, curve))

    def close(self, status: str) -> None:
        """End the run in every sink; a second call does nothing."""
        lanes, waiting = self._lanes, [lane for lane in self._lanes if lane.is_open]
        for lane in waiting:
            lane.end(status)
        for lane in lanes:
            lane.wait(self._patience)


def open_feed(sinks: Sequence[str], about: About, shown: Sequence[str] = SHOWN) -> Feed:
    """A feed to the sinks that some texts mean; without any it does nothing.

    Raises:
        UsageError: See `check_sink`.
    """
    return Feed({text: open_sink(text) for text in dict.fromkeys(sinks)}, about, shown)


class _Lane:
    """One sink, its queue and its thread."""

    def __init__(self, name: str, sink: Sink, about: About, shown: Sequence[str]) -> None:
        self.note, self.is_open = "", True
        self._name, self._sink, self._about, self._shown = name, sink, about, shown
        self._queue: queue.Queue[_Item] = queue.Queue()
        # a daemon: a sink that hangs for good does not keep the process alive
        self._thread = threading.Thread(target=self._serve, name=f"resdiag {name}", daemon=True)
        self._thread.start()

    def put(self, item: tuple[Columns, Columns]) -> None:
        if self.note or not self.is_open:
            return
        if self._queue.qsize() >= _WAITING:
            self.note = f"sink {self._name} is too slow: left out from here on"
            return
        self._queue.put(item)

    def end(self, status: str) -> None:
        self.is_open = False
        self._queue.put(status)

    def wait(self, patience: float) -> None:
        self._thread.join(patience)
        if self._thread.is_alive() and not self.note:
            self.note = f"sink {self._name} did not finish within {patience:g} s: left behind"

    def _serve(self) -> None:
        try:
            self._sink.start(self._about)
            while not isinstance(item := self._queue.get(), str):
                for step, values in by_step(*item, self._shown):
                    self._sink.write(step, values)
            self._sink.finish(item)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            self.note = f"sink {self._name} failed and is left out: {type(error).__name__} {reason}"
