"""From a study file to its cells: products, more cells, fewer cells, each with its id."""

import functools
import itertools
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resdiag.errors import UsageError
from resdiag.runs.config import to_stored
from resdiag.runs.files import hash_json
from resdiag.study.document import StudyError
from resdiag.study.spec import MOST_MISTAKES, StudyFile
from resdiag.training.recipe import RECIPES, Request

MOST_CELLS = 10_000
FILTERED = ("figure", "expected")
"""Tables of a study file whose entries are about some of its cells."""


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
        id: `<variant>-d<depth>-s<seed>-<hash8>`; the hash is that of everything that decides the
            cell's numbers, so that an edited study never mixes with what was run before.
        request: What is to be run, on a device that the machine decides.
    """

    id: str
    request: Request

    def matches(self, wanted: Mapping[str, Any]) -> bool:
        """Whether every setting is one of those that a filter lists; an unset one is None."""
        return all(getattr(self.request, name) in values for name, values in wanted.items())


def expand(file: StudyFile, name: str) -> tuple[Cell, ...]:
    """The cells of a study, in the order of the file, each once.

    Args:
        file: What was checked.
        name: What messages call the file.

    Raises:
        StudyError: There is none, there are too many, settings contradict each other, or a figure
            or an expected value means no cell: most likely a slip.
    """
    cells = list_cells(file, name)
    _refuse(
        name,
        [
            f"{name}: [[{table}]] no. {index + 1} means no cell of the study: {_short(wanted)}"
            for table, index, wanted in find_unmatched(file, cells)
        ],
    )
    return cells


def list_cells(file: StudyFile, name: str) -> tuple[Cell, ...]:
    """The cells of a study, without checking its figures and expected values.

    Raises:
        StudyError: There is none, there are too many, or settings contradict each other.
    """
    _refuse_conflicts(file, name)
    asked = sum(math.prod(map(len, product.values())) for product in _products(file))
    if asked > MOST_CELLS:
        raise StudyError([f"{name}: {asked} cells; a study has at most {MOST_CELLS}"])
    cells: dict[str, Cell] = {}
    problems: list[str] = []
    for settings in _settings(file):
        request = Request(**settings)
        try:
            request.check_conflicts(device="auto")  # the machine's is not known yet
        except UsageError as error:
            problems.append(f"{name}: {_short(settings)}: {error.message}")
            continue
        cell = Cell(_name(request), request)
        if cells.setdefault(cell.id, cell).request != request:
            problems.append(f"{name}: {_short(settings)}: has the id of another cell, {cell.id}")
    if not cells and not problems:
        problems.append(f"{name}: no cells are left: 'exclude' takes all of them")
    _refuse(name, problems)
    return tuple(cells.values())


def _refuse(name: str, problems: Sequence[str]) -> None:
    """Raise what there is to complain of, each once, the first ones in full."""
    found = list(dict.fromkeys(problems))
    if found:
        more = [f"{name}: and {len(found) - MOST_MISTAKES} more mistakes"]
        raise StudyError([*found[:MOST_MISTAKES], *more[: len(found) > MOST_MISTAKES]])


def _refuse_conflicts(file: StudyFile, name: str) -> None:
    """A setting stands in one table; variant and depth must be somewhere."""
    twice = sorted(set(file.fixed.given) & set(file.grid.given))
    problems = [f"{name}: '{key}' stands in [fixed] and in [grid]" for key in twice]
    base = {**file.fixed.given, **file.grid.given}
    for key in ("variant", "depth"):
        if file.grid.given and key not in base:
            problems.append(f"{name}: '{key}' is missing in [fixed] and [grid]")
        problems += [
            f"{name}: [[include]] no. {i} {key} is missing, and [fixed] has none"
            for i, more in enumerate(file.include, 1)
            if key not in {**file.fixed.given, **more.given}
        ]
    if not file.grid.given and not file.include:
        problems.append(f"{name}: [grid] is missing, and there is no [[include]]")
    if problems:
        raise StudyError(problems)


def _products(file: StudyFile) -> Iterator[dict[str, list[Any]]]:
    """The grid, then what is included, as lists by setting; the seed varies fastest."""
    fixed = {key: [value] for key, value in file.fixed.given.items()}
    if file.grid.given:
        yield {**fixed, **_ordered(file.grid.given), "seed": file.seeds}
    for more in file.include:
        yield {**fixed, "seed": file.seeds, **more.given}


def _ordered(lists: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Variant first, then depth, then the rest by name: the order of a table that people read."""
    first = [key for key in ("variant", "depth") if key in lists]
    return {key: lists[key] for key in (*first, *sorted(set(lists) - set(first)))}


def _settings(file: StudyFile) -> Iterator[dict[str, Any]]:
    for number, product in enumerate(_products(file)):
        of_grid = number == 0 and bool(file.grid.given)
        for values in itertools.product(*product.values()):
            settings = dict(zip(product, values, strict=True))
            if not (of_grid and any(_holds(settings, rule.given) for rule in file.exclude)):
                yield settings


def _holds(settings: Mapping[str, Any], wanted: Mapping[str, list[Any]]) -> bool:
    return all(settings.get(name) in values for name, values in wanted.items())


def find_unmatched(
    file: StudyFile, cells: tuple[Cell, ...]
) -> list[tuple[str, int, dict[str, Any]]]:
    """Figures and expected values that mean no cell: table, index in it, filter."""
    filters = [
        (table, index, item.cells.given)
        for table in FILTERED
        for index, item in enumerate(getattr(file, table))
    ]
    index = _index(cells, {key for _, _, wanted in filters for key in wanted})
    every = (1 << len(cells)) - 1
    return [place for place in filters if not _find(index, place[2], every)]


def _index(cells: tuple[Cell, ...], keys: Iterable[str]) -> dict[str, dict[Any, int]]:
    """The cells with each value of each setting, a bit a cell, for thousands of filters."""
    index: dict[str, dict[Any, int]] = {key: {} for key in keys}
    for key, found in index.items():
        for number, cell in enumerate(cells):
            value = getattr(cell.request, key)
            found[value] = found.get(value, 0) | 1 << number
    return index


def _find(index: Mapping[str, Mapping[Any, int]], wanted: Mapping[str, Any], every: int) -> int:
    """The bits of the cells that a filter means."""
    found = every
    for key, values in wanted.items():
        found &= functools.reduce(operator.or_, (index[key].get(value, 0) for value in values))
    return found


def _short(settings: Mapping[str, Any]) -> str:
    words = ", ".join(f"{key} = {value!r}" for key, value in settings.items())
    return words if len(words) <= 200 else words[:200] + "..."


def _name(request: Request) -> str:
    """The id of a cell; equal for equal work on any machine."""
    # the numbers of the recipe too: a later version may have changed them under the same name
    # vars, not asdict: both are flat, and ten thousand cells are named in one go
    numbers = vars(RECIPES[request.recipe])
    what = {**to_stored(vars(request)), "device": "any", "numbers": numbers}
    variant = re.sub(r"\W", "_", request.variant, flags=re.ASCII)
    return f"{variant}-d{request.depth}-s{request.seed}-{hash_json(what)[:8]}"
