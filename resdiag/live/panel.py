"""A training in a few lines: a panel under a terminal's output, below a notebook's cell, or lines.

The same panel shows runs on disk, see `resdiag watch`.
"""

import io
import math
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from resdiag.live.runs import FollowedRuns, Seen
from resdiag.live.snapshot import Snapshot
from resdiag.runs.folder import Run
from resdiag.study.live import BARS, BROKEN, draw_strip
from resdiag.terminal import STYLES, can_redraw, open_console

_LINE_EVERY_S = 10.0
_MOST_FINDINGS = 6
_PANEL_HEIGHT = 9
_WIDEST = 120


class TerminalPanel:
    """A panel that stays below what the loop prints."""

    def __init__(self, console: Console | None = None) -> None:
        self._live = Live(console=console or open_console(sys.stderr), auto_refresh=False)
        self._live.start()

    def show(self, snapshot: Snapshot, run: Run) -> None:
        """Draw the panel anew."""
        self._live.update(draw_panel(snapshot, self._live.console.width), refresh=True)

    def close(self) -> None:
        """Leave the last panel where it is."""
        self._live.stop()


class NotebookPanel:
    """A panel below a notebook's cell."""

    def __init__(self) -> None:
        from IPython.display import HTML, display

        self._html: Any = HTML
        self._handle: Any = display(HTML(""), display_id=True)

    def show(self, snapshot: Snapshot, run: Run) -> None:
        """Replace the panel."""
        self._handle.update(self._html(to_html(snapshot)))

    def close(self) -> None:
        """The last panel stays in the notebook."""


class LogLines:
    """For a pipe: each finding once, and how it goes every ten seconds."""

    def __init__(self, name: str = "resdiag: ") -> None:
        self._name = name
        self._said: set[str] = set()
        self._last = time.monotonic()

    def show(self, snapshot: Snapshot, run: Run) -> None:
        """Print what is new."""
        for line in snapshot.findings:
            name = line.partition(":")[0]
            if name not in self._said:
                self._said.add(name)
                self._print(line)
        if time.monotonic() - self._last >= _LINE_EVERY_S or snapshot.status != "running":
            self._last = time.monotonic()
            self._print("  ".join(_head(snapshot)))

    def close(self) -> None:
        """Nothing is left to end."""

    def _print(self, line: str) -> None:
        print(f"{self._name}{line}", file=sys.stderr, flush=True)


def open_panel() -> TerminalPanel | NotebookPanel | LogLines:
    """The panel that fits: in a notebook, on a terminal, or in a pipe."""
    if _is_notebook():
        return NotebookPanel()
    return TerminalPanel() if can_redraw(sys.stderr) else LogLines()


def draw_panel(snapshot: Snapshot, width: int, name: str = "") -> Panel:
    """The panel of one training, at most `width` columns wide.

    Args:
        snapshot: How it stands.
        width: Columns of the terminal.
        name: Of the run, where its network alone does not tell it apart from others.
    """
    inner = max(20, min(width, _WIDEST) - 4)
    head = Text("   ".join(_head(snapshot)))
    head.highlight_words([snapshot.status], STYLES.get(snapshot.status, ""))
    parts: list[RenderableType] = [head]
    if snapshot.losses:
        parts.append(Text("loss " + _curve([loss for _, loss in snapshot.losses], inner - 5)))
    if snapshot.gradients:
        blocks = f"blocks 0 to {len(snapshot.gradients) - 1}"
        parts.append(Text(f"gradient norm at the output of {blocks}, and its span in decades"))
        parts.append(Text(draw_strip(snapshot.gradients, inner, inner)))
    if snapshot.worst:
        parts.append(Text(f"most changed: {snapshot.worst}"))
    shown = snapshot.findings[:_MOST_FINDINGS]
    parts += [
        Text(f"! {line}", style=STYLES["fault"], overflow="ellipsis", no_wrap=True)
        for line in shown
    ]
    if more := len(snapshot.findings) - len(shown):
        parts.append(Text(f"and {more} more"))
    if snapshot.verdict and not shown:
        going = snapshot.status in ("new", "running")
        parts.append(Text(f"verdict{' so far' * going}: {snapshot.verdict}"))
    title = Text("  ".join(filter(None, ["resdiag", name, snapshot.label])))
    return Panel(Group(*parts), title=title, title_align="left", width=min(width, _WIDEST))


