"""A report as Markdown: `report.md`, and the pages of the documentation."""

import re
from collections.abc import Iterable, Iterator, Sequence

from resdiag.report.parts import Bullets, Code, Image, Page, Part, Table, Text

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
    lines += _table(page.table) if page.table else []
    lines += [f"- {escape(line)}" for line in page.found]
    lines += ["", "How sure:", "", *(f"- {escape(line)}" for line in page.sure), ""]
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
        elif isinstance(part, Image):
            yield from _image(part, figures, bulky)
        elif bulky or not part.bulky:
            yield from _parts(part.parts, figures, bulky)


def _table(table: Table) -> Iterator[str]:
    rule = ["---:" if place in table.numeric else "---" for place in range(len(table.header))]
    yield from (f"**{escape(table.caption)}**", "")
    yield _row(map(escape, table.header))
    yield _row(rule)
    for row in table.rows:
        yield _row(escape(str(cell)) for cell in row)
    yield ""


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _image(image: Image, figures: str, bulky: bool) -> Iterator[str]:
    picture = image.picture
    yield from (f"![{escape(picture.title)}]({figures}/{picture.name}.svg)", "")
    yield from (escape(f"{picture.title}. Read: {picture.reading}"), "")
    if bulky and image.table:
        yield from _table(image.table)
