"""What a training saves: its checkpoint, and the thread that commits it with the new rows.

Encoding, hashing and waiting for the disk cost the training no time.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeAlias

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import SGD

from resdiag.runs.store import RunWriter
from resdiag.training.fair_lock import UNSHARED, LockHandle

_MODEL, _MOMENTUM = "model.", "momentum."

Table: TypeAlias = Mapping[str, NDArray[Any]]
"""Rows of a run's table: one array of shape (rows,) per column."""


def pack(model: nn.Module, optimizer: SGD) -> dict[str, Tensor]:
    """Tensors of a model and of its optimizer by name, sharing their memory."""
    tensors = {_MODEL + name: value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            tensors[_MOMENTUM + name] = momentum
    return tensors


def unpack(model: nn.Module, optimizer: SGD, tensors: Mapping[str, Tensor]) -> None:
    """Put packed tensors back, bit for bit.

    Raises:
        RuntimeError: They are those of another model.
    """
    state = {k.removeprefix(_MODEL): v for k, v in tensors.items() if k.startswith(_MODEL)}
    model.load_state_dict(state)
    for name, parameter in model.named_parameters():
        momentum = tensors.get(_MOMENTUM + name)
        if momentum is not None:
            # the parameter's own memory format: another one would round differently
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(
                momentum
            )


class Committer:
    """Writes commits one after the other on a thread of its own; a context manager.

    At most one commit is being written. If it fails, its error is raised at the next commit, or at
    the end.

    Args:
        writer: The run's folder; used by no other thread meanwhile, except for heartbeats.
        on_commit: Called with the rows of both tables after each commit, in the training's thread.
        thread_lock: Released while the training waits for the disk.
    """

    def __init__(
        self,
        writer: RunWriter,
        on_commit: Callable[[Table, Table], object] | None,
        thread_lock: LockHandle = UNSHARED,
    ) -> None:
        self._writer, self._on_commit, self._thread_lock = writer, on_commit, thread_lock
        self._thread = ThreadPoolExecutor(1, "resdiag-commit")
        self._running: tuple[Table, Table, Future[None]] | None = None

    def commit(
        self,
        step: int,
        metrics: Table,
        curve: Table,
        tensors: bytes,
        state: Mapping[str, Any],
        status: str,
    ) -> None:
        """Write a commit as soon as the one before is written.

        Args:
            step: Optimizer steps done.
            metrics: Rows since the commit before; they do not change any more.
            curve: Likewise.
            tensors: The checkpoint, packed.
            state: What else the loop must remember.
            status: Of the run.

        Raises:
            StorageError: The commit before could not be written.
            BusyError: The run's lock was taken over.
        """
        self.wait()
        write = self._writer.commit
        written = self._thread.submit(write, step, metrics, curve, tensors, state, status)
        self._running = metrics, curve, written

    def wait(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            StorageError: The last commit could not be written.
            BusyError: The run's lock was taken over.
        """
        if self._running is None:
            return
        (metrics, curve, written), self._running = self._running, None
        with self._thread_lock.released():
            written.result()
        if self._on_commit is not None:  # after the commit: steps that are done again are told once
            self._on_commit(metrics, curve)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._thread.shutdown()  # the folder is given back after the last write
