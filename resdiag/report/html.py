"""A report as one HTML file: every value escaped, no script, no request, a strict policy."""

import base64
import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from resdiag.report.figures import Picture
from resdiag.report.parts import Folded, Image, Page, Part
from resdiag.report.svg import Styles

_TEMPLATES = Path(__file__).parent / "templates"
MOST_BYTES = 1_700_000
"""Of drawings in the page; what would go beyond is left to its own file."""


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined
    )


def to_html(page: Page) -> str:
    """Write a page as HTML that needs nothing but itself.

    The content security policy allows the one style sheet, by its hash, and pictures inside the
    page; scripts, frames, forms and every request are refused.
    """
    styles, drawings, size = Styles(), dict[str, Markup](), 0
    for picture in _pictures([part for section in page.sections for part in section.parts]):
        drawing = picture.inline(styles)
        if size + len(drawing) <= MOST_BYTES:
            size += len(drawing)
            drawings[picture.name] = Markup(drawing)  # written by ElementTree
    css = f"{(_TEMPLATES / 'report.css').read_text('utf-8')}\n{styles.css()}\n"
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    template = _environment().get_template("report.html")
    return template.render(page=page, css=Markup(css), policy=Markup(policy), drawings=drawings)


def _pictures(parts: "list[Part]") -> Iterator[Picture]:
    """The figures in the order in which they are seen first: those that are not folded."""
    for part in parts:
        if isinstance(part, Image):
            yield part.picture
    for part in parts:
        if isinstance(part, Folded):
            yield from _pictures(list(part.parts))
