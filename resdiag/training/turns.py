"""Turns: trainings that share a process run one at a time, a step each, round and round.

PyTorch has state that belongs to a process: its random numbers, hooks on every module and every
optimizer, a CUDA graph being captured. So one thread has the turn and the others wait for it. A
training hands it on where it would only wait for the device, which then is at work for all of them.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Self

from resdiag.training.interrupt import Interrupt


class Turn:
    """The turn of a training that is alone in its process: nobody to hand it to, nothing to pay.

    A context manager: what is done inside is done with the turn.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return

    def hand_on(self) -> None:
        """Let every training that waits have a turn, and come back."""

    def away(self) -> AbstractContextManager[object]:
        """While inside, others have their turns: for waiting, not for PyTorch."""
        return nullcontext()

    def interrupt(self) -> Interrupt:
        """What asks the training to stop; to be entered."""
        return Interrupt()


ALONE = Turn()


class Ring:
    """One turn for many threads: who has waited longest is next, so it goes round in a ring."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken = False

    def take(self) -> None:
        """Wait for the turn, at the end of the line."""
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            gate = self._stand_in_line()
        gate.acquire()

    def give(self) -> None:
        """Give the turn to the first in line."""
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False

    def hand_on(self) -> None:
        """Give the turn to the first in line and wait for it again; at once if nobody waits."""
        with self._guard:
            if not self._waiting:
                return
            gate = self._stand_in_line()
            self._waiting.popleft().release()
        gate.acquire()

    def _stand_in_line(self) -> threading.Lock:
        """A closed gate that opens when it is our turn."""
        gate = threading.Lock()
        gate.acquire()
        self._waiting.append(gate)
        return gate


class Seat(Turn):
    """A thread's place in a ring.

    Args:
        ring: The ring.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring, self._wish = ring, Interrupt()

    def __enter__(self) -> Self:
        self._ring.take()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ring.give()

    def hand_on(self) -> None:
        """Let every thread that waits have a turn, and come back."""
        self._ring.hand_on()

    @contextmanager
    def away(self) -> Iterator[None]:
        """While inside, others have their turns."""
        self._ring.give()
        try:
            yield
        finally:
            self._ring.take()

    def interrupt(self) -> Interrupt:
        """The wish that `stop` sets: signals come to the main thread, which is none of ours."""
        return self._wish

    def stop(self, number: int) -> None:
        """Ask for an end as signal `number` does; from any thread."""
        self._wish.signal = number
