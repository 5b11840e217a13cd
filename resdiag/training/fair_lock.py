"""A lock by which trainings in the threads of one process run one at a time, a step each.

PyTorch has state that belongs to a process: its random numbers, hooks on every module and every
optimizer, a CUDA graph being captured. So only the thread that holds the lock trains. It passes the
lock on where it would only wait for the device, which then works for all of them.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from resdiag.training.interrupt import Interrupt


class FairLock:
    """A lock that goes to the thread that has waited longest; `threading.Lock` promises no order.

    Attributes:
        waiting: A closed gate for each thread that waits, the longest first.
    """

    def __init__(self) -> None:
        self.waiting: deque[threading.Lock] = deque()
        self._guard = threading.Lock()
        self._taken = False

    def acquire(self) -> None:
        """Wait for the lock, behind those that wait already."""
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            gate = self._enqueue()
        gate.acquire()

    def release(self) -> None:
        """Give the lock to the first that waits."""
        with self._guard:
            if self.waiting:
                self.waiting.popleft().release()
            else:
                self._taken = False

    def pass_on(self) -> None:
        """Give the lock to the first that waits, and wait for it again; return if none waits."""
        with self._guard:
            if not self.waiting:
                return
            gate = self._enqueue()
            self.waiting.popleft().release()
        gate.acquire()

    def _enqueue(self) -> threading.Lock:
        gate = threading.Lock()
        gate.acquire()
        self.waiting.append(gate)
        return gate


class LockHandle:
    """One training's handle on the lock; a context manager that holds the lock while entered.

    Args:
        lock: None for a training that is alone in its process: then nothing is ever waited for.
    """

    def __init__(self, lock: FairLock | None = None) -> None:
        self._lock, self._stop_request = lock, Interrupt()

    def __enter__(self) -> Self:
        if self._lock:
            self._lock.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock:
            self._lock.release()

    def pass_on(self) -> None:
        """Let every training that waits do a step, and come back."""
        if self._lock:
            self._lock.pass_on()

    @contextmanager
    def released(self) -> Iterator[None]:
        """While inside, others train: for waiting, not for PyTorch."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def interrupt(self) -> Interrupt:
        """What asks the training to stop; to be entered.

        Signals arrive in the main thread only. A thread that shares its process gets an object
        that `stop` sets instead.
        """
        return self._stop_request if self._lock else Interrupt()

    def stop(self, number: int) -> None:
        """Ask for an end as signal `number` does; from any thread."""
        self._stop_request.signal = number


UNSHARED = LockHandle()
"""The handle of trainings that do not share their process."""
