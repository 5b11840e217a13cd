"""What the parts of a recorder share: that something failed, and why a number is missing."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Concatenate, ParamSpec, Protocol

P = ParamSpec("P")


class Guard:
    """The state of one monitor's recorder.

    Attributes:
        failure: The error of ours after which nothing is watched any more, or "".
        reasons: Per column, why it is NaN and for which blocks; none for what is not about a block.
    """

    def __init__(self) -> None:
        self.failure = ""
        self.reasons: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))

    def miss(self, row: int, columns: Iterable[str], reason: str) -> None:
        """Note why columns are NaN for a block."""
        for column in columns:
            self.reasons[column][reason].add(row)

    def fail(self, error: Exception) -> None:
        """A mistake of ours must not end somebody's training: note it, and watch no more."""
        self.failure = f"{type(error).__name__}: {error}"


class _Guarded(Protocol):
    guard: Guard


def guarded(method: Callable[Concatenate[Any, P], None]) -> Callable[..., None]:
    """Let a method note its errors in place of raising them, and do nothing after the first."""

    @functools.wraps(method)
    def call(self: _Guarded, *args: P.args, **kwargs: P.kwargs) -> None:
        if self.guard.failure:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.guard.fail(error)

    return call
