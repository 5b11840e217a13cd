"""Stopping on request: the first signal ends a run after its next step, the second one at once."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Self

EXIT_CODES = {int(signal.SIGINT): 130, int(signal.SIGTERM): 75}
"""Exit code of a process by the signal that stopped it."""

_Handler = Callable[[int, FrameType | None], object] | int | None


class Interrupt:
    """While entered, notes the first Ctrl-C or SIGTERM; a context manager.

    A second signal does what it would have done before: an outer handler is called (for Ctrl-C
    that is Python's, which raises KeyboardInterrupt), else the process exits at once.

    The handlers are set when it is entered and reset when it is left, and never in between. To
    reset them as soon as the first signal arrives would be shorter, but a second one can come
    before the reset and be handled after it; Python then drops it and prints a traceback: "OSError:
    Signal 15 ignored due to race condition". Enter it before threads are started, and around all
    that a signal must not break off.

    Attributes:
        signal: Number of the first signal received, 0 before.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, _Handler] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            for number in EXIT_CODES:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal = number
            return
        before = self._before.get(number)
        if callable(before):
            before(number, frame)
        elif before != signal.SIG_IGN:
            os._exit(EXIT_CODES[number])
