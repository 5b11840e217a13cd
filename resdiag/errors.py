"""The errors a user can cause, each with the exit code of the command line."""

import difflib
from collections.abc import Iterable
from typing import Any


class ResdiagError(Exception):
    """Something the user can act on: one line, and a hint that names the way out.

    Args:
        message: What is wrong, naming the value and the valid ones.
        hint: What to do about it; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(ResdiagError):
    """A wrong option, name, file or folder (exit code 2)."""

    exit_code = 2


class StorageError(ResdiagError):
    """The disk is full, read-only or failing (exit code 74, EX_IOERR)."""

    exit_code = 74


class BusyError(ResdiagError):
    """Another process is writing this run (exit code 75, EX_TEMPFAIL)."""

    exit_code = 75


class StopTraining(Exception):
    """Raised by `Monitor.step()` on the first fault, if `attach(on_finding="stop")` asked for it.

    Attributes:
        finding: What was found, a `resdiag.Finding`.
    """

    def __init__(self, finding: Any) -> None:  # noqa: ANN401 - findings are known in a room above
        super().__init__(f"{finding.name}: {finding.summary}")
        self.finding = finding


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """A UsageError for a name that is not in a list, with the nearest match.

    >>> print(unknown("variant", "elu_prr", ["elu", "elu_pre"]).message)
    unknown variant 'elu_prr'; did you mean 'elu_pre'? known: elu, elu_pre
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    guess = f"; did you mean '{near[0]}'?" if near else ";"
    return UsageError(f"unknown {kind} '{name}'{guess} known: {', '.join(names)}")