def to_html(snapshot: Snapshot) -> str:
    """The panel as HTML, for a notebook."""
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
    console.print(draw_panel(snapshot, 100))
    template = "<pre style='line-height:1.25;font-family:monospace'>{code}</pre>"
    return console.export_html(inline_styles=True, code_format=template)


def follow_runs(runs: FollowedRuns, every: float) -> None:
    """Show runs on disk until all have ended: a panel for each, or lines in a pipe.

    Args:
        runs: What is followed.
        every: Seconds between two looks.
    """
    if not can_redraw(sys.stderr):
        lines: dict[str, LogLines] = {}
        while not _have_ended(found := runs.look()):
            for one in found:
                name = f"{one.name}: " if len(found) > 1 else ""
                lines.setdefault(one.name, LogLines(name)).show(one.snapshot, one.run)
            time.sleep(every)
        for one in found:
            name = f"{one.name}: " if len(found) > 1 else ""
            lines.setdefault(one.name, LogLines(name)).show(one.snapshot, one.run)
        return
    with Live(console=open_console(sys.stderr), auto_refresh=False) as live:
        while True:
            found = runs.look()
            live.update(_draw_all(found, live.console), refresh=True)
            if _have_ended(found):
                return
            time.sleep(every)


def draw_one(one: Seen, width: int, count: int) -> Panel:
    """The panel of one of `count` runs: with its name if it is not alone."""
    return draw_panel(one.snapshot, width, one.name if count > 1 else "")


def _draw_all(found: Sequence[Seen], console: Console) -> RenderableType:
    """As many panels as the terminal is high, the newest run first."""
    if not found:
        return Text("waiting for the first commit of a run")
    shown = found[: max(1, console.height // _PANEL_HEIGHT)]
    parts: list[RenderableType] = [draw_one(one, console.width, len(found)) for one in shown]
    more = len(found) - len(shown)
    return Group(*parts, *([Text(f"and {more} more runs")] if more else []))


def _have_ended(found: Sequence[Seen]) -> bool:
    return bool(found) and all(one.snapshot.status not in ("new", "running") for one in found)


def _head(snapshot: Snapshot) -> list[str]:
    """Status, step and loss, in words."""
    words = [] if snapshot.status == "running" else [snapshot.status]
    total = f" of {snapshot.steps}" if snapshot.steps else ""
    words.append(f"step {snapshot.step}{total}" if snapshot.step >= 0 else "no step recorded yet")
    if snapshot.losses:
        known = snapshot.losses[-1][0]
        since = f" at step {known}" if known < snapshot.step else ""
        words.append(f"loss {snapshot.loss:.4g}{since}")
    return words


def _curve(losses: Sequence[float], width: int) -> str:
    """The losses as bars: the mean of each stretch, on a linear axis."""
    count = min(width, len(losses))
    edges = [i * len(losses) // count for i in range(count + 1)]
    parts = [losses[a:b] for a, b in pairwise(edges)]
    means = [sum(part) / len(part) for part in parts]
    known = [mean for mean in means if math.isfinite(mean)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    scale = 7 / (high - low or 1.0)
    return "".join(BARS[round(scale * (x - low))] if math.isfinite(x) else BROKEN for x in means)


def _is_notebook() -> bool:
    """Whether this Python is the kernel of a notebook."""
    shell: Any = sys.modules.get("IPython")
    running = shell.get_ipython() if shell is not None else None
    return running is not None and hasattr(running, "kernel")
