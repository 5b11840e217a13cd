"""The numbers behind the heat map of a page: recorded metrics by block and step, as small JSON.

The page draws it with `templates/heatmap.js`; it loads nothing.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from resdiag.catalog.table import METRICS
from resdiag.plots.view import Bools, Floats, Record
from resdiag.report.words import tame

if TYPE_CHECKING:
    from resdiag.runs.folder import Run

CHOSEN = (
    "grad_output", "grad_param", "output_second_moment", "output_mean", "output_bias",
    "skip_gain", "branch_ratio", "update_ratio", "forward_growth", "grad_growth",
    "saturated_fraction", "output_nonfinite", "grad_nonfinite",
)  # fmt: skip
"""Metrics that a reader can choose from, as far as a run has them."""

MOST_CELLS = 60_000
"""Numbers in a page, over all runs and metrics: about 400 kB."""

LOST = "x"
"""Stands for a number that is not finite; null for one that was not recorded."""

Number: TypeAlias = float | str | None


@dataclass(frozen=True)
class HeatMap:
    """Recorded metrics of one run.

    Attributes:
        name: Of the run.
        steps: The recorded steps, or some of them; their number is S.
        blocks: Names of the blocks; their number is B.
        metrics: Of each its id, label, whether its colours are logarithmic, and its numbers with
            four digits, B rows of S: None is not recorded, `LOST` is not finite.
        every: One of how many recorded steps is there.
    """

    name: str
    steps: Sequence[int]
    blocks: Sequence[str]
    metrics: Sequence[Mapping[str, Any]]
    every: int = 1


def make_heat_map(run: "Run", name: str, most: int = MOST_CELLS) -> HeatMap | None:
    """The heat map of a run; None if it has no recorded step, or none of the metrics.

    Args:
        run: The run.
        name: What the page calls it.
        most: Numbers, about. Of more steps every n-th is taken, and the first one in which
            something is not finite.
    """
    health = [metric for metric in METRICS if metric.endswith("_nonfinite")]
    record = Record(run, run.metrics({*CHOSEN, *health, "grad_input"}), run.curve())
    if record.metrics.empty or not record.n_blocks:
        return None
    known = [metric for metric in CHOSEN if metric in record.metrics]
    grids = {metric: (record.grid(metric), record.broken(metric)) for metric in known}
    grids = {m: pair for m, pair in grids.items() if np.isfinite(pair[0]).any() or pair[1].any()}
    if not grids:
        return None
    every = max(1, math.ceil(len(record.steps) * record.n_blocks * len(grids) / most))
    places = set(range(0, len(record.steps), every)) | {len(record.steps) - 1}
    broken = np.any([broken.any(axis=0) for _, broken in grids.values()], axis=0)
    places |= set(np.flatnonzero(broken)[:1].tolist())
    kept = sorted(places)
    metrics = [
        _metric(metric, values[:, kept], lost[:, kept]) for metric, (values, lost) in grids.items()
    ]
    blocks = [tame(str(row.get("name", "")), 60) for row in run.blocks][: record.n_blocks]
    blocks += [""] * (record.n_blocks - len(blocks))
    return HeatMap(name, [int(record.steps[place]) for place in kept], blocks, metrics, every)


def _metric(metric: str, values: Floats, lost: Bools) -> dict[str, Any]:
    """One metric: logarithmic where nothing is negative and it spans more than a decade."""
    finite = values[np.isfinite(values) & ~lost]
    positive = finite[finite > 0]
    wide = bool(len(positive)) and float(positive.max()) > 10 * float(positive.min())
    label = METRICS[metric].label if metric in METRICS else metric
    return {
        "id": metric,
        "label": label,
        "log": wide and not bool((finite < 0).any()),
        "values": [
            [_number(value, bool(gone)) for value, gone in zip(row, gones, strict=True)]
            for row, gones in zip(values.tolist(), lost, strict=True)
        ],
    }


def _number(value: float, lost: bool) -> Number:
    if lost or math.isinf(value):
        return LOST
    return None if math.isnan(value) else float(f"{value:.4g}")


def to_json(maps: Sequence[HeatMap]) -> str:
    r"""The maps for a script element: nothing in it can end the element.

    >>> to_json([HeatMap("</script>", [0], ["&"], [])])[:29]
    '[{"name":"\\u003c/script\\u003e'
    """
    text = json.dumps([vars(one) for one in maps], separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
