"""What was observed in a run: its two tables, read so that nothing missing or odd can raise."""

import functools
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd

from resdiag.diagnose.finding import NotJudged, Rule
from resdiag.diagnose.nonfinite import FirstNonfinite, find_first_nonfinite
from resdiag.runs.folder import Run
from resdiag.runs.watched_config import WatchedConfig
from resdiag.theory.prediction import Prediction, predict_run
from resdiag.watch.base.names import NORMALISATIONS

Found = TypeVar("Found")


class RunData:
    """A run's tables with missing values as NaN, and the prediction that belongs to them.

    Args:
        run: The run to look at.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.variant, self.depth = str(run.config.variant), int(run.config.depth)
        # another model is not in the table of variants, so theory predicts nothing for it
        self.lr = math.nan if run.config.lr is None else float(run.config.lr)
        self.metrics = _clean(run.metrics(), ["step", "block"])
        self.curve = _clean(run.curve(), ["step"])
        self._tables: dict[str, pd.DataFrame] = {}
        self._found: dict[Callable[[RunData], object], object] = {}
        self.steps: list[int] = sorted({int(step) for step in self.metrics.get("step", ())})

    @cached_property
    def is_told(self) -> bool:
        """Whether the run says its loss at all; infinite and NaN are losses of our own runs."""
        if "loss" not in self.curve:
            return False
        foreign = isinstance(self.run.config, WatchedConfig)
        return not foreign or self._diverged or bool(self.curve["loss"].notna().any())

    def has(self, need: str) -> bool:
        """Whether the run has what a rule needs, see `Rule.needs`, in at least one step."""
        if need in ("blocks", "unavailable", "inventory"):
            return need == "unavailable" or bool(getattr(self.run, need))
        if need == "loss":
            return not self.series("loss").empty
        tables = (self.metrics, self.curve)
        return any(need in table and bool(table[need].notna().any()) for table in tables)

    @property
    def inventory(self) -> dict[str, Any]:
        """What model, optimizers and loop consist of; empty if that was not recorded."""
        return self.run.inventory

    @property
    def inspected(self) -> bool:
        """Whether the inventory has what a traced pass shows."""
        kinds = ("normalisations", "constant", "lacking", "attentions")
        return all(isinstance(self.inventory.get(kind), list) for kind in kinds)

    def part(self, name: str) -> dict[str, Any]:
        """A part of the inventory, empty if it is not there."""
        found = self.inventory.get(name)
        return found if isinstance(found, dict) else {}

    def event(self, name: str) -> dict[str, int] | None:
        """How often something happened in the loop, and in which steps; None if it did not."""
        found = self.part("events").get(name)
        return found if isinstance(found, dict) else None

    def without_inventory(self, row: Rule) -> NotJudged:
        """Why a rule that needs the inventory is not applied."""
        if not isinstance(self.run.config, WatchedConfig):
            return row.not_applicable("the network and the loop are resdiag's own")
        if self.inventory:
            return row.not_judged("no pass was traced", "a recorded step")
        return row.not_judged("the record has no inventory of model and optimizer")

    @property
    def _diverged(self) -> bool:
        return self.run.status == "diverged"

    @cached_property
    def first_nonfinite(self) -> FirstNonfinite | None:
        """The first non-finite number in the block table."""
        norms = self.series("grad_norm")
        return find_first_nonfinite(self.metrics, [int(s) for s in norms.index[np.isfinite(norms)]])

    @cached_property
    def prediction(self) -> Prediction | None:
        """Theory for this run's network from the measured stem; None if it says nothing."""
        s0, m0 = self.value("input_second_moment", 0, 0), self.value("input_mean", 0, 0)
        return predict_run(self.run.config, self.run.blocks, s0=s0, m0=m0)

    @property
    def classes(self) -> int | None:
        """Number of classes, None if the run does not say."""
        return count_classes(self.run)

    @property
    def why_no_updates(self) -> tuple[str, str]:
        """Why a run has no updates, and what a longer one would have to have; see `NotJudged`."""
        if getattr(self.run.config, "kind", "") == "probe":
            return "a probe makes no update", "updates"
        if self.series("lr").notna().any():
            return "no update is known: they were not among the metrics, or all weights were 0", ""
        return "updates were not recorded: attach(optimizer=...)", ""

    @cached_property
    def indices(self) -> list[int]:
        """Block indices of the table, in forward order."""
        return sorted({int(block) for block in self.metrics.get("block", ())})

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The descriptions of the blocks that are in the table."""
        known = set(self.indices)
        return [row for row in self.run.blocks if row.get("index") in known]

    def profile(self, metric: str, step: int) -> "pd.Series[float]":
        """One metric over the blocks at one step, indexed by block; empty if there is none."""
        if metric not in self.metrics:
            return pd.Series(dtype=float)
        first, last = np.searchsorted(self.metrics["step"].to_numpy(), (step, step + 1))
        values, blocks = (self.metrics[name].to_numpy() for name in (metric, "block"))
        return pd.Series(values[first:last], index=blocks[first:last])

    def value(self, metric: str, step: int, block: int) -> float:
        """One number of the block table, NaN if it is missing."""
        table = self.table(metric)
        if block not in table.columns or step not in table.index:
            return math.nan
        return float(table[block].to_numpy()[table.index.get_loc(step)])

    def table(self, metric: str) -> pd.DataFrame:
        """One metric as steps x blocks; empty if there is none. Do not change it."""
        if metric not in self._tables:
            empty = pd.DataFrame(dtype=float)
            known = metric in self.metrics
            rows = (
                self.metrics.pivot(index="step", columns="block", values=metric) if known else empty
            )
            self._tables[metric] = rows
        return self._tables[metric]

    def sizes(self, site: str, step: int) -> "pd.Series[float]":
        """RMS of a site over the blocks at one step, indexed by block."""
        moments = self.profile(f"{site}_second_moment", step)
        with np.errstate(all="ignore"):
            return pd.Series(np.sqrt(moments.to_numpy(dtype=float)), index=moments.index)

    def scalar(self, metric: str, step: int) -> float:
        """One number of the step table, NaN if it is missing."""
        return float(self.series(metric).get(step, math.nan))

    def series(self, metric: str) -> "pd.Series[float]":
        """One column of the step table, indexed by step; empty if there is none.

        A loss that the loop did not report is computed from the logits if possible.
        """
        if metric == "loss" and not self.is_told and "head_loss" in self.curve:
            return self.series("head_loss").dropna()
        if metric not in self.curve:
            return pd.Series(dtype=float)
        column = pd.Series(
            self.curve[metric].to_numpy(dtype=float), index=self.curve["step"].to_numpy()
        )
        if metric != "loss" or not isinstance(self.run.config, WatchedConfig):
            return column
        # of a monitor's losses NaN means not reported, or that the loss was NaN
        told = column.notna()
        if self._diverged and (told.mean() > 0.5 or not told.any()):
            return column
        lost = column[told].index.max() if self._diverged else math.inf
        return column[told | (column.index > lost)]

    @cached_property
    def median_updates(self) -> "pd.Series[float]":
        """Median of update over weights, by recorded step, over the blocks that ever move."""
        updates = self.table("update_ratio").dropna(how="all")
        return updates.loc[:, (updates > 0).any()].median(axis=1).dropna()

    @cached_property
    def cross_entropy(self) -> "pd.Series[float]":
        """The loss as a mean per label, as ln K is one.

        What the loop tells may be a sum over the batch, or weighted: it is divided by what it is
        of the cross-entropy read off the logits, in the median, where that is not about 1.
        """
        told, read = self.series("loss"), self.series("head_loss")
        with np.errstate(all="ignore"):
            factors = (told / read.reindex(told.index)).to_numpy(dtype=float)
        factors = factors[np.isfinite(factors)]
        factor = float(np.median(factors)) if len(factors) else 1.0
        return told / factor if factor > 2 or 0 < factor < 0.5 else told

    def name(self, block: int | None) -> str:
        """Words for a block: its index and its name in the model."""
        if block is None:
            return "no block"
        rows = [row for row in self.run.blocks if row.get("index") == block]
        names = [str(row["name"]) for row in rows if "name" in row]
        return f"block {block} ({names[0]})" if names else f"block {block}"

    def stage_growth(self, step: int) -> dict[int, tuple[float, int, int]]:
        """Growth of E[H^2] per block within each stage, without what the transition does.

        Returns:
            By stage: the geometric mean of E[H_l^2] / E[H_{l-1}^2] over successive blocks of the
            stage, how many such ratios there are, and the stage's first block.
        """
        moments = self.profile("output_second_moment", step)
        stages: dict[int, list[int]] = {}
        for row in self.run.blocks:
            if isinstance(row.get("stage"), int) and row.get("index") in moments.index:
                stages.setdefault(row["stage"], []).append(row["index"])
        found = {}
        for stage, blocks in sorted(stages.items()):
            values = moments[sorted(set(blocks))].to_numpy(dtype=float)
            with np.errstate(all="ignore"):
                ratios = np.log(values[1:] / values[:-1])
            ratios = ratios[np.isfinite(ratios)]
            if len(ratios):
                found[stage] = (float(np.exp(ratios.mean())), len(ratios), min(blocks))
        return found

    def growth_per_block(self, step: int) -> float:
        """Geometric mean over all blocks of E[H^2] / E[x^2], as theory's `growth_per_block`."""
        with np.errstate(all="ignore"):
            logs = np.log(self.profile("forward_growth", step).to_numpy(dtype=float))
            logs = logs[np.isfinite(logs)]
            return float(np.exp(logs.mean())) if len(logs) else math.nan

    def shortcut_factors(self, step: int) -> "pd.Series[float]":
        """The factor on every identity shortcut within a stage, signed, by block."""
        found = {}
        for row in self.rows:
            block = int(row["index"])
            normed = any(name in str(row.get("after_add", "")) for name in NORMALISATIONS)
            if row.get("shortcut") != "identity" or row.get("transition") or normed:
                continue
            x, h = (self.sizes(site, step).get(block, math.nan) for site in ("input", "shortcut"))
            if x > 0 and math.isfinite(h):
                q = [self.value(f"input_mean_q{i}", step, block) for i in (10, 50, 90)]
                p = [self.value(f"shortcut_mean_q{i}", step, block) for i in (90, 50, 10)]
                factor = h / x
                mirrored = np.allclose(p, [-factor * v for v in q], rtol=1e-3, atol=1e-4 * x)
                same = np.allclose(p[::-1], [factor * v for v in q], rtol=1e-3, atol=1e-4 * x)
                found[block] = -factor if mirrored and not same else factor
        return pd.Series(found, dtype=float)

    def gradient_ratio(self, step: int) -> float:
        """||dL/dx|| of the first block over ||dL/dH|| of the last.

        The first unit of a network without shortcuts takes the data, which have no gradient: there
        it is ||dL/dH|| of the first unit.
        """
        if not self.indices:
            return math.nan
        with np.errstate(all="ignore"):
            first = np.float64(self.value("grad_input", step, self.indices[0]))
            if np.isnan(first) and self.run.blocks and self.run.blocks[0].get("shortcut") == "none":
                first = np.float64(self.value("grad_output", step, self.indices[0]))
            return float(first / np.float64(self.value("grad_output", step, self.indices[-1])))


