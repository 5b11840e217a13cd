"""`draw` a plot of one run or several.

matplotlib is imported by the first `draw`, so that a usage error stays fast.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from resdiag.errors import UsageError
from resdiag.plots.kinds import KINDS as KINDS
from resdiag.plots.kinds import find_kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from resdiag.plots.view import View
    from resdiag.runs.watched import Source


def draw(
    kind: str,
    runs: "Sequence[Source] | Source",
    *,
    step: int | None = None,
    theory: bool = True,
) -> "Figure":
    """Draw one kind of plot; several runs are compared on the same axes.

    Args:
        kind: A kind of plot, built in or registered, or the id of any metric per block, built in
            or custom.
        runs: A run, a monitor or the folder of a run, or several of them; runs that differ in their
            seed only are drawn as a band.
        step: Recorded step to show by block; None shows the first and the last ones.
        theory: Overlay the prediction where there is one.

    Returns:
        A figure 7 inches wide that belongs to no pyplot state; a notebook shows it. Its label is
        its title.

    Raises:
        UsageError: Unknown kind, no run, a run without records, without a metric that the plot
            needs, without the step asked for, or nothing that the plot could show.
    """
    from resdiag.runs.watched import load_runs

    opened = load_runs(runs)
    entry = find_kind(kind, [metric for run in opened for metric in run.custom_metrics])
    if not opened:
        raise UsageError(f"plot '{kind}' needs a run", "resdiag run --variant elu_pre --depth 20")
    from resdiag.plots.grouping import open_view

    return draw_view(open_view(entry, opened, step=step, theory=theory))


def draw_view(view: "View") -> "Figure":
    """Draw what was opened, as the kind of plot that it was opened for; as `draw` does."""
    from resdiag.plots.sheet import freeze_layout
    from resdiag.plots.style import look

    with look():
        figure = view.kind.draw(view)
        freeze_layout(figure)
    return figure
