"""The study file: one question as TOML, checked at the door, all mistakes at once."""

import difflib
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from resdiag.catalog.table import METRICS
from resdiag.errors import unknown
from resdiag.plots.kinds import KINDS
from resdiag.study.document import StudyError, printable
from resdiag.study.settings import (
    STRICT,
    Filter,
    Fixed,
    Grid,
    Seed,
    Text,
    check_distinct,
    passing,
    refuse,
)

MOST_MISTAKES = 50
OUTCOMES: Mapping[str, str] = {
    "status": "how the run ended: done or diverged",
    "verdict": "name of the verdict",
    "test_error": "test error at the end, a fraction",
    "best_test_error": "lowest test error of all epochs, a fraction",
    "train_error": "training error of the last epoch, a fraction",
    "first_nonfinite_step": "first step with a loss or gradient that is not finite",
}
"""What can be expected of a whole run; a metric's id is expected of a step and a block."""
WORDS = ("status", "verdict")
"""Outcomes that are words; the others are numbers."""


class Resources(BaseModel):
    """What one cell needs, and when to give it up.

    Attributes:
        threads: CPU threads; other numbers give other bits.
        gpus: GPUs, where there are any; 0.25 packs four cells on one.
        patience_s: Seconds without progress after which a cell counts as hung.
        restarts: Starts without progress after the first one.
    """

    model_config = STRICT
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    gpus: Annotated[float, Field(gt=0, le=1024)] = 1.0
    patience_s: Annotated[float, Field(ge=1, le=86400)] = 900.0
    restarts: Annotated[int, Field(ge=0, le=100)] = 2


class Figure(BaseModel):
    """One figure of the report.

    Attributes:
        plot: A kind of `resdiag plot`, or "activations": ReLU and ELU themselves.
        title: Words above it.
        cells: Which cells it shows; all if empty.
    """

    model_config = STRICT
    plot: Annotated[str, passing(lambda name: _known("plot", name, [*KINDS, "activations"]))]
    title: Text = ""
    cells: Filter = Filter()


class Expected(BaseModel):
    """A published or predicted value, to stand beside what came out.

    Attributes:
        cells: Which cells it is about.
        measure: One of `OUTCOMES`, or a metric's id.
        step: Step of a metric.
        block: Block of a metric: an index from the front, or from the end if negative.
        value: The number, or the word.
        tolerance: Largest distance from a number that counts as agreement.
        factor: Largest ratio that does, for numbers that span decades.
        source: Who says so, where. One that begins with "definition" says that it cannot be
            otherwise: it checks the program, and is counted apart.
    """

    model_config = STRICT
    cells: Filter = Filter()
    measure: Annotated[str, passing(lambda name: _known("measure", name, [*OUTCOMES, *METRICS]))]
    step: Annotated[int, Field(ge=0)] | None = None
    block: int | None = None
    value: float | Text
    tolerance: Annotated[float, Field(ge=0)] | None = None
    factor: Annotated[float, Field(ge=1)] | None = None
    source: Annotated[Text, Field(min_length=1)]

    @property
    def is_identity(self) -> bool:
        """Whether the value follows from the definition of what is measured."""
        return self.source.startswith("definition")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """A word is met or not, a number needs a tolerance, a metric a step and a block."""
        word = isinstance(self.value, str)
        if word != (self.measure in WORDS):
            raise refuse(f"{self.measure} is a {'number' if word else 'word'}, not {self.value!r}")
        if [self.tolerance, self.factor].count(None) != (2 if word else 1):
            raise refuse("a number has a tolerance or a factor, a word neither")
        metric = METRICS.get(self.measure) if self.measure not in OUTCOMES else None
        if (self.step is not None) != (metric is not None):
            raise refuse("a metric has a step, an outcome of the run has none")
        if (self.block is not None) != (metric is not None and metric.site != "run"):
            raise refuse("a metric of blocks has a block, and nothing else has one")
        return self


class StudyFile(BaseModel):
    """What a study file says.

    Attributes:
        question: What is asked, one sentence.
        expects: What is expected, before the first run.
        source: Whose question or claim it is.
        cost: How long it takes on what.
        seeds: Each cell of the grid is run with each of them.
        fixed: The same for every cell.
        grid: The cartesian product of these lists.
        include: More cells: products of their own, over `fixed`; one may name its own seeds.
        exclude: Cells of the grid that are left out.
        resources: What a cell needs.
        figure: Figures of the report.
        expected: What should come out.
    """

    model_config = STRICT
    question: Annotated[Text, Field(min_length=1)]
    expects: Text = ""
    source: Text = ""
    cost: Text = ""
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=1000), passing(check_distinct)] = [
        0
    ]
    fixed: Fixed = Fixed()
    grid: Grid = Grid()
    include: Annotated[list[Filter], Field(max_length=1000)] = []
    exclude: Annotated[list[Filter], Field(max_length=1000)] = []
    resources: Resources = Resources()
    figure: Annotated[list[Figure], Field(max_length=100)] = []
    expected: Annotated[list[Expected], Field(max_length=10_000)] = []


