"""Why a cell failed, as a file beside its run: written by the cell, or by who watched it die."""

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from resdiag.errors import StorageError
from resdiag.runs.files import remove_file, to_json, write_file

FAILED, LOG = "failed.json", "log.txt"
_TAIL = 2000


@dataclass(frozen=True)
class Failure:
    """The end of a cell that did not come to its end.

    Attributes:
        kind: "error" (with a reason), "signal" (it was killed or crashed) or "hung".
        message: One line.
        hint: What to do; may be empty.
        log: End of what it printed.
    """

    kind: str
    message: str
    hint: str = ""
    log: str = ""


def write_failure(folder: Path, kind: str, message: str, hint: str = "") -> None:
    """Note a failure with the end of the cell's log; on a full disk the exit code must do."""
    failure = Failure(kind, " ".join(message.split())[:_TAIL], hint, read_log(folder))
    with contextlib.suppress(StorageError):
        write_file(folder / FAILED, to_json(asdict(failure)))


def read_failure(folder: Path) -> Failure | None:
    """Why a cell failed; None if it did not."""
    path = folder / FAILED
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_bytes())
        return Failure(**{name: str(document[name]) for name in Failure.__dataclass_fields__})
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return Failure("error", f"{path} is damaged")


def clear_failure(folder: Path) -> None:
    """Forget a failure: the cell is tried again."""
    remove_file(folder / FAILED)


def read_log(folder: Path) -> str:
    """The end of what a cell printed."""
    try:
        with (folder / LOG).open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
