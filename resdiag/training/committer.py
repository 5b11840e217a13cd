"""Commits beside the training: encoding, hashing and waiting for the disk cost it no time."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

from numpy.typing import NDArray

from resdiag.runs.store import RunWriter
from resdiag.training.fair_lock import UNSHARED, LockHandle

Table: TypeAlias = Mapping[str, NDArray[Any]]
"""Rows of a run's table: one array of shape (rows,) per column."""


@dataclass(frozen=True, kw_only=True)
class PendingCommit:
    """What one commit writes; nothing in it changes any more.

    Attributes:
        step: Optimizer steps done.
        metrics: Rows since the commit before.
        curve: Likewise.
        tensors: The checkpoint, packed.
        state: What else the loop must remember.
        status: Of the run.
    """

    step: int
    metrics: Table
    curve: Table
    tensors: bytes
    state: Mapping[str, Any]
    status: str


class Committer:
    """Writes pieces one after the other on a thread of its own; a context manager.

    At most one piece is on its way. A commit that fails is raised where the training meets the
    committer next: at the next piece, or at the end.

    Args:
        writer: The run's folder; used by nobody else meanwhile, but for its beats.
        tell: Is handed the rows of both tables after each commit, in the training's own thread.
        thread_lock: Released while the training waits for the disk.
    """

    def __init__(
        self,
        writer: RunWriter,
        tell: Callable[[Table, Table], object] | None,
        thread_lock: LockHandle = UNSHARED,
    ) -> None:
        self._writer, self._tell, self._thread_lock = writer, tell, thread_lock
        self._thread = ThreadPoolExecutor(1, "resdiag-commit")
        self._under_way: tuple[PendingCommit, Future[None]] | None = None

    def commit(self, piece: PendingCommit) -> None:
        """Write a piece as soon as the one before is written.

        Raises:
            StorageError: The commit before could not be written.
            BusyError: The run's lock was taken over.
        """
        self.wait()
        self._under_way = piece, self._thread.submit(self._write, piece)

    def wait(self) -> None:
        """Until everything is on the disk.

        Raises:
            StorageError: The last commit could not be written.
            BusyError: The run's lock was taken over.
        """
        if self._under_way is None:
            return
        (piece, future), self._under_way = self._under_way, None
        with self._thread_lock.released():
            future.result()
        if self._tell is not None:  # after the commit: steps that are done again are told once
            self._tell(piece.metrics, piece.curve)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._thread.shutdown()  # the folder is given back after the last write

    def _write(self, piece: PendingCommit) -> None:
        self._writer.commit(
            piece.step, piece.metrics, piece.curve, piece.tensors, piece.state, piece.status
        )
