"""Following a monitor: its findings as they arise, and displays of how the training goes."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from resdiag.diagnose.finding import Finding
from resdiag.diagnose.registry import FINDINGS
from resdiag.diagnose.verdict import Verdict, judge
from resdiag.errors import StopTraining, unknown
from resdiag.live.snapshot import Snapshot, take_snapshot
from resdiag.runs.folder import Run
from resdiag.runs.watched import as_run
from resdiag.watch.base.safety import warn

if TYPE_CHECKING:
    from resdiag.watch.loop.monitor import Monitor

OnFinding = Callable[[Finding], object] | str
"""What is called with each finding, or "warn" or "stop"."""

ACTIONS = ("warn", "stop")
DISPLAYS = ("panel", "http")

_ALL_OF_THE_FIRST = 32  # recorded steps that are all judged
_GROWTH = 16  # later ones are judged when the record has grown by a 16th
_SHARE = 20  # times its own time a display waits before it shows again
_LONGEST_S = 10.0  # that it waits


class Display(Protocol):
    """Shows a training."""

    def show(self, snapshot: Snapshot, run: Run) -> None:
        """Show how it stands now."""

    def close(self) -> None:
        """End."""


class Follower:
    """Judges a training as it goes on, and shows it.

    Each of the first 32 recorded steps is judged, later ones each time that the record has grown by
    a sixteenth: the same steps in each repetition, and a time that grows as n log n.

    Args:
        monitor: What records.
        on_finding: Called once for each finding; see `attach`.
        display: Shows the training; None shows nothing.

    Attributes:
        recorded: Steps that were recorded so far.
    """

    def __init__(
        self,
        monitor: "Monitor",
        on_finding: OnFinding | None = None,
        display: Display | None = None,
    ) -> None:
        self._monitor, self._display = monitor, display
        self._act = _action(on_finding)
        self._known: set[tuple[str, str]] = set()
        self._verdict: Verdict | None = None
        self.recorded = self._judged = 0
        self._show_after = 0.0

    def __call__(self) -> None:
        """A recorded step has ended.

        Raises:
            Exception: Whatever `on_finding` raises.
        """
        self.recorded += 1
        due = self.recorded <= _ALL_OF_THE_FIRST
        due = due or self.recorded >= self._judged * (1 + 1 / _GROWTH)
        if due:
            self._judge()
        if self._display is not None and time.monotonic() >= self._show_after:
            self._show(self._display, running=True)

    def close(self) -> None:
        """Judge and show what was recorded last, and end the display."""
        if self.recorded != self._judged:
            self._judge()
        if self._display is not None:
            self._show(self._display, running=False)
            self._display.close()
            self._display = None

    def _judge(self) -> None:
        self._judged = self.recorded
        self._verdict = judge(self._monitor)
        for finding in self._verdict.findings:
            key = finding.name, finding.cause
            if key not in self._known:
                self._known.add(key)
                if self._act is not None:
                    self._act(finding)

    def _show(self, display: Display, *, running: bool) -> None:
        """Show; a display that fails is taken away, and the training goes on."""
        began = time.monotonic()
        try:
            run = as_run(self._monitor)
            display.show(take_snapshot(run, self._verdict, running=running), run)
        except Exception as error:
            self._display = None
            warn(f"the display failed: {error!r}")
        taken = time.monotonic() - began
        self._show_after = time.monotonic() + min(max(0.5, _SHARE * taken), _LONGEST_S)


def check(live: bool | str, on_finding: OnFinding | None) -> None:
    """Refuse an unknown display or action with a ValueError."""
    if live not in (True, False, *DISPLAYS):
        raise ValueError(unknown("display", str(live), DISPLAYS).message)
    if isinstance(on_finding, str) and on_finding not in ACTIONS:
        raise ValueError(unknown("action", on_finding, ACTIONS).message)


def follow(
    monitor: "Monitor", *, live: bool | str = False, on_finding: OnFinding | None = None
) -> None:
    """Follow a monitor, as `attach(live=..., on_finding=...)` says."""
    display: Display | None = None
    if live == "http":
        from resdiag.live.process import Page

        display = Page()
    elif live:
        from resdiag.live.panel import open_panel

        display = open_panel()
    follower = Follower(monitor, on_finding, display)
    monitor.add_follower(follower, follower.close)


def _action(on_finding: OnFinding | None) -> Callable[[Finding], object] | None:
    return {"warn": _warn, "stop": _stop}[on_finding] if isinstance(on_finding, str) else on_finding


def _warn(finding: Finding) -> None:
    warn(f"{finding.name}: {finding.summary}")


def _stop(finding: Finding) -> None:
    if not FINDINGS[finding.name].is_condition:
        raise StopTraining(finding)
