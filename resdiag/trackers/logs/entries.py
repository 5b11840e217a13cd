"""What a log says, and the step-level table that it makes: names of columns, steps, gaps."""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from resdiag.errors import UsageError
from resdiag.runs.watched_config import WatchedConfig

if TYPE_CHECKING:
    from resdiag.runs.folder import Run

STEP = "step"
COLUMNS: Mapping[str, tuple[str, ...]] = {
    STEP: (
        "step", "global_step", "_step", "trainer/global_step", "train/global_step", "iteration",
        "iter", "iters", "update", "updates", "num_updates",
    ),
    "loss": (
        "loss", "train_loss", "training_loss", "loss/train", "train_loss_step", "loss_train",
        "batch_loss", "lm_loss", "nll_loss", "train_loss_epoch", "loss/train_step",
    ),
    "grad_norm": (
        "grad_norm", "gradient_norm", "gnorm", "total_grad_norm", "global_grad_norm",
        "grad_norm_total", "train_grad_norm", "total_norm",
    ),
    "lr": ("lr", "learning_rate", "train_lr", "train_learning_rate", "lr_0", "lr/pg1"),
    "epoch": ("epoch", "train_epoch"),
    "momentum": ("momentum",),
    "weight_decay": ("weight_decay", "wd"),
    "test_loss": (
        "eval_loss", "val_loss", "valid_loss", "validation_loss", "test_loss", "loss/val",
        "loss/valid", "loss/validation", "loss/test", "loss/eval",
    ),
    "test_error": ("test_error", "val_error", "eval_error", "validation_error"),
}  # fmt: skip
"""Columns of the step-level table by the names that logs have for them, the usual one first."""

_RATE_OF_OPTIMIZER = re.compile(r"lr_(sgd|adam\w?|adamax|[nr]adam|rmsprop|lion|adagrad)(_pg1)?")
_LAST_STEP = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Log:
    """The entries of one log.

    Attributes:
        name: What the run is called.
        format: Name of the log's format.
        path: Of the file or folder.
        entries: In the order of the log: values by name; missing ones are left out.
        updates_counted: Whether a step is the number of updates made, so that the first is 1. In
            resdiag, the first step is 0.
        planned: Steps that were planned; 0 if that is not known.
        done: Steps that were made; 0 if only the entries say it.
        mean_over: Steps over which a logged loss is the mean; 0 if that is not known.
        optimizer: Name of the optimizer, or "".
        notes: What there is to know about the log.
    """

    name: str
    format: str
    path: Path
    entries: Sequence[Mapping[str, float]]
    updates_counted: bool = False
    planned: int = 0
    done: int = 0
    mean_over: int = 0
    optimizer: str = ""
    notes: tuple[str, ...] = field(default_factory=tuple)


def plain_name(name: str) -> str:
    """A column's name for comparison: lower case, words joined by one underscore.

    >>> plain_name("train/Grad Norm"), plain_name(" lr-AdamW ")
    ('train_grad_norm', 'lr_adamw')
    """
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def recognise(names: Iterable[str]) -> dict[str, str]:
    """The name in the log of each known column, the most usual one where there are several.

    >>> recognise(["Step", "train/loss", "eval/loss", "gpu_temp"])
    {'step': 'Step', 'loss': 'train/loss', 'test_loss': 'eval/loss'}
    """
    plain: dict[str, str] = {}
    for name in names:
        plain.setdefault(plain_name(name), name)
    found = {}
    for column, known in COLUMNS.items():
        present = [plain[key] for key in map(plain_name, known) if key in plain]
        if column == "lr" and not present:
            present = [name for key, name in plain.items() if _RATE_OF_OPTIMIZER.fullmatch(key)]
        if present:
            found[column] = present[0]
    return found


