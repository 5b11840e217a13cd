"""What one experiment found, and what follows from all of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One question that was put to the model and the batch.

    Attributes:
        name: For programs.
        title: The question in a few words.
        text: The answer with its numbers.
        numbers: The same for programs.
        lines: A small table, one line each; may be empty.
        reason: Why it was not done, or ""; then there are no numbers.
        shows: Faults that it shows: (name, sentence) each.
        rules_out: Causes that it rules out: (name, sentence) each.
        open: Remarks that prove nothing: (name, sentence) each.
    """

    name: str
    title: str
    text: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    reason: str = ""
    shows: tuple[tuple[str, str], ...] = ()
    rules_out: tuple[tuple[str, str], ...] = ()
    open: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Conclusion:
    """One thing that follows from the experiments.

    Attributes:
        kind: "shown" for a fault, "ruled out" for a cause that it is not, "open" for the rest.
        name: For programs, such as "rate_too_low".
        text: One or two sentences.
    """

    kind: str
    name: str
    text: str


def percent(share: float) -> str:
    """A share in percent with as many digits as matter.

    >>> percent(0.0312), percent(0.5)
    ('3.1 %', '50 %')
    """
    return f"{100 * share:.2g} %" if share < 0.095 else f"{100 * share:.0f} %"


def count(number: int, what: str) -> str:
    """A number and its noun.

    >>> count(1, "step"), count(3, "step")
    ('1 step', '3 steps')
    """
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def some(names: "list[str]", most: int = 4) -> str:
    """The first names of a list, and how many there are.

    >>> some(["a", "b", "c"], 2)
    'a, b, ... (3 in all)'
    """
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])}, ... ({len(names)} in all)"