def check_document(document: Mapping[str, Any], name: str) -> StudyFile:
    """Check what was parsed.

    Raises:
        StudyError: With every mistake: file, key, what is wrong, nearest match.
    """
    problems = []
    try:
        file = StudyFile.model_validate(dict(document))
    except ValidationError as error:
        mistakes = error.errors()
        problems = [f"{name}: {_describe(dict(mistake))}" for mistake in mistakes[:MOST_MISTAKES]]
        if len(mistakes) > MOST_MISTAKES:
            problems.append(f"{name}: and {len(mistakes) - MOST_MISTAKES} more mistakes")
        raise StudyError(list(dict.fromkeys(problems))) from None
    except RecursionError:
        raise StudyError([f"{name}: nested too deeply"]) from None
    return file


# -- words for mistakes ----------------------------------------------------------------------------


def _known(kind: str, name: str, known: Any) -> str:  # noqa: ANN401
    if name not in known:
        raise unknown(kind, printable(name), known)
    return name


def _describe(mistake: Mapping[str, Any]) -> str:
    """One mistake as `[table] key[index] = value: what is wrong`."""
    loc, kind = tuple(mistake["loc"]), mistake["type"]
    if kind == "extra_forbidden":
        return _describe_unknown(loc)
    place = _place(loc)
    if kind == "missing":
        return f"{place} is missing"
    value = _show(mistake["input"])
    shown = f" = {printable(value)}" if value and kind != "too_long" else ""
    return f"{place}{shown}: {printable(_reword(mistake['msg']))}"


def _show(value: object) -> str:
    """A value as it was written, if short; letters that only look like others as their numbers."""
    if isinstance(value, dict):
        return ""
    text = reprlib.repr(value)
    return ascii(value) if isinstance(value, str) and len(value) < 40 else text


def _describe_unknown(loc: tuple[str | int, ...]) -> str:
    """An unknown key with the nearest one, also of another table."""
    *where, key = loc
    name, table = str(key), _TABLES[tuple(part for part in where if isinstance(part, str))]
    known = list(table.model_fields)
    words = f"{_place(tuple(where))} unknown key '{printable(name)}'".strip()
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"{words}; did you mean '{near[0]}'?"
    if name == "seed" and "seeds" not in known:
        return f"{words}; seeds stand at the top of the file: seeds = [0, 1, 2]"
    if name == "device":
        return f"{words}; the device is the machine's: --device"
    if not where and name in Fixed.model_fields:
        return f"{words}; did you mean 'fixed.{name}' or 'grid.{name}'?"
    return f"{words}; known: {', '.join(known)}"


_TABLES: Mapping[tuple[str, ...], type[BaseModel]] = {
    (): StudyFile,
    ("fixed",): Fixed,
    ("grid",): Grid,
    ("include",): Filter,
    ("exclude",): Filter,
    ("resources",): Resources,
    ("figure",): Figure,
    ("figure", "cells"): Filter,
    ("expected",): Expected,
    ("expected", "cells"): Filter,
}


def _place(loc: tuple[str | int, ...]) -> str:
    """Where a mistake is: ("grid", "depth", 2) is `[grid] depth[2]`.

    >>> _place(("grid", "depth", 2)), _place(("include", 0, "lr")), _place(("seeds",))
    ('[grid] depth[2]', '[[include]] no. 1 lr', 'seeds')
    """
    if not loc or (loc[0],) not in _TABLES:
        return _key(loc)
    table, rest = str(loc[0]), loc[1:]
    if rest and isinstance(rest[0], int):
        return f"[[{table}]] no. {rest[0] + 1} {_key(rest[1:])}".strip()
    return f"[{table}] {_key(rest)}".strip()


def _key(loc: Sequence[str | int]) -> str:
    text = ""
    for part in loc:
        if part in ("float", "int", "str") or str(part).startswith("function-"):
            continue  # the arm of a union, which the file knows nothing of
        text += f"[{part}]" if isinstance(part, int) else ("." if text else "") + printable(part)
    return text


_REWORDED = {
    "Input should be a valid integer": "must be a whole number",
    "Input should be a valid number": "must be a number",
    "Input should be a valid string": "must be a text",
    "Input should be a valid boolean": "must be true or false",
    "Input should be a valid list": "must be a list",
    "Input should be a finite number": "must be finite",
    "Input should be ": "must be ",
    "List should have at least 1 item after validation, not 0": "must not be empty",
    "String should have at least 1 character": "must not be empty",
}

_TOO_LONG = re.compile(r"List should have at most (\d+) items? after validation, not (\d+|more)")


def _reword(message: str) -> str:
    """Pydantic's sentence in the words of the other messages."""
    if message.startswith("Input should be a valid dictionary or instance"):
        return "must be a table"
    long = _TOO_LONG.fullmatch(message)
    if long:
        return f"at most {long[1]} are allowed, not {long[2]}"
    for theirs, ours in _REWORDED.items():
        message = message.replace(theirs, ours)
    return message
