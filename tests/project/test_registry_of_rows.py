"""The table of rows that other packages can add to: order, names, what stays."""

from dataclasses import dataclass

import pytest

from resdiag.errors import UsageError
from resdiag.registry import RegistrationError, Registry


@dataclass(frozen=True)
class Row:
    name: str
    value: int = 0


@pytest.fixture
def table():
    return Registry("thing", (Row("a"), Row("b")))


def test_added_rows_stand_behind_or_before_another_and_go_again(table):
    table.add(Row("c"))
    table.add(Row("d"), before="b")
    assert list(table) == ["a", "d", "b", "c"]
    assert table["d"] == Row("d")
    assert [name for name in table if table.is_built_in(name)] == ["a", "b"]
    table.remove("d")
    assert list(table) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("row", "more", "words"),
    [
        (Row("a"), {}, "thing 'a' exists already"),
        (Row("e"), {"taken": ("e",)}, "thing 'e' exists already"),
        (Row("E"), {}, "thing 'E' must begin with a-z"),
        (Row("e-f"), {}, "must begin with a-z and be of a-z0-9_"),
        (Row(""), {}, "must begin with a-z"),
        (Row("e"), {"before": "bb"}, "unknown thing 'bb'; did you mean 'b'"),
    ],
)
def test_a_row_that_cannot_be_added_changes_nothing(table, row, more, words):
    with pytest.raises(RegistrationError, match=words):
        table.add(row, **more)
    assert list(table) == ["a", "b"]


def test_a_built_in_row_stays_and_an_unknown_one_is_named(table):
    with pytest.raises(UsageError, match="'a' is part of resdiag and stays"):
        table.remove("a")
    with pytest.raises(ValueError, match="unknown thing 'aa'; did you mean 'a'"):
        table.remove("aa")


def test_a_row_is_there_while_it_is_asked_for_also_after_an_error(table):
    def fail():
        with table.added(Row("a", 1)), table.added(Row("c")):
            assert table["a"].value == 1
            assert list(table) == ["a", "b", "c"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(table) == ["a", "b"]
    assert table["a"].value == 0


def test_letters_of_a_name_can_be_more(table):
    wider = Registry("thing", (), letters="a-z0-9_-")
    wider.add(Row("e-f"))
    assert list(wider) == ["e-f"]
