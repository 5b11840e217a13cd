"""`--mini`: any study in seconds on a CPU, to see that it is written as it was meant."""

from typing import Any

from resdiag.study.settings import Filter
from resdiag.study.spec import StudyFile

_DEPTHS = (8, 14)
_TINY: dict[str, Any] = {
    "data": "digits", "width": 0.25, "steps": 4, "batch_size": 16,
    "record_first": 4, "every": 1, "commit_every": 2,
}  # fmt: skip
_DROPPED = ("epochs", "warmup", "recipe", *_TINY)


def shrink(file: StudyFile) -> StudyFile:
    """The same study with every variant, two depths, one value of all else, and four steps.

    Published values do not hold for it, so none is expected.
    """
    depths = _depths(file)
    fixed = {key: value for key, value in file.fixed.given.items() if key not in _DROPPED}
    if "depth" in fixed:
        fixed["depth"] = depths[fixed["depth"]]
    grid = _shrink_lists(file.grid.given, depths)
    include = [_shrink_lists(more.given, depths) for more in file.include]
    small = {
        "question": file.question,
        "seeds": file.seeds[:1],
        "fixed": {**fixed, **_TINY},
        "grid": grid,
        "include": [more for more in include if more],
        "resources": file.resources.model_dump(),
        "figure": [
            {"plot": figure.plot, "title": figure.title}
            for figure in file.figure
            if not set(figure.cells.given) - {"variant"} and _meets(figure.cells, grid)
        ],
    }
    return StudyFile.model_validate({key: value for key, value in small.items() if value != {}})


def _depths(file: StudyFile) -> dict[int, int]:
    """The shallowest depth becomes 8, any other one 14."""
    lists = [file.grid.given, *(more.given for more in file.include)]
    found = {depth for given in lists for depth in given.get("depth", [])}
    found |= {file.fixed.given["depth"]} if "depth" in file.fixed.given else set()
    return {depth: _DEPTHS[depth != min(found)] for depth in found}


def _shrink_lists(given: dict[str, list[Any]], depths: dict[int, int]) -> dict[str, list[Any]]:
    small = {}
    for key, values in given.items():
        if key == "depth":
            small[key] = list(dict.fromkeys(depths[depth] for depth in values))
        elif key == "variant":
            small[key] = values
        elif key not in _DROPPED:
            small[key] = values[:1]
    return small


def _meets(cells: Filter, grid: dict[str, list[Any]]) -> bool:
    wanted = cells.given.get("variant")
    return wanted is None or bool(set(wanted) & set(grid.get("variant", [])))
