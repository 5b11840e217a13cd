"""A figure as the bytes of a file, and as files: SVG, PNG or PDF."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resdiag.errors import unknown
from resdiag.runs.files import make_folder, write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("svg", "png", "pdf")
"""File formats that `save` writes."""

_LETTERS: Any = {"svg.fonttype": "none", "pdf.fonttype": 3}  # matplotlib types keys one by one


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
