"""What a figure draws: runs as arrays (block x step), grouped into lines with label and look."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from resdiag.catalog.table import inputs_of
from resdiag.errors import UsageError
from resdiag.plots.names import block_names, block_parts
from resdiag.plots.plotkind import PlotKind
from resdiag.plots.style import Look, step_looks

if TYPE_CHECKING:
    import pandas as pd

    from resdiag.runs.folder import Run

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Record:
    """One run as arrays; rows are blocks, columns recorded steps."""

    run: "Run"
    metrics: "pd.DataFrame"
    curve: "pd.DataFrame"

    @cached_property
    def steps(self) -> NDArray[np.int64]:
        """Recorded steps, rising."""
        steps = self.metrics["step"].to_numpy(dtype=np.int64)
        return steps[:: self.n_blocks].copy() if self._whole else np.unique(steps)

    @cached_property
    def _whole(self) -> bool:
        """Whether the rows are all blocks of one step after the other: no search is needed then."""
        step, block = (self.metrics[name].to_numpy() for name in ("step", "block"))
        if not self.n_blocks or not len(step) or len(step) % self.n_blocks:
            return False
        steps, blocks = step.reshape(-1, self.n_blocks), block.reshape(-1, self.n_blocks)
        return bool(
            (blocks == np.arange(self.n_blocks)).all()
            and (steps == steps[:, :1]).all()
            and (np.diff(steps[:, 0]) > 0).all()
        )

    @property
    def n_blocks(self) -> int:
        """Blocks of the network."""
        return len(self.run.blocks)

    @cached_property
    def names(self) -> tuple[str, list[str]]:
        """The beginning that the modules of the blocks share, and the rest; of foreign models."""
        return ("", []) if self.run.config.depth else block_names(self.run.blocks)

    def block_words(self, block: int) -> str:
        """A block in a title: by its number, or by its module in a foreign model."""
        names = self.names[1]
        return f"block {names[block]}" if names else f"block {block}"

    @cached_property
    def parts(self) -> list[str]:
        """Whether each block is attention or MLP; empty if the blocks are of one sort."""
        return block_parts(self.run.blocks)

    @property
    def boundaries(self) -> list[int]:
        """Blocks at which a stage begins, the first left out."""
        stages = [block.get("stage", 0) for block in self.run.blocks]
        return [i for i in range(1, len(stages)) if stages[i] != stages[i - 1]]

    @cached_property
    def _grids(self) -> dict[str, Floats]:
        return {}

    def grid(self, metric: str) -> Floats:
        """Values by (block, step), not to be written to; NaN where the frame has none."""
        if metric not in self._grids:
            grid = self._grids[metric] = self._spread(metric)
            grid.flags.writeable = False
        return self._grids[metric]

    def _spread(self, metric: str) -> Floats:
        shape = self.n_blocks, len(self.steps)
        if metric not in self.metrics:
            return np.full(shape, np.nan)
        values = self.metrics[metric].to_numpy()
        if self._whole:
            return np.array(values.reshape(shape[::-1]).T, dtype=np.float64)
        out = np.full(shape, np.nan)
        rows = self.metrics["block"].to_numpy(dtype=np.int64)
        columns = np.searchsorted(self.steps, self.metrics["step"].to_numpy(dtype=np.int64))
        out[rows, columns] = values
        return out

    def unavailable(self, metric: str) -> list[dict[str, Any]]:
        """The declared reasons why `metric` or one of its inputs is missing."""
        wanted = inputs_of(metric) | {metric}
        return [item for item in self.run.unavailable if item["metric"] in wanted]

    def declared(self, metric: str) -> Bools:
        """Blocks for which the run says that `metric` cannot be had."""
        out = np.zeros(self.n_blocks, dtype=bool)
        for item in self.unavailable(metric):
            out[slice(None) if item["blocks"] == "all" else list(item["blocks"])] = True
        return out

    @cached_property
    def sick(self) -> Bools:
        """Cells (block, step) in which something non-finite was seen, or health is unknown."""
        shares = [c for c in self.metrics if str(c).endswith("_nonfinite")]
        out = np.zeros((self.n_blocks, len(self.steps)), dtype=bool)
        known = np.zeros_like(out)
        for name in map(str, shares):
            share = self.grid(name)
            known |= ~np.isnan(share)
            out |= share > 0
        for name in map(str, self.metrics.columns):
            if np.isinf(self.metrics[name].to_numpy()).any():
                out |= np.isinf(self.grid(name))
        return out | ~known

    def broken(self, metric: str) -> Bools:
        """Cells in which `metric` is non-finite, as opposed to not recorded.

        A NaN that the run declares unavailable, or of a cell in which everything else is finite
        (0/0), is a gap; any other is the trace of an explosion and must be seen.
        """
        values = self.grid(metric)
        lost = np.isnan(values) & self.sick & ~self.declared(metric)[:, None]
        return np.isinf(values) | lost

    @cached_property
    def is_finite(self) -> Bools:
        """Columns of the steps at which everything is finite in every block."""
        known = ~self.sick.all(axis=0)  # health unknown, or nothing finite: neither can be told
        lost = self.broken("grad_output") | self.broken("output_second_moment")
        bad = (self.sick & known) | lost
        healthy: Bools = np.logical_not(np.logical_or.reduce(bad, axis=0))
        return healthy

    @cached_property
    def last_finite(self) -> int:
        """Column of the last step whose gradients are all finite; 0 if none is."""
        healthy = np.flatnonzero(~self.broken("grad_output").any(axis=0))
        return int(healthy[-1]) if len(healthy) else 0

    def place(self, step: int) -> int:
        """Column of a recorded step.

        Raises:
            UsageError: It was not recorded; the message names the nearest ones.
        """
        place = int(np.searchsorted(self.steps, step))
        if place == len(self.steps) or self.steps[place] != step:
            near = [str(s) for s in self.steps[max(0, place - 1) : place + 1]]
            raise UsageError(
                f"step {step} of {self.run.label} was not recorded; nearest: {', '.join(near)}"
            )
        return place

    def positions(self, normalised: bool) -> Floats:
        """Where the blocks stand on the axis: index, or share of the depth at their middle."""
        index = np.arange(self.n_blocks, dtype=np.float64)
        return (index + 0.5) / self.n_blocks if normalised else index


@dataclass(frozen=True, eq=False)
class Series:
    """Runs that differ in their seed only: one line with a band."""

    label: str
    look: Look
    records: tuple[Record, ...]


@dataclass(frozen=True, eq=False)
class Trace:
    """One line over blocks: a series at one column (step) of each of its records.

    `places` are the columns whose values are drawn, `ends` those whose non-finite values are: the
    same, but for a run that broke, whose last finite step and last step they are.
    """

    label: str
    look: Look
    records: tuple[Record, ...]
    places: tuple[int, ...]
    ends: tuple[int, ...]

    def values(self, metric: str) -> Floats:
        """Values by (record, block)."""
        pairs = zip(self.records, self.places, strict=True)
        return np.stack([record.grid(metric)[:, place] for record, place in pairs])

    @property
    def is_finite(self) -> bool:
        """Whether everything is finite at the steps drawn, in every block of every run."""
        pairs = zip(self.records, self.places, strict=True)
        return all(bool(record.is_finite[place]) for record, place in pairs)

    def broken(self, metric: str) -> Bools:
        """Non-finite values by (record, block)."""
        pairs = zip(self.records, self.ends, strict=True)
        return np.stack([record.broken(metric)[:, place] for record, place in pairs])


@dataclass(frozen=True, eq=False)
class View:
    """Everything a figure needs to know."""

    kind: PlotKind
    series: tuple[Series, ...]
    step: int | None
    theory: bool

    @property
    def records(self) -> list[Record]:
        """All runs, in the order of the lines."""
        return [record for series in self.series for record in series.records]

    @property
    def single(self) -> Record | None:
        """The run, if there is only one."""
        return self.records[0] if len(self.records) == 1 else None

    @property
    def normalised(self) -> bool:
        """Whether blocks are placed by share of the depth: the runs differ in depth."""
        return len({record.n_blocks for record in self.records}) > 1

    def moments(self) -> list[str]:
        """The moments shown when runs are compared: the step asked for, or first and last."""
        if self.step is not None:
            return [f"step {self.step}"]
        lone = all(len(record.steps) == 1 for record in self.records)
        return ["first"] if lone else ["first", "last"]

    def traces(self, moment: str) -> list[Trace]:
        """One line per series at a moment of `moments`."""

        def places(record: Record) -> tuple[int, int]:
            if self.step is not None:
                return (record.place(self.step),) * 2
            return (0, 0) if moment == "first" else (record.last_finite, len(record.steps) - 1)

        traces = []
        for series in self.series:
            drawn, ends = zip(*map(places, series.records), strict=True)
            traces.append(Trace(series.label, series.look, series.records, drawn, ends))
        return traces

    def history(self, most: int = 4) -> list[Trace]:
        """One line per telling step of a single run: first, early, last finite, last."""
        record = self.records[0]
        told = telling_places(record.steps, record.last_finite)
        places = told if self.step is None else [record.place(self.step)]
        while len(places) > most:
            del places[1]  # the early one; where it broke says more
        looks = step_looks(len(places))
        return [
            Trace(f"step {record.steps[place]}", look, (record,), (place,), (place,))
            for place, look in zip(places, looks, strict=True)
        ]

    def steps_shown(self, traces: Sequence[Trace]) -> str:
        """The steps of the lines, in words; of several runs as `moment_words` says them."""
        if not self.single:
            return moment_words(traces)
        steps = [str(trace.records[0].steps[trace.places[0]]) for trace in traces]
        first, last = ", ".join(steps[:-1]), steps[-1]
        lines = f"steps {first} and {last}" if first else f"step {last}"
        return f"lines: {lines} ({len(self.records[0].steps)} recorded)"


def moment_words(traces: Sequence[Trace]) -> str:
    """The steps at which series are compared: "step 0", "last step (2 to 150)"."""
    places = [(r, p) for t in traces for r, p in zip(t.records, t.places, strict=True)]
    steps = [int(record.steps[place]) for record, place in places]
    word = "last finite step" if any(trace.places != trace.ends for trace in traces) else "step"
    if len(set(steps)) == 1:
        return f"{word} {steps[0]}"
    return f"{word.replace('step', '').strip() or 'last'} step ({min(steps)} to {max(steps)})"


def telling_places(steps: NDArray[np.int64], finite: int) -> list[int]:
    """Which of the recorded steps are worth a line: first, early (geometric middle), last.

    Where the last one is broken: the last finite one, at `finite`, and the one after it instead.
    """
    early = int(np.searchsorted(steps, np.sqrt(max(0, steps[-1]))))
    return sorted({0, min(early, finite), finite, min(finite + 1, len(steps) - 1)})
