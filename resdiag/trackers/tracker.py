"""What a tracker is, and the table of trackers: validation and `--help` follow from its rows."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from resdiag.errors import UsageError, unknown
from resdiag.registry import Registry


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a tracker is told of a run before its numbers.

    Attributes:
        name: Of the run; the same name continues the same run where a tracker can.
        config: Plain values that describe it.
        is_new: Begin a run even if the tracker has an unfinished one of this name.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    is_new: bool = False


class Tracker(Protocol):
    """One run in a tracker. It may raise and be slow: `Feed` keeps that away from the training.

    The three methods are called in this order, all in one thread, which is not the training's.
    """

    def start(self, run: RunInfo) -> None:
        """Open the run in the tracker."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step by tag; steps never decrease.

        Args:
            step: Of the optimizer.
            values: By tag, e.g. `grad_output/block_007`; NaN and infinities are among them.
        """

    def finish(self, status: str) -> None:
        """End the run with its status, "done" or another of `commit.STATUSES`."""


Play: TypeAlias = Callable[[Tracker], None]
"""Tells a tracker a whole recorded run: `start`, each `write`, `finish`."""


@dataclass(frozen=True, kw_only=True)
class TrackerKind:
    """A row of the table of trackers.

    Attributes:
        name: Before the colon of `--tracker`, and after `export --to`.
        place: One word for what stands behind the colon, e.g. "DIR".
        open: Makes a tracker from what stands behind the colon. It imports the tracker's package,
            but writes nothing before `start`.
        export_place: In words, what `export --to` takes; like `place` if empty.
        export: Writes a recorded run: gets the run's name, the place and a function that tells a
            tracker the run, and returns where it is. None tells it to `open(place)`.
        packages: Modules that must be installed.
        install: What installs them.
    """

    name: str
    place: str
    open: Callable[[str], Tracker]
    export_place: str = ""
    export: Callable[[str, str, Play], str] | None = None
    packages: tuple[str, ...] = ()
    install: str = ""

    def check_installed(self) -> None:
        """Refuse a tracker whose package is missing, without importing it.

        Raises:
            UsageError: With the line that installs it.
        """
        if any(importlib.util.find_spec(package) is None for package in self.packages):
            raise UsageError(f"{self.name} is not installed", self.install)


def _built_in(module: str, place: str, export_place: str, *, exports: bool = False) -> TrackerKind:
    """The row of a module of this package, whose package is imported when it is used."""

    def call(function: str, *arguments: object) -> Any:  # noqa: ANN401
        return getattr(importlib.import_module(f"{__package__}.{module}"), function)(*arguments)

    return TrackerKind(
        name=module,
        place=place,
        open=lambda where: call("open_tracker", where),
        export_place=export_place,
        export=(lambda *about: str(call("export_run", *about))) if exports else None,
        packages=(module,),
        install=f"pip install 'resdiag[{module}]'",
    )


TABLES = ("csv", "jsonl")
"""What `export --to` writes besides: tables as files."""
TRACKERS = Registry(
    "tracker",
    (
        _built_in("tensorboard", "DIR", "a folder", exports=True),
        _built_in("wandb", "PROJECT", "a folder", exports=True),
        _built_in("mlflow", "DATABASE", "a SQLite file or tracking URI"),
    ),
)
"""The trackers by name; `register_tracker` adds one."""


def register_tracker(kind: TrackerKind) -> None:
    """Add a tracker: `--tracker`, `export --to` and the integrations then take its name.

    Raises:
        RegistrationError: The name is taken.
    """
    TRACKERS.add(kind, taken=TABLES)


def parse_tracker(text: str) -> tuple[TrackerKind, str]:
    """The row and the place in `name:place`, refused if it is unknown or not installed.

    Raises:
        UsageError: Naming the valid names, or the package to install.

    >>> kind, place = parse_tracker("tensorboard:logs")
    >>> kind.name, place
    ('tensorboard', 'logs')
    """
    name, _, place = text.partition(":")
    if name not in TRACKERS:
        raise unknown("tracker", name, TRACKERS)
    kind = TRACKERS[name]
    if not place:
        raise UsageError(f"tracker '{text}' needs a place: {name}:{kind.place}")
    kind.check_installed()
    return kind, place


def open_tracker(text: str) -> Tracker:
    """The tracker that `name:place` means; nothing is written before `start`.

    Raises:
        UsageError: See `parse_tracker`.
    """
    kind, place = parse_tracker(text)
    return kind.open(place)
