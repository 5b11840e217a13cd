"""A page as HTML and as Markdown."""

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from resdiag.report.heatmap import to_json
from resdiag.report.parts import Bullets, Code, Folded, Page, Part, Picture, Table, Text
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

    The content security policy allows the one style sheet and the one script of a heat map, by
    their hashes, and pictures inside the page; other scripts, frames, forms and every request are
    refused.
    """
    styles, drawings, size = Styles(), dict[str, Markup](), 0
    parts: list[Part] = [page.key] if page.key else []
    parts += [part for section in page.sections for part in section.parts]
    for picture in _pictures(parts):
        drawing = picture.inline(styles)
        if size + len(drawing) <= MOST_BYTES:
            size += len(drawing)
            drawings[picture.name] = Markup(drawing)  # written by ElementTree
    script = (_TEMPLATES / "heatmap.js").read_text("utf-8") if page.heat_maps else ""
    css = f"{(_TEMPLATES / 'report.css').read_text('utf-8')}\n{styles.css()}\n"
    allowed = f"script-src '{_digest(script)}'; " if script else ""
    policy = (
        f"default-src 'none'; style-src '{_digest(css)}'; {allowed}img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    template = _environment().get_template("report.html")
    return template.render(
        page=page,
        css=Markup(css),
        policy=Markup(policy),
        drawings=drawings,
        script=Markup(script),
        heat_data=Markup(to_json(page.heat_maps)),
    )


def _digest(text: str) -> str:
    """What a content security policy calls a style sheet or a script in the page."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _pictures(parts: "list[Part]") -> Iterator[Picture]:
    """The figures in the order in which they are seen first: those that are not folded."""
    for part in parts:
        if isinstance(part, Picture):
            yield part
    for part in parts:
        if isinstance(part, Folded):
            yield from _pictures(list(part.parts))


_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|$~^&])")


def to_markdown(
    page: Page, *, title: str = "", figures: str = "figures", bulky: bool = True
) -> str:
    """Write a page as Markdown.

    Args:
        page: The report.
        title: Instead of the question.
        figures: Folder of the figures, as seen from the file.
        bulky: Whether long tables are written: verdicts of all cells, numbers of figures.
    """
    lines = [f"# {escape(title or page.question)}", "", f"**{escape(page.headline)}**", ""]
    lines += _picture(page.key, figures, bulky) if page.key else []
    lines += _table(page.table) if page.table else []
    lines += [f"- {escape(line)}" for line in page.found]
    lines += ["", "How sure:", "", *(f"- {escape(line)}" for line in page.sure), ""]
    if page.expected:
        lines += ["What was expected:", "", *(f"- {escape(line)}" for line in page.expected), ""]
    for term, words in page.claim:
        lines += [f"{escape(term)}: {escape(words)}", ""]
    for section in page.sections:
        if parts := list(_parts(section.parts, figures, bulky)):
            lines += [f"## {escape(section.title)}", "", *parts]
    if page.made:
        lines += [escape(page.made), ""]
    return "\n".join(lines).rstrip() + "\n"


def escape(text: str) -> str:
    r"""Text in which Markdown and HTML find nothing to obey, on one line.

    >>> print(escape("a_b <script> [x](y)"))
    a\_b \<script\> \[x\](y)
    """
    line = " ".join(text.split())
    line = _SPECIAL.sub(r"\\\1", line)
    return re.sub(r"^(\d*)([-+=.)])(?=\s|$)", r"\1\\\2", line)


def _parts(parts: Sequence[Part], figures: str, bulky: bool) -> Iterator[str]:
    for part in parts:
        if isinstance(part, Text):
            yield from (escape(part.text), "")
        elif isinstance(part, Bullets):
            yield from (*(f"- {escape(item)}" for item in part.items), "")
        elif isinstance(part, Code):
            fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", part.lines)), default=0))
            yield from (f"{fence}{part.language}", part.lines, fence, "")
        elif isinstance(part, Table):
            yield from _table(part)
        elif isinstance(part, Picture):
            yield from _picture(part, figures, bulky)
        elif bulky or not part.bulky:
            yield from _parts(part.parts, figures, bulky)


def _table(table: Table) -> Iterator[str]:
    rule = ["---:" if place in table.numeric else "---" for place in range(len(table.header))]
    yield from (f"**{escape(table.caption)}**", "")
    if table.note:
        yield from (escape(table.note), "")
    yield _row(map(escape, table.header))
    yield _row(rule)
    for row in table.rows:
        yield _row(escape(str(cell)) for cell in row)
    yield ""


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _picture(picture: Picture, figures: str, bulky: bool) -> Iterator[str]:
    yield from (f"![{escape(picture.title)}]({figures}/{picture.name}.svg)", "")
    yield from (escape(f"{picture.title}. Read: {picture.reading}"), "")
    if bulky and picture.table:
        yield from _table(picture.table)
