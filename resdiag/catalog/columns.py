"""What was recorded as columns: cells that crossed to the host, and what follows from them there.

No torch here: NumPy only.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from resdiag.catalog.table import DATA, HEAD_LOSS, RECORDED_PER_STEP

Columns: TypeAlias = dict[str, NDArray[Any]]

HEAD_CELLS = (
    *("head_mean", "head_channel_mean_rms", "head_channel_std", "head_gap", "head_size"),
    *DATA,
    *HEAD_LOSS,
    "output_loss",
)
"""Cells of a step that a pass's batch and classifier fill."""

STEP_CELLS = (*HEAD_CELLS, "grad_norm", "grad_kept", "grad_scale", "skipped")
"""All cells of a step."""


def gap(rows: int) -> NDArray[np.float64]:
    """A column of which nothing is known."""
    return np.full(rows, np.nan)


def block_columns(
    steps: list[int], values: NDArray[np.float64], sizes: Sequence[int], names: Sequence[str]
) -> Columns:
    """Per-block columns of some steps, with the ratios that need two cells; `sizes` of the sums."""
    count = values.shape[1]
    columns: Columns = {
        "step": np.repeat(np.asarray(steps, dtype=np.int32), count),
        "block": np.tile(np.arange(count, dtype=np.int16), len(steps)),
    }
    cells = {name: values[:, :, i].reshape(-1) for i, name in enumerate(names)}
    with np.errstate(all="ignore"):
        branch, shortcut, output = (
            np.hypot(cells[f"{site}_channel_mean_rms"], cells[f"{site}_channel_std"])
            for site in ("branch", "shortcut", "output")
        )
        cells["branch_ratio"] = branch / shortcut
        cells["elasticity"] = cells["grad_output"] * output * np.sqrt(np.tile(sizes, len(steps)))
        return columns | {name: cell.astype(np.float32) for name, cell in cells.items()}


def step_columns(
    steps: list[int], head: NDArray[np.float64], rates: Sequence[tuple[float, float, float]]
) -> Columns:
    """Per-step columns `catalog.RECORDED_PER_STEP`; B3 is put together here."""
    if not head.shape[1]:  # nothing was written of any of these steps
        head = np.full((len(steps), 1, len(STEP_CELLS)), np.nan)
    get = dict(zip(STEP_CELLS, head[:, 0].T, strict=True))
    lr, momentum, decay = np.asarray(rates, dtype=np.float64).reshape(-1, 3).T
    with np.errstate(all="ignore"):
        squared = get["head_size"] * get["head_channel_mean_rms"] ** 2
        out = {
            "lr": lr,
            "grad_norm": get["grad_norm"],
            "head_mean": get["head_mean"],
            "head_bias": get["head_channel_mean_rms"] / get["head_channel_std"],
            "head_kick": lr * (1 + momentum) * (squared + 1) * get["head_gap"],
            **{name: get[name] for name in (*HEAD_LOSS, "output_loss", "grad_kept", *DATA)},
            "momentum": momentum,
            "weight_decay": decay,
        }
    assert tuple(out) == RECORDED_PER_STEP
    if np.isfinite(get["skipped"]).any():
        out |= {name: get[name] for name in ("grad_scale", "skipped")}
    return {"step": np.asarray(steps, dtype=np.int32), **out}


def concatenate(parts: Sequence[Mapping[str, NDArray[Any]]]) -> Columns:
    """Join flushes; without any, empty columns."""
    if not parts:
        return {"step": np.empty(0, np.int32), "block": np.empty(0, np.int16)}
    names = dict.fromkeys(name for part in parts for name in part)
    sized = [(part, len(part["step"])) for part in parts]
    return {name: np.concatenate([part.get(name, gap(n)) for part, n in sized]) for name in names}


def join(columns: Columns) -> Columns:
    """One row per step: what was told of a step joins what was recorded of it."""
    steps, rows = np.unique(columns["step"], return_inverse=True)
    if len(steps) == len(columns["step"]):
        return columns
    joined: Columns = {"step": steps}
    for name, values in columns.items():
        if name not in ("step", "block"):
            known = ~np.isnan(values)
            joined[name] = np.full(len(steps), np.nan)
            joined[name][rows[known]] = values[known]
    return joined
