"""What a page is made of, apart from how it is written: HTML, Markdown and docs say the same."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from resdiag.report.figures import Picture


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
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    numeric: Sequence[int] = ()


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
    """Parts that are shown when they are asked for.

    Attributes:
        title: What is asked for.
        parts: What is shown.
        bulky: Whether a short form of the page leaves them out.
    """

    title: str
    parts: "Sequence[Part]"
    bulky: bool = False


@dataclass(frozen=True)
class Image:
    """A figure with its table."""

    picture: "Picture"
    table: Table | None = None


Part: TypeAlias = Table | Text | Bullets | Code | Folded | Image


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
        claim: What was expected, and whose claim that is.
        sections: The rest.
        made: With what it was made.
    """

    name: str
    question: str
    headline: str
    found: Sequence[str]
    sure: Sequence[str]
    claim: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    made: str = field(default="")
    about: str = "a study"
    table: Table | None = None