def last_known(table: pd.DataFrame) -> "pd.Series[float]":
    """By block, the last finite number; blocks without one are left out.

    >>> last_known(pd.DataFrame({0: [1.0, math.nan], 1: [math.nan, math.inf]})).to_dict()
    {0: 1.0}
    """
    found = {block: table[block].to_numpy(dtype=float) for block in table.columns}
    finite = {block: values[np.isfinite(values)] for block, values in found.items()}
    return pd.Series({b: float(v[-1]) for b, v in finite.items() if len(v)}, dtype=float)


def trailing(marks: "pd.Series[bool]") -> int:
    """How many of the last entries are true, without a gap.

    >>> trailing(pd.Series([True, False, True, True]))
    2
    """
    held = marks.to_numpy(dtype=bool)[::-1]
    return len(held) if held.all() else int(held.argmin())


def first_step(marks: "pd.Series[bool]") -> int:
    """The first step that is marked; there is one.

    >>> first_step(pd.Series([False, True, False], index=[10, 20, 30]))
    20
    """
    return int(marks.index[int(marks.to_numpy(dtype=bool).argmax())])


def held_since(marks: "pd.Series[bool]") -> int:
    """The first step from which on all are marked; the last step if it is not.

    >>> held_since(pd.Series([True, False, True, True], index=[10, 20, 30, 40]))
    30
    """
    return int(marks.index[len(marks) - max(1, trailing(marks))])


def once_per_run(find: "Callable[[RunData], Found]") -> "Callable[[RunData], Found]":
    """A function of a run that is computed once, as several rules ask for it."""

    @functools.wraps(find)
    def remembered(seen: RunData) -> Found:
        if find not in seen._found:
            seen._found[find] = find(seen)
        return cast(Found, seen._found[find])

    return remembered


def count_classes(run: Run) -> int | None:
    """Number of classes of a run's data, None if the run does not say."""
    stated = run.data.get("classes")
    if isinstance(stated, Sequence) and not isinstance(stated, str):
        stated = len(stated)
    return int(stated) if isinstance(stated, int | float) and stated > 1 else None


def _clean(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Numbers only, sorted by whole-numbered keys without repetition; empty if a key is missing."""
    if not set(keys) <= set(frame.columns):
        return pd.DataFrame()
    numbers: pd.DataFrame = frame.apply(pd.to_numeric, errors="coerce").astype(float)
    numbers[keys] = numbers[keys].where(np.isfinite(numbers[keys]) & (numbers[keys].abs() < 2**53))
    numbers = numbers.dropna(subset=keys).astype(dict.fromkeys(keys, "int64"))
    return numbers.drop_duplicates(keys, keep="last").sort_values(keys, ignore_index=True)
