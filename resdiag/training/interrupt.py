"""Stopping on request: the first signal ends the run at a step's end, the second one at once."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_Handler = Callable[[int, FrameType | None], object] | int | None


class Interrupt:
    """While entered, turns Ctrl-C and SIGTERM into a wish; a context manager.

    Attributes:
        signal: Number of the signal received, 0 before.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, _Handler] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._wish)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _wish(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
