"""What a sink is, and which one a text such as `tensorboard:DIR` means."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from resdiag.errors import UsageError, unknown

KINDS = {"tensorboard": "DIR", "wandb": "PROJECT", "mlflow": "DATABASE"}
"""Trackers by name, and what stands behind the colon of `--sink`."""

_PACKAGES = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "mlflow": ("mlflow",)}


@dataclass(frozen=True, kw_only=True)
class About:
    """What a sink is told of a run before its numbers.

    Attributes:
        name: Of the run; the same name continues the same run where a tracker can.
        config: Plain values that describe it.
        anew: Begin a run even if the tracker has an unfinished one of this name.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    anew: bool = False


class Sink(Protocol):
    """A tracker. It may raise and it may be slow: `Feed` sees to it that no training suffers."""

    def start(self, about: About) -> None:
        """Open the run in the tracker."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step by tag, e.g. `grad_output/block_007`; steps never decrease."""

    def finish(self, status: str) -> None:
        """End the run with its status, "done" or another of `commit.STATUSES`."""


def check_sink(text: str) -> tuple[str, str]:
    """The kind and the place in `kind:place`, refused if it is unknown or not installed.

    Raises:
        UsageError: Naming the valid kinds, or the package to install.

    >>> check_sink("tensorboard:logs")
    ('tensorboard', 'logs')
    """
    kind, _, place = text.partition(":")
    if kind not in KINDS:
        raise unknown("sink", kind, KINDS)
    if not place:
        raise UsageError(f"sink '{text}' lacks its place: {kind}:{KINDS[kind]}")
    check_installed(kind)
    return kind, place


def check_installed(kind: str) -> None:
    """Refuse a tracker whose package is missing, without importing it.

    Raises:
        UsageError: With the line that installs it.
    """
    for package in _PACKAGES.get(kind, ()):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{kind} is not installed", f"pip install 'resdiag[{kind}]'")


def open_sink(text: str) -> Sink:
    """The sink that `kind:place` means; nothing is written before `start`.

    Raises:
        UsageError: See `check_sink`.
    """
    kind, place = check_sink(text)
    if kind == "tensorboard":
        from resdiag.trackers.tensorboard import TensorBoardSink

        return TensorBoardSink(place)
    if kind == "wandb":
        from resdiag.trackers.wandb import WandbSink

        return WandbSink(place)
    from resdiag.trackers.mlflow import MlflowSink

    return MlflowSink(place)
