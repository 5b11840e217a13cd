"""What all callbacks share: a monitor, the trackers that it tells, and the end of both."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from resdiag.diagnose.finding import Finding
from resdiag.diagnose.saving import save
from resdiag.errors import ResdiagError, StopTraining
from resdiag.runs.folder import read_run
from resdiag.trackers.feed import Feed, open_feed
from resdiag.trackers.tracker import RunInfo, parse_tracker
from resdiag.watch.loop.attach import attach
from resdiag.watch.loop.monitor import Monitor


@dataclass(frozen=True, kw_only=True)
class Watching:
    """How a callback watches.

    Attributes:
        every: Record every `every`-th step.
        record_first: Record each of the first steps.
        blocks: Names or patterns of modules to take as the blocks.
        trackers: Trackers to tell, each as `name:place`; the first process tells them.
        save: Folder to write the run to at its end; None writes none.
        name: Of the run: in the trackers, and in labels.
        live: A display, as of `attach`; the first process shows it.
        on_finding: What is done with each finding, as of `attach`.
    """

    every: int = 1
    record_first: int = 0
    blocks: Sequence[str] | None = None
    trackers: Sequence[str] = ()
    save: str | os.PathLike[str] | None = None
    name: str = "run"
    live: bool | str = False
    on_finding: Callable[[Finding], object] | str | None = None

    def __post_init__(self) -> None:
        for text in self.trackers:
            parse_tracker(text)


class Session:
    """One training under watch, from its first step here to its end.

    Args:
        watching: How to watch.
        model: The module inside any wrapper.
        optimizer: PyTorch's optimizer inside any wrapper.
        scaler: Its GradScaler, if there is one.
        begun: Optimizer steps that the training has done already.
        is_first: Whether this is the process that writes.
        config: Plain values that describe the training, for the trackers.
    """

    def __init__(
        self,
        watching: Watching,
        model: nn.Module,
        optimizer: Any,  # noqa: ANN401
        *,
        scaler: Any = None,  # noqa: ANN401
        begun: int = 0,
        is_first: bool = True,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.monitor: Monitor = attach(
            model,
            optimizer=optimizer,
            blocks=watching.blocks,
            every=watching.every,
            record_first=watching.record_first,
            grad_read_point="pre_clip",
            scaler=scaler,
            live=watching.live if is_first else False,
            on_finding=watching.on_finding,
        )
        self.monitor.start_at(begun)
        self._stops: list[Callable[[], object]] = []
        run = RunInfo(name=watching.name, config=config or {})
        self._feed: Feed = open_feed(watching.trackers if is_first else (), run)
        self.monitor.add_listener(self._feed.write)
        self._open = True
        self._losses: dict[int, Any] = {}
        self._writes = is_first and watching.save is not None
        self._name = watching.name
        self._folder = Path(watching.save or "")
        if self._writes and begun and self._folder.exists():  # the steps before are there already
            self._folder = self._folder.with_name(f"{self._folder.name}-from-{begun}")

    def add_loss(self, step: int, loss: Any) -> None:  # noqa: ANN401
        """Note the loss of a step that the monitor is not told: it is looked at in the end."""
        self._losses[step] = loss

    def at_close(self, stop: Callable[[], object]) -> None:
        """Call `stop` when the session ends."""
        self._stops.append(stop)

    def close(self, status: str = "done") -> None:
        """Remove every hook and end the run in the trackers; safe to call twice."""
        if not self._open:
            return
        self._open = False
        for stop in self._stops:
            stop()
        self.monitor.to_frame()  # fetches what is still on the device, and tells the trackers
        self.monitor.close()
        self._feed.close(status)
        self.monitor.warnings.extend(self._feed.notes)
        if self._writes:
            self._save()

    def _save(self) -> None:
        """Write the run folder and say the verdict; a full disk is said and ends no training."""
        told = self.monitor.to_frame("step")
        if "loss" in told and told["loss"].notna().any():  # of every step, and so the better ones
            self._losses = {}
        steps = sorted(self._losses)
        losses = [float(self._losses[step]) for step in steps]
        curve: dict[str, Sequence[float]] = {"step": steps, "loss": losses}
        try:
            folder = save(
                self.monitor, self._folder, model=self._name, curve=curve if steps else None
            )
            verdict = read_run(folder).written_verdict or {}
            line = f"{folder}: {verdict.get('name')}. {verdict.get('summary')}"
        except ResdiagError as error:
            line = f"the run was not saved: {error.message}"
            self.monitor.warnings.append(line)
        print(f"resdiag: {line}", file=sys.stderr)


class SessionOwner:
    """What the callbacks have in common: a session from the begin of the training to its end."""

    _session: Session | None = None

    @property
    def monitor(self) -> Monitor:
        """What records: `monitor.to_frame()` has what was recorded, also after the end.

        Raises:
            RuntimeError: The training has not begun.
        """
        if self._session is None:
            raise RuntimeError("the training has not begun")
        return self._session.monitor

    def close(self, status: str = "done") -> None:
        """End the watching; safe to call twice."""
        if self._session is not None:
            self._session.close(status)


def say_stop(stop: StopTraining) -> None:
    """Say why a training ends."""
    print(f"resdiag: the training stops: {stop}", file=sys.stderr)


def unwrapped(optimizer: Any) -> Any:  # noqa: ANN401
    """PyTorch's optimizer inside the wrappers of a framework."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
