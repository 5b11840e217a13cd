"""The results of a study: a cell with its run and its outcomes, and cells that differ in seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from resdiag.report.outcomes import Outcome
from resdiag.study.grid import Cell
from resdiag.study.study import Study

if TYPE_CHECKING:
    from resdiag.runs.folder import Run

ENDED = ("done", "diverged")
"""States that are results."""
ONE_EPOCH = 1.0
"""Epochs below which an error answers no question that does not ask for it."""


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What is known of one cell.

    Attributes:
        cell: Its id and settings.
        state: One of `resdiag.study.ledger.STATES`.
        message: Why it failed.
        run: Its run with a few telling steps; None before there is one.
        outcomes: What it came to, see `resdiag.report.outcomes.measure`; empty without a run.
        thinned: Steps that one row of the curve stands for; 1 if all are there.
    """

    cell: Cell
    state: str
    message: str = ""
    run: "Run | None" = None
    outcomes: Mapping[str, Outcome]
    thinned: int = 1

    @property
    def ended(self) -> bool:
        """Whether it is a result."""
        return self.state in ENDED

    @property
    def data(self) -> str:
        """Name of its data: as the run knows it, else as the study file says it."""
        known = str(self.run.data.get("name", "")) if self.run else ""
        return known or self.cell.request.data

    def number(self, outcome: str) -> float:
        """One of its outcomes; NaN if it has none of that name, or a word."""
        value = self.outcomes.get(outcome, math.nan)
        return math.nan if isinstance(value, str) else value

    @property
    def epochs(self) -> float:
        """Epochs that it was trained for; 0 if that is not known."""
        curve = self.run.curve() if self.run else ()
        last = float(curve["epoch"].to_numpy()[-1]) if len(curve) else 0.0  # type: ignore[call-overload]
        return last if math.isfinite(last) else 0.0


@dataclass(frozen=True, kw_only=True)
class Group:
    """Cells with equal settings and different seeds.

    Attributes:
        settings: The settings that tell it from the other groups of the study.
        members: Its cells.
    """

    settings: Mapping[str, Any]
    members: Sequence[CellResult]

    @property
    def ended(self) -> list[CellResult]:
        """The members that are results."""
        return [member for member in self.members if member.ended]

    @property
    def test_errors(self) -> dict[int, float]:
        """The final test errors that are numbers, by seed."""
        found = {member.cell.request.seed: member.number("test_error") for member in self.ended}
        return {seed: error for seed, error in found.items() if math.isfinite(error)}

    @property
    def trained(self) -> bool:
        """Whether the first member that ended was trained for an epoch: errors mean something."""
        return bool(self.ended) and self.ended[0].epochs >= ONE_EPOCH


@dataclass(frozen=True, kw_only=True)
class Results:
    """A study with what its cells came to.

    Attributes:
        study: The study.
        cells: A result per cell, in the order of the study.
        source: Where they were read: the folder of the runs, or of the frozen results.
    """

    study: Study
    cells: Sequence[CellResult]
    source: str

    @property
    def runs(self) -> "list[Run]":
        """The runs of the cells that have one."""
        return [item.run for item in self.cells if item.run is not None]

    @cached_property
    def telling(self) -> list[str]:
        """Settings that differ between cells, the seed left out; variant and depth first."""
        settings = [_settings(item.cell) for item in self.cells]
        names = list(settings[0]) if settings else []
        found = [name for name in names if len({repr(one[name]) for one in settings}) > 1]
        return sorted(found, key=lambda name: name not in ("variant", "depth"))

    @cached_property
    def groups(self) -> list[Group]:
        """The cells by settings, in the order of the study."""
        return self.group(self.cells)

    def group(self, cells: Sequence[CellResult]) -> list[Group]:
        """Some of the cells by settings."""
        members: dict[str, list[CellResult]] = {}
        for item in cells:
            members.setdefault(repr(_settings(item.cell)), []).append(item)
        shown = self.telling or ["variant", "depth"]
        return [
            Group(settings={n: getattr(some[0].cell.request, n) for n in shown}, members=some)
            for some in members.values()
        ]

    def select(self, wanted: Mapping[str, Any]) -> list[CellResult]:
        """The cells that a filter of the study file means."""
        return [item for item in self.cells if item.cell.matches(wanted)]


def _settings(cell: Cell) -> dict[str, Any]:
    """Everything but seed and device."""
    return asdict(replace(cell.request, seed=0, device="any"))
