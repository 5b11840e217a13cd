"""One table of rows by name, for everything that a package outside of resdiag can add to."""

import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import entry_points
from typing import TypeVar

from resdiag.errors import UsageError, unknown

Row = TypeVar("Row")

EXTENSIONS = "resdiag.extensions"
"""Entry points of other packages: modules that register rows when they are imported."""


class RegistrationError(UsageError, ValueError):
    """A row that cannot be added or removed."""


class Registry(Mapping[str, Row]):
    """Rows by name: the built-in ones in their order, then those added in this process.

    Args:
        kind: What a row is, for messages.
        rows: The built-in ones.
        key: The attribute that is a row's name.
        letters: What a name may have behind its first letter, as in a regular expression.
    """

    def __init__(
        self, kind: str, rows: Iterable[Row], *, key: str = "name", letters: str = "a-z0-9_"
    ) -> None:
        self._kind, self._key, self._letters = kind, key, letters
        self._rows: dict[str, Row] = {getattr(row, key): row for row in rows}
        self._built_in = frozenset(self._rows)

    def __getitem__(self, name: str) -> Row:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def is_built_in(self, name: str) -> bool:
        """Whether a row of that name came with resdiag."""
        return name in self._built_in

    def add(self, row: Row, *, before: str = "", taken: Collection[str] = ()) -> None:
        """Add a row.

        Args:
            row: It.
            before: The row that it stands before; "" for the end.
            taken: Names that it may not have, beside those of the table.

        Raises:
            RegistrationError: Its name is taken or cannot be one, or `before` is unknown.
        """
        name = getattr(row, self._key)
        if not re.fullmatch(f"[a-z][{self._letters}]*", name):
            raise RegistrationError(
                f"{self._kind} '{name}' must begin with a-z and be of {self._letters}"
            )
        if name in self or name in taken:
            raise RegistrationError(f"{self._kind} '{name}' exists already: choose another name")
        if before and before not in self:
            raise RegistrationError(unknown(self._kind, before, self).message)
        rows = list(self._rows.items())
        at = list(self).index(before) if before else len(rows)
        self._rows = dict([*rows[:at], (name, row), *rows[at:]])

    def remove(self, name: str) -> None:
        """Remove a row that was added.

        Raises:
            RegistrationError: It is built in, or there is none.
        """
        if name not in self:
            raise RegistrationError(unknown(self._kind, name, self).message)
        if self.is_built_in(name):
            raise RegistrationError(f"{self._kind} '{name}' is part of resdiag and stays")
        self._rows = {known: row for known, row in self._rows.items() if known != name}

    @contextmanager
    def added(self, row: Row) -> Iterator[None]:
        """Have a row while inside, for tests; it takes the place of one of the same name."""
        before, name = self._rows, getattr(row, self._key)
        if name in before:
            self._rows = {**before, name: row}
        else:
            self.add(row)
        try:
            yield
        finally:
            self._rows = before


@cache
def load_extensions() -> None:
    """Import what installed packages add to resdiag, once in a process.

    The commands and the processes of a study do so; a script imports what it needs. An extension
    that fails is named on stderr, and the others are loaded.
    """
    for extension in sorted(entry_points(group=EXTENSIONS), key=lambda point: point.name):
        try:
            extension.load()
        except Exception as error:  # somebody else's package must not end the command
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            owner = extension.dist.name if extension.dist else extension.value
            print(f"resdiag: extension '{extension.name}' of {owner}: {reason}", file=sys.stderr)
