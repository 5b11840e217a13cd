"""Beats of a lock while its owner works, so that others can tell a living owner from a gone one."""

import threading
from collections.abc import Callable
from typing import Self

from resdiag.runs.lock import BEAT_S


class Heartbeat:
    """Calls `beat` every few seconds from a thread while entered; a context manager."""

    def __init__(self, beat: Callable[[], None], every: float = BEAT_S) -> None:
        self._beat, self._every = beat, every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="resdiag-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._every):
            self._beat()