def as_run(log: Log) -> "Run":
    """A log as a run in memory, with a step-level table and without blocks.

    A loss or gradient norm that the log has as NaN is infinite in the table, where NaN means that
    there is no value.

    Raises:
        UsageError: No entry has a loss, a gradient norm or a learning rate.
    """
    import pandas as pd

    from resdiag.runs.folder import Run
    from resdiag.runs.segments import CURVE

    names = list(dict.fromkeys(name for entry in log.entries for name in entry))
    known = recognise(names)
    if not {"loss", "grad_norm", "test_loss"} & set(known):
        raise UsageError(
            f"{log.path} has no column for a loss or a gradient norm: {_some(names)}",
            f"known names: {', '.join((*COLUMNS['loss'][:3], *COLUMNS['grad_norm'][:3]))}",
        )
    rows, left_out = _rows(log, known)
    _add_training_losses(rows)
    steps = max(log.done, max(rows, default=-1) + 1)
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("step").sort_index()
    frame = frame.reindex(columns=CURVE.names[1:]).astype("float64")
    frame.index = frame.index.astype("int32")
    told = frame[["loss", "grad_norm"]].to_numpy()
    lost = bool((told == math.inf).any() or (told == -math.inf).any())
    rates = frame["lr"].dropna()
    return Run(
        config=WatchedConfig(
            model=log.name,
            optimizer=log.optimizer,
            lr=float(rates.iloc[0]) if len(rates) and math.isfinite(rates.iloc[0]) else None,
            steps=log.planned,
            settings={"log": str(log.path), "format": log.format},
        ),
        blocks=[],
        data={"name": "?"},
        status="diverged" if lost else "stopped" if steps < log.planned else "done",
        steps=steps,
        notes=tuple(_notes(log, names, known, rows, left_out)),
        metrics_frame=pd.DataFrame({"step": pd.Series(dtype="int32"), "block": []}),
        curve_frame=frame.reset_index(),
    )


def _rows(log: Log, known: Mapping[str, str]) -> tuple[dict[int, dict[str, float]], int]:
    """Values by step and column; of several at one step the last; and how many had no step."""
    rows: dict[int, dict[str, float]] = {}
    left_out = 0
    for at, entry in enumerate(log.entries):
        step = entry.get(known[STEP], math.nan) if STEP in known else float(at)
        step -= log.updates_counted
        if step == -1:  # before the first update
            step = 0
        if not (0 <= step < _LAST_STEP and step == int(step)):
            left_out += 1
            continue
        row = rows.setdefault(int(step), {})
        for column, name in known.items():
            if column != STEP and name in entry:
                value = entry[name]
                lost = math.isnan(value) and column in ("loss", "grad_norm")
                row[column] = math.inf if lost else value
    return {step: row for step, row in rows.items() if row}, left_out


def _add_training_losses(rows: Mapping[int, dict[str, float]]) -> None:
    """The last logged loss as the training loss of each evaluation."""
    last = math.nan
    for _, row in sorted(rows.items()):
        last = row.get("loss", last)
        if "test_loss" in row:
            row["train_loss"] = last


def _notes(
    log: Log,
    names: Sequence[str],
    known: Mapping[str, str],
    rows: Mapping[int, Mapping[str, float]],
    left_out: int,
) -> Iterable[str]:
    """What was read, and what was not."""
    losses = sorted(step for step, row in rows.items() if "loss" in row)
    read = ", ".join(column if column == name else f"{column} from '{name}'"
                     for column, name in known.items())  # fmt: skip
    yield f"{log.format}: {len(log.entries)} entries; read: {read}"
    if STEP not in known:
        yield "no column says the step: entries are counted from 0"
    every = _usual_gap(losses)
    if log.mean_over > 1:
        yield f"each loss is the mean over {log.mean_over} steps, and is at the last of them"
    elif every > 1:
        yield (
            f"a loss every {every} steps: {len(losses)} losses of {losses[-1] + 1} steps; each may "
            "be a mean over the steps before"
        )
    for column in ("loss", "grad_norm"):
        lost = sum(math.isnan(entry.get(known.get(column, ""), 0.0)) for entry in log.entries)
        if lost:
            yield f"{column} is NaN in {lost} entries, shown as inf: NaN stands for no value here"
    if "test_loss" in known:
        yield "the training loss of an evaluation is the last logged loss"
    if left_out:
        yield f"{left_out} entries without a step that is a whole number of at least 0 left out"
    others = [name for name in names if name not in known.values()]
    if others:
        yield f"not judged, as their names say nothing to resdiag: {_some(others)}"
    yield from log.notes


def _usual_gap(steps: Sequence[int]) -> int:
    """The median distance of steps; 0 for fewer than two."""
    gaps = sorted(b - a for a, b in itertools.pairwise(steps))
    return gaps[len(gaps) // 2] if gaps else 0


def _some(names: Sequence[str], most: int = 8) -> str:
    """The first names on one bounded line."""
    shown = [" ".join(repr(name)[1:-1].split())[:40] for name in names[:most]]
    more = len(names) - most
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "") if names else "none at all"
