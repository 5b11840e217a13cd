"""The first non-finite number of a run: its step, block, site and direction."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from resdiag.catalog.table import SITES

Direction = Literal["forward", "backward"]


@dataclass(frozen=True, kw_only=True)
class FirstNonfinite:
    """Where a run broke.

    Attributes:
        step: First recorded step with a non-finite activation or gradient.
        block: Forward: the first block whose activation is non-finite. Backward: the first block
            in backward order, hence the last in forward order, whose gradient is.
        direction: "forward" if an activation broke, "backward" if all activations were finite.
        site: Site of the block's tensor: one of `SITES`, first in the order of computation, or
            "parameters" if only the block's parameter gradient is non-finite.
    """

    step: int
    block: int
    direction: Direction
    site: str


_BACKWARD_SITES = {
    "grad_output": "output",
    "grad_sum": "sum",
    "grad_input": "input",
    "grad_param": "parameters",
}


def find_first_nonfinite(
    metrics: pd.DataFrame, sound: Collection[int] = ()
) -> FirstNonfinite | None:
    """Find the first step, block and site with a non-finite number.

    A missing value (NaN in a column that the run could not record) is not an offence; a norm that
    is NaN while the same column has been finite before, or that is infinite, is. Infinite norms
    count although an infinite norm can come from finite elements: in float32 that is the step
    before the elements follow.

    Args:
        metrics: The block table: `step`, `block` and the recorded columns; any may be missing.
        sound: Steps at which the norm of all gradients is finite: a missing norm of a block says
            there that no gradient came to it.

    Returns:
        The first one, or None if every recorded number is finite.
    """
    if not {"step", "block"} <= set(metrics.columns) or metrics.empty:
        return None
    table = metrics.sort_values(["step", "block"], kind="stable").reset_index(drop=True)
    forward = _broken_activations(table)
    backward = _broken_gradients(table, table["step"].isin(list(sound)))
    broken = forward.any(axis=1) | backward.any(axis=1)
    if not broken.any():
        return None
    step = int(table["step"].to_numpy()[broken.to_numpy().argmax()])
    now = table["step"] == step
    direction: Direction = "forward" if forward[now].to_numpy().any() else "backward"
    marks = (forward if direction == "forward" else backward)[now]
    rows = marks.index[marks.any(axis=1)]
    row = rows[0] if direction == "forward" else rows[-1]
    site = str(marks.columns[marks.loc[row].to_numpy().argmax()])
    return FirstNonfinite(
        step=step, block=int(table["block"].to_numpy()[row]), direction=direction, site=site
    )


def _broken_activations(table: pd.DataFrame) -> pd.DataFrame:
    """One boolean column per recorded site; the sites are in the order of computation."""
    marks = {}
    if {"input_nonfinite", "output_nonfinite"} <= set(table):
        # where a block could not be read, the next one's input is its output
        later = _numbers(table, "input_nonfinite").groupby(table["step"]).shift(-1)
        table = table.assign(output_nonfinite=_numbers(table, "output_nonfinite").fillna(later))
    for site in SITES:
        # an input is its neighbour's output: only the first block's is news
        rows = table["block"] == table["block"].min() if site == "input" else True
        if f"{site}_nonfinite" in table:
            marks[site] = (_numbers(table, f"{site}_nonfinite") > 0) & rows
    return pd.DataFrame(marks, index=table.index, dtype=bool)


def _broken_gradients(table: pd.DataFrame, sound: pd.Series) -> pd.DataFrame:
    """One boolean column per site of a gradient, in the order of the backward pass."""
    marks: dict[str, pd.Series] = {}
    seen = pd.Series(True, index=table.index)
    if "grad_nonfinite" in table:
        share = _numbers(table, "grad_nonfinite")
        marks["output"], seen = share > 0, share.notna()
    for column, site in _BACKWARD_SITES.items():
        if column in table:
            values = _numbers(table, column)
            finite = values.where(np.isfinite(values)).groupby(table["block"])
            # finite before and NaN now, where the block's backward pass was seen at all
            lost = values.isna() & finite.ffill().notna() & seen & ~sound
            broken = np.isinf(values) | lost
            marks[site] = marks[site] | broken if site in marks else broken
    return pd.DataFrame(marks, index=table.index, dtype=bool)


def _numbers(table: pd.DataFrame, column: str) -> pd.Series:
    return pd.to_numeric(table[column], errors="coerce").astype(float)
