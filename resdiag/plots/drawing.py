"""`draw` a plot of one run or several, `save` it as SVG, PNG or PDF.

matplotlib is imported by the first `draw`, so that a usage error stays fast.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from resdiag.errors import UsageError, unknown
from resdiag.plots.kinds import KINDS as KINDS
from resdiag.plots.kinds import find_kind
from resdiag.runs.files import make_folder, write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from resdiag.plots.view import View
    from resdiag.runs.folder import Run
    from resdiag.watch.loop.monitor import Monitor

    Source: TypeAlias = Run | Monitor | str | os.PathLike[str]

FORMATS = ("svg", "png", "pdf")
"""File formats that `save` writes."""

_LETTERS: Any = {"svg.fonttype": "none", "pdf.fonttype": 3}  # matplotlib types keys one by one


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
    from resdiag.runs.watched import opened as as_opened

    listed: Sequence[Source] = (
        [runs] if isinstance(runs, str) else (runs if isinstance(runs, Sequence) else [runs])
    )
    opened = [as_opened(run) for run in listed]
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


def render(figure: "Figure", file_format: str, *, letters: bool = False) -> bytes:
    """The bytes of a figure's file: the same figure gives the same bytes, without a date.

    Args:
        figure: What `draw` returned.
        file_format: One of `FORMATS`.
        letters: Words of an SVG as letters in the reader's font, to be found and read aloud, and
            not as outlines; of a PDF in a font that takes a third less time to write.

    Raises:
        UsageError: `file_format` is not one of `FORMATS`.
    """
    if file_format not in FORMATS:
        raise unknown("format", file_format, FORMATS)
    import matplotlib as mpl
    from matplotlib.backend_bases import get_registered_canvas_class

    from resdiag.plots.style import PIXELS_PER_INCH, look

    about: dict[str, str | None] = {"Title": str(figure.get_label())}
    about |= {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(file_format, {})
    buffer = io.BytesIO()
    before = figure.dpi
    with look(), mpl.rc_context(_LETTERS if letters else None):
        try:
            figure.dpi = PIXELS_PER_INCH
            # not `savefig`, which draws twice: once to lay out, and the layout is frozen
            canvas: Any = get_registered_canvas_class(file_format)(figure)
            getattr(canvas, f"print_{file_format}")(buffer, metadata=about)
        finally:
            figure.dpi = before
    return buffer.getvalue()


def save(figure: "Figure", stem: Path, formats: Sequence[str] = ("svg",)) -> list[Path]:
    """Write a figure once per format as `stem.<format>`; a file appears whole or not at all.

    Returns:
        The paths written, in the order of `formats`.

    Raises:
        UsageError: A format that is not one of `FORMATS`.
        StorageError: The folder cannot be written.
    """
    for name in formats:
        if name not in FORMATS:
            raise unknown("format", name, FORMATS)
    # not with_suffix: a stem such as "lr0.1" has a dot that does not begin a suffix
    paths = [stem.with_name(f"{stem.name}.{name}") for name in formats]
    make_folder(stem.parent)
    for path, name in zip(paths, formats, strict=True):
        write_file(path, render(figure, name))
    return paths
