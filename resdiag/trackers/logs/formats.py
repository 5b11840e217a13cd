"""The table of formats of logs, and opening a file or folder by it."""

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from resdiag.errors import UsageError, unknown
from resdiag.trackers.logs.entries import Log, as_run

if TYPE_CHECKING:
    from resdiag.runs.folder import Run

_DEEPEST = 3


@dataclass(frozen=True, kw_only=True)
class LogFormat:
    """A row of the table of formats.

    Attributes:
        name: Word for `--format`.
        files: Pattern of the names of its files, the whole name in lower case.
        about: What it is, for messages and documentation.
        read: Reads a file, or a folder if `of_folder`.
        of_folder: Whether the files of one folder are one log.
        package: What must be installed, also the name of resdiag's extra; "" for nothing.
    """

    name: str
    files: str
    about: str
    read: Callable[[Path], Log]
    of_folder: bool = False
    package: str = ""

    def matches(self, path: Path) -> bool:
        """Whether a file is one of this format by its name."""
        return re.fullmatch(self.files, path.name.lower()) is not None

    def open(self, path: Path) -> Log:
        """Read a log.

        Raises:
            UsageError: Its package is missing, or the file is not of this format.
        """
        if self.package and importlib.util.find_spec(self.package) is None:
            raise UsageError(
                f"reading {path} needs the package {self.package}",
                f"pip install 'resdiag[{self.package}]'",
            )
        return self.read(path)


def _reader(module: str, function: str) -> Callable[[Path], Log]:
    """A function of this package, which is imported when it is used."""

    def read(path: Path) -> Log:
        log: Log = getattr(importlib.import_module(f"{__package__}.{module}"), function)(path)
        return log

    return read


_ROWS = (
    LogFormat(
        name="trainer_state", files=r"trainer_state\.json",
        read=_reader("text", "read_trainer_state"),
        about="trainer_state.json of the Hugging Face Trainer",
    ),
    LogFormat(
        name="tensorboard", files=r".*tfevents.*", read=_reader("binary", "read_events"),
        about="event files of TensorBoard", of_folder=True, package="tensorboard",
    ),
    LogFormat(
        name="wandb", files=r".*\.wandb", read=_reader("binary", "read_wandb"),
        about="the .wandb file of a W&B run", package="wandb",
    ),
    LogFormat(
        name="jsonl", files=r".*\.(jsonl|ndjson|json)", read=_reader("text", "read_jsonl"),
        about="one JSON object per line, or a list of objects",
    ),
    LogFormat(
        name="csv", files=r".*\.(csv|tsv)", read=_reader("text", "read_csv"),
        about="a table with a header, e.g. exported by W&B or written by Lightning's CSVLogger",
    ),
)  # fmt: skip

FORMATS: Mapping[str, LogFormat] = MappingProxyType({row.name: row for row in _ROWS})
"""The formats by name; of a folder, the first that it has files of is read."""


def load_log(path: Path, format: str = "") -> "Run":
    """Read a log as a run in memory.

    Args:
        path: A file, or a folder in which it is found, also a few folders below.
        format: Name of a format; "" goes by the names of files.

    Raises:
        UsageError: Unknown format, no log or several, or a file that is damaged.
    """
    if format and format not in FORMATS:
        raise unknown("format", format, FORMATS)
    rows = [FORMATS[format]] if format else list(FORMATS.values())
    if not path.exists():
        raise UsageError(f"no such file or folder: {path}")
    if path.is_file():
        matching = rows if format else [row for row in rows if row.matches(path)]
        if not matching:
            raise UsageError(f"{path} is of no known format; known: {', '.join(FORMATS)}",
                             "--format NAME says which it is")  # fmt: skip
        return as_run(matching[0].open(path))
    for row in rows:
        if found := _find(path, row):
            return as_run(row.open(_the_one(found, path, row)))
    raise UsageError(
        f"no run and no log in {path}", f"logs: {'; '.join(row.about for row in rows)}"
    )


def _find(folder: Path, row: LogFormat) -> list[Path]:
    """Logs of a format at the smallest depth below a folder at which there is one."""
    for depth in range(_DEEPEST):
        files = [f for f in folder.glob("/".join(["*"] * (depth + 1))) if f.is_file()]
        found = [file for file in files if row.matches(file)]
        if found:
            return sorted({file.parent for file in found} if row.of_folder else set(found))
    return []


def _the_one(found: list[Path], folder: Path, row: LogFormat) -> Path:
    """The only log; of the Trainer's checkpoints the last one, which has all entries."""
    checkpoints = {
        int(match[1]): path
        for path in found
        if (match := re.fullmatch(r"checkpoint-(\d{1,18})", path.parent.name))
    }
    if row.name == "trainer_state" and len(checkpoints) == len(found):
        return checkpoints[max(checkpoints)]
    if len(found) > 1:
        raise UsageError(
            f"{folder} holds {len(found)} logs of the format {row.name}",
            f"name one, e.g. {found[0]}",
        )
    return found[0]
