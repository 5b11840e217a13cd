"""A study file as plain data: parsed TOML, with `--set` applied."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from resdiag.errors import UsageError

MOST_BYTES = 1_000_000


class StudyError(UsageError):
    """A study file with mistakes.

    Args:
        problems: One line each: file, key, what is wrong, nearest match.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(
            "; ".join(problems), "" if len(problems) == 1 else f"{len(problems)} mistakes"
        )
        self.problems = tuple(problems)


def read_document(text: str | bytes, name: str) -> dict[str, Any]:
    """Parse TOML.

    Args:
        text: The content, as text or as UTF-8.
        name: What messages call the file.

    Raises:
        StudyError: Not TOML, too large or nested too deeply.
    """
    if len(text) > MOST_BYTES:
        raise StudyError([f"{name}: larger than {MOST_BYTES} bytes"])
    try:
        # some editors put a mark before the first letter
        words = text if isinstance(text, str) else text.decode("utf-8-sig")
        if _DEEP_KEY.search(words):  # the parser's time grows with the square of its parts
            raise RecursionError
        document = tomllib.loads(words)
        _refuse_huge(document, name)
        return document
    except UnicodeDecodeError:
        problem = "not UTF-8 text"
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:  # TOMLDecodeError, and numbers with thousands of digits
        problem = f"not TOML: {printable(str(error))}"
    raise StudyError([f"{name}: {problem}"]) from None


_DEEP_KEY = re.compile(r"""(?<![\w"'-])(?:[\w"'-]++[ \t]*+\.[ \t]*+){33}""")


def _refuse_huge(document: Mapping[str, Any], name: str) -> None:
    """Refuse integers that TOML has no room for, which Python reads but cannot even print."""
    left: list[tuple[str, Any]] = [(key, value) for key, value in document.items()]
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += [(f"{key}.{inner}", item) for inner, item in value.items()]
        elif isinstance(value, list):
            left += [(key, item) for item in value]
        elif isinstance(value, int) and value.bit_length() > 63:
            raise StudyError([f"{name}: {printable(key)}: an integer of more than 64 bits"])


def override(document: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A copy of a document with `--set table.key=value` applied, values written as in TOML.

    A bare word is taken for a text, as a shell takes the quotes away.

    Raises:
        StudyError: A setting is not of this form; all of them are named.

    >>> override({"fixed": {"lr": 0.1}}, ["fixed.lr=0.05", "fixed.data=digits", "seeds=[0, 1]"])
    {'fixed': {'lr': 0.05, 'data': 'digits'}, 'seeds': [0, 1]}
    """
    changed: dict[str, Any] = {
        key: dict(value) if isinstance(value, dict) else value for key, value in document.items()
    }
    problems = []
    for setting in settings:
        key, equals, text = setting.partition("=")
        *tables, last = (part.strip() for part in key.split("."))
        where = f"--set {printable(setting)}"
        if not equals or not last or len(tables) > 1:
            problems.append(f"{where}: write key=value or table.key=value")
            continue
        table = changed if not tables else changed.setdefault(tables[0], {})
        if not isinstance(table, dict):
            problems.append(
                f"{where}: '{printable(tables[0])}' is not a table with one value a key"
            )
            continue
        try:
            table[last] = _read_value(text)
        except StudyError as error:
            problems.append(f"{where}: {error.message}")
    if problems:
        raise StudyError(problems)
    return changed


def _read_value(text: str) -> object:
    """A TOML value, or a bare word."""
    try:
        document = read_document(f"value = {text}", "value")
    except StudyError:
        if text and all(char.isalnum() or char in "_-.:/~+" for char in text):
            return text
        raise
    if list(document) != ["value"]:
        raise StudyError(["more than one value"])
    return document["value"]


def printable(text: object) -> str:
    """Untrusted text as one short line without control characters."""
    line = "".join(char if char.isprintable() else " " for char in str(text))
    return line if len(line) <= 300 else line[:300] + "..."
