"""What a study may set for its cells: the fields of a `Request`, each with its type and its range.

No torch here: a study is read, checked, expanded and planned without it.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model
from pydantic_core import PydanticCustomError

from resdiag.data.registry import find_dataset
from resdiag.errors import UsageError
from resdiag.models.variants import count_blocks, find_variant
from resdiag.runs.config import check_value, row_of, value_type
from resdiag.training.recipe import Request

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
MOST_TEXT = 4000

_FIELDS = {entry.name: entry for entry in fields(Request) if row_of(entry).in_studies}
SETTINGS = tuple(_FIELDS)
"""What `[fixed]` and `[grid]` may name: all of a `Request` but the seed and the device."""


def refuse(text: str) -> PydanticCustomError:
    """A complaint that pydantic collects with the others, in our words."""
    return PydanticCustomError("resdiag", "{text}", {"text": text})


def passing(check: Callable[[Any], Any]) -> AfterValidator:
    """A validator that says what a `UsageError` says."""

    def validate(value: Any) -> Any:  # noqa: ANN401
        try:
            return check(value)
        except UsageError as error:
            raise refuse(error.message) from None

    return AfterValidator(validate)


def _check_text(text: str) -> str:
    """Words for people: bounded, and nothing in it that a terminal would obey."""
    if len(text) > MOST_TEXT:
        raise UsageError(f"longer than {MOST_TEXT} characters")
    bad = next((c for c in text if not c.isprintable() and c not in "\n\t"), None)
    if bad is not None:
        raise UsageError(f"holds the control character {bad!r}")
    return text.strip()


Text = Annotated[str, passing(_check_text)]


def _check_data(spec: str) -> str:
    """A set's name or a path; whether the path is there is seen where the cell runs."""
    if _check_text(spec) == "auto":
        raise UsageError("a study names its data: 'auto' may mean other data on another machine")
    find_dataset(spec, auto=False)
    return spec


def _check_depth(depth: int) -> int:
    if depth > _DEEPEST:
        raise UsageError(f"depth {depth} is more than {_DEEPEST}")
    count_blocks(depth)
    return depth


_DEEPEST = 9998  # 6n+2; tens of thousands of layers are a slip of the finger


def _check_setting(name: str, value: Any) -> Any:  # noqa: ANN401
    """The check of one setting; whether it fits the device is seen where the cell runs."""
    check_value(name, row_of(_FIELDS[name]), value)
    return value


def _one(name: str) -> Any:  # noqa: ANN401
    # no `| None`: it cannot be written in TOML
    checks: dict[str, Callable[[Any], Any]] = {
        "variant": lambda name: find_variant(_check_text(name)).id,
        "depth": _check_depth,
        "data": _check_data,
    }
    kind = value_type(_FIELDS[name])
    return Annotated[kind, passing(checks.get(name, partial(_check_setting, name)))]


def check_distinct(values: list[Any]) -> list[Any]:
    """Refuse a list that names a value twice: its cells would be the same ones."""
    for index, value in enumerate(values):
        if value in values[:index]:
            raise refuse(f"{value!r} is there twice")
    return values


_Several = AfterValidator(check_distinct)
_Listed = BeforeValidator(lambda value: value if isinstance(value, list) else [value])
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Table(BaseModel):
    """A table of a study file: its keys are what was written, no defaults."""

    model_config = STRICT

    @property
    def given(self) -> dict[str, Any]:
        """The keys that the file sets."""
        return {name: getattr(self, name) for name in sorted(self.model_fields_set)}


def _table(name: str, field: Callable[[str], Any], **more: Any) -> type[Table]:  # noqa: ANN401
    fields: Any = {key: (field(key), None) for key in SETTINGS}
    return create_model(name, __base__=Table, **fields, **more)


def _many(name: str, *more: Any) -> Any:  # noqa: ANN401
    # a list with a million entries is refused by its length, before each is looked at
    return Annotated[list[_one(name)], Field(min_length=1, max_length=1000), _Several, *more]  # type: ignore[misc]


_Seeds = Annotated[list[Seed], Field(min_length=1, max_length=1000), _Several, _Listed]

if TYPE_CHECKING:

    class Fixed(Table):
        """Settings with one value each."""

    class Grid(Table):
        """Settings with a list of values each."""

    class Filter(Table):
        """Settings, and the seed, with a value or a list of values each: which cells are meant."""

else:
    Fixed = _table("Fixed", _one)
    Grid = _table("Grid", _many)
    Filter = _table("Filter", lambda name: _many(name, _Listed), seed=(_Seeds, None))
