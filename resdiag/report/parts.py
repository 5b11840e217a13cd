"""What a page is made of, apart from how it is written: HTML, Markdown and docs say the same."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from resdiag.report.heatmap import HeatMap
from resdiag.report.svg import refine


@dataclass(frozen=True)
class Mark:
    """A word in a table that has a colour and a sign, too.

    Attributes:
        text: The word.
        kind: "good", "bad", "open" or "plain".
        note: More words after it.
    """

    text: str
    kind: str
    note: str = ""

    @property
    def sign(self) -> str:
        """A sign that tells kinds apart without colour."""
        return {"good": "✓", "bad": "✗", "open": "?"}.get(self.kind, "")

    def __str__(self) -> str:
        words = f"{self.sign} {self.text}".strip()
        return f"{words}: {self.note}" if self.note else words


Entry: TypeAlias = str | Mark


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with a caption.

    Attributes:
        caption: What it shows.
        header: Names of the columns.
        rows: Their cells; the first one names the row.
        numeric: Columns that are set to the right.
        note: What is the same in every row, and therefore no column.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    numeric: Sequence[int] = ()
    note: str = ""

    def without_constants(self, kept: int) -> "Table":
        """The same with the columns that are the same in every row in a note; not those of dashes.

        Args:
            kept: Columns at the left that stay.
        """
        if len(self.rows) < 2:
            return self
        shown = list(range(kept))
        said = []
        for place, name in enumerate(self.header[kept:], start=kept):
            entries = {str(row[place]) for row in self.rows}
            if len(entries) > 1:
                shown.append(place)
            elif entries != {"-"}:
                said.append(f"{name}: {entries.pop()}")
        return replace(
            self,
            header=[self.header[place] for place in shown],
            rows=[[row[place] for place in shown] for row in self.rows],
            numeric=[new for new, place in enumerate(shown) if place in self.numeric],
            note=f"In every row: {'; '.join(said)}." if said else "",
        )


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Lines as they are typed or stored."""

    lines: str
    language: str = "sh"


@dataclass(frozen=True)
class Folded:
    """Parts that the reader can unfold.

    Attributes:
        title: The line that is always visible.
        parts: What is shown.
        bulky: Whether a short form of the page leaves them out.
    """

    title: str
    parts: "Sequence[Part]"
    bulky: bool = False


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One drawing of a figure.

    Attributes:
        number: Of the figure in the study file, from 1.
        name: Name of its files.
        title: Above it.
        question: What it answers.
        reading: What to read in it.
        svg: What matplotlib wrote; None if it could not be drawn.
        pdf: The same as PDF.
        csv: Its data.
        table: A few of its numbers, for who cannot see it.
        reason: Why it could not be drawn.
        depth: Of the deepest network in it.
    """

    number: int
    name: str
    title: str
    question: str
    reading: str
    svg: bytes | None = None
    pdf: bytes = b""
    csv: str = ""
    table: Table | None = None
    reason: str = ""
    depth: int = 0

    def description(self) -> str:
        """What a figure shows, for who cannot see it."""
        return f"{self.question} Read: {self.reading} The table below has its numbers."

    def inline(self, styles: Any) -> str:  # noqa: ANN401
        """The figure for a page whose style sheet `styles` collects."""
        assert self.svg is not None
        drawn = refine(
            self.svg,
            prefix=f"p{re.sub(r'[^0-9a-z]', '', self.name)}x",
            title=self.title,
            description=self.description(),
            styles=styles,
        )
        # where it is lower than its place, it begins where the text does
        return drawn.replace("<svg ", '<svg preserveAspectRatio="xMinYMin" ', 1)

    def file(self) -> str:
        """The figure as a file of its own."""
        assert self.svg is not None
        return refine(self.svg, prefix="f", title=self.title, description=self.description())


Part: TypeAlias = Table | Text | Bullets | Code | Folded | Picture


@dataclass(frozen=True, kw_only=True)
class Section:
    """A chapter of the page.

    Attributes:
        id: Its anchor.
        title: Its heading.
        parts: What is in it.
    """

    id: str
    title: str
    parts: Sequence[Part]


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole report.

    Attributes:
        name: Of the study, or of the run.
        about: What has that name, e.g. "a study".
        question: What was asked.
        headline: The answer in one sentence.
        found: What came out.
        sure: How sure that is.
        expected: How many expected values are met, and which ones are not.
        claim: What was expected, and whose claim that is.
        sections: The rest.
        made: With what it was made; empty for pages that are compared.
        table: The numbers that answer the question.
        key: The figure that shows the answer.
        heat_maps: Runs whose metrics can be looked at cell by cell, by block and step.
    """

    name: str
    question: str
    headline: str
    found: Sequence[str]
    sure: Sequence[str]
    claim: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    made: str = ""
    about: str = "a study"
    table: Table | None = None
    key: Picture | None = None
    expected: Sequence[str] = ()
    heat_maps: Sequence[HeatMap] = ()
