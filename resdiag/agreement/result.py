"""What a comparison of two runs that should agree came to: numbers, words, and JSON."""

import math
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from resdiag.diagnose.finding import plain

if TYPE_CHECKING:
    import pandas as pd

    from resdiag.agreement.differences import Differences

_READINGS = {
    "data": "The batches differ: their order, the augmentation, or how inputs are prepared.",
    "loss": "The forward passes agree and the losses do not: the labels or the loss function "
    "differ.",
    "backward": "The forward pass agrees and the backward pass does not: another kernel or "
    "precision of the gradient, a scaled or clipped loss, or accumulation.",
    "optimizer": "The passes agree and the optimizer's settings do not.",
    "update": "The gradients agree and the updates do not: the optimizer, its state or its "
    "settings differ, or what is done to gradients between the backward pass and the update.",
    "evaluation": "The training agrees and the evaluation does not: other data, or another mode.",
}
_COLUMNS, _INDENT = 100, 10


@dataclass(frozen=True, kw_only=True)
class Parting:
    """The first place, in the order of computation, where two runs differ by more than a limit.

    Attributes:
        step: The optimizer step, from 0.
        block: Index of the block; None for a number of the whole step.
        name: The block's name in the model; "" without a block.
        metric: The column.
        direction: "data", "forward", "loss", "backward", "optimizer", "update" or "evaluation".
        site: Where in the block or in the step, in words.
        difference: Relative difference, see `resdiag.agreement.places.Place.unit`; infinite if one
            run is no longer finite.
        tolerance: What was allowed there.
        a: The first run's value.
        b: The second run's value.
        noise: The largest relative difference that repeats showed up to this step; None without.
        before: The last compared step before, at which no difference exceeded the limit; None if
            there is none.
        previous: The metric's largest relative difference at its step before; None if there is
            none.
    """

    step: int
    block: int | None
    name: str
    metric: str
    direction: str
    site: str
    difference: float
    tolerance: float
    a: float
    b: float
    noise: float | None = None
    before: int | None = None
    previous: float | None = None

    @property
    def is_gradual(self) -> bool:
        """Whether a tenth of the difference was there in the step before."""
        return self.previous is not None and 10 * self.previous >= self.difference

    @property
    def where(self) -> str:
        """Step, block, direction and site in words.

        >>> Parting(step=3, block=None, name="", metric="loss", direction="loss",
        ...         site="in the loss", difference=0.1, tolerance=1e-6, a=1.0, b=1.1).where
        'at step 3, in the loss'
        """
        if self.block is None:
            return f"at step {self.step}, {self.site}"
        name = f" ({self.name})" if self.name else ""
        direction = "" if self.direction == "update" else f" {self.direction},"
        return f"at step {self.step} in block {self.block}{name},{direction} {self.site}"

    def describe(self) -> str:
        """Where, and by how much."""
        digits = next((n for n in (4, 6, 9) if f"{self.a:.{n}g}" != f"{self.b:.{n}g}"), 17)
        both = f"{self.a:.{digits}g} and {self.b:.{digits}g}"
        size = f"{self.metric} is {both}"
        if math.isfinite(self.difference):
            size = f"{self.metric} differs by {self.difference:.1e} relative ({both})"
        if self.noise is None:
            return f"{self.where}: {size}"
        noise = f"by at most {self.noise:.1e}" if self.noise else "not at all"
        return f"{self.where}: {size}, a repeat of A {noise}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric in the table of largest differences.

    Attributes:
        metric: The column.
        direction: Part of the step, as in `Parting`.
        largest: Largest relative difference over all common steps and blocks.
        step: Where that is.
        block: Where that is; None for a number of the whole step.
        noise: The largest that repeats of the first run show; None without a repeat.
        decides: Whether this metric can be where runs part: shares of elements cannot.
        first: Where it first exceeds the tolerance; None if it never does, or does not decide.
    """

    metric: str
    direction: str
    largest: float
    step: int
    block: int | None
    noise: float | None
    decides: bool
    first: Parting | None


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Whether two runs that should agree do; `str()` is the answer in words.

    Attributes:
        a: Name of the first run.
        b: Name of the second run.
        first: Where they part by more than the tolerance; None if they agree.
        first_of_any_size: Where any recorded number first differs at all; None if all are equal.
        first_beyond_rounding: Where they first differ by more than rounding explains.
        differs: Settings, environment and data that differ: both values by name.
        notes: What limits the comparison.
        tolerance: What was allowed, in words.
        rows: Every metric that was compared, in the order of computation.
        steps: Common steps with recorded blocks, or with a loss where no blocks are recorded.
        blocks: Blocks of the network.
        losses: The last step with a loss in both runs, and both losses; None if there is none.
        tables: The differences by metric, for `differences`.
    """

    a: str
    b: str
    first: Parting | None
    first_of_any_size: Parting | None
    first_beyond_rounding: Parting | None
    differs: Mapping[str, tuple[object, object]]
    notes: tuple[str, ...]
    tolerance: str
    rows: tuple[Row, ...]
    steps: tuple[int, ...]
    blocks: int
    losses: tuple[int, float, float] | None
    tables: "Mapping[str, Differences]" = field(repr=False, default_factory=dict)

    @property
    def agree(self) -> bool:
        """Whether no metric exceeds the tolerance."""
        return self.first is None

    def differences(self, metric: str) -> "pd.DataFrame":
        """Relative differences of one metric, a row per step and a column per block.

        Raises:
            UsageError: The metric was not compared.
        """
        import pandas as pd

        from resdiag.errors import unknown

        if metric not in self.tables:
            raise unknown("compared metric", metric, self.tables)
        found = self.tables[metric]
        return pd.DataFrame(
            found.relative,
            index=pd.Index(found.steps, name="step"),
            columns=pd.Index(found.blocks, name="block"),
        )

    @property
    def answer(self) -> str:
        """The result in one or two sentences."""
        if self.first is not None:
            return f"{self._opening(self.first)} {self.first.describe()}.{self._end()}"
        scope = f"{_steps(self.steps)}, {self.blocks} blocks, {len(self.rows)} metrics"
        if self.first_of_any_size is None:
            return f"Identical: every recorded number is the same ({scope}).{self._end()}"
        row = max((row for row in self.rows if row.decides), key=lambda row: row.largest)
        at = f"step {row.step}" + ("" if row.block is None else f", block {row.block}")
        largest = f"{row.largest:.1e} relative, {row.metric} at {at}"
        return f"They agree within the tolerance ({scope}); largest: {largest}.{self._end()}"

    def _opening(self, first: Parting) -> str:
        if first.step == self.steps[0] or first.before is None:
            return "They part in the first pass that both recorded,"
        return f"The same until step {first.before}; they part first"

    def _end(self) -> str:
        if self.losses is None:
            return ""
        step, a, b = self.losses
        both = f"{a:.6g} in both" if a == b else f"{a:.4g} and {b:.4g}"
        return f" Loss at step {step}, the last of both: {both}."

    @property
    def reading(self) -> str:
        """What the place of the first difference says about its cause; "" if they agree."""
        if self.first is None:
            return ""
        if _place(self.first) != _place(self.first_beyond_rounding):
            return (
                "So small a difference can be rounding: sums in another order, in the run or in "
                "what records it."
            )
        if self.first.is_gradual:
            return (
                f"Nothing sudden happened there: {self.first.metric} differed by "
                f"{self.first.previous:.1e} in the step before. Rounding that a training amplifies "
                "looks like this, and so does a small cause at an earlier step. A repeat of A "
                "tells them apart."
            )
        if self.first.block is None and self.first.step not in self.steps:
            return (
                f"The blocks were not recorded at step {self.first.step}: record more steps, with "
                "`every=1` or `record_first=`, to learn in which block and direction it begins."
            )
        if self.first.direction != "forward":
            return _READINGS[self.first.direction]
        if self.first.before is None:
            return (
                "The inputs agree and the first forward pass does not: the weights at the start, "
                "the code or the kernels from there on, or a random mask differ."
            )
        return (
            f"Everything agrees up to the update of step {self.first.before}, as far as it is "
            "recorded: after it the weights or buffers from there on were changed in one run only, "
            "or a random mask, or the code that runs from this step on, differs."
        )

    def lines(self) -> list[tuple[str, str]]:
        """The answer as labelled lines."""
        said = [("Differ in", f"{key}: {a} and {b}") for key, (a, b) in self._shown_settings()]
        said.append(("Answer", self.answer))
        said += [("Reading", self.reading)] if self.reading else []
        said += [("More", text) for text in self._other_limits()]
        said.append(("Allowed", self.tolerance))
        return said + [("Note", note) for note in self.notes]

    def _shown_settings(self) -> Iterable[tuple[str, tuple[object, object]]]:
        shown = list(self.differs.items())
        yield from ((key, (_short(a), _short(b))) for key, (a, b) in shown[:12])
        if len(shown) > 12:
            yield "more settings", (len(shown) - 12, "in --json")

    def _other_limits(self) -> list[str]:
        any_size, rounding = self.first_of_any_size, self.first_beyond_rounding
        said = []
        if any_size is not None and _place(any_size) != _place(self.first):
            said.append(f"The first difference of any size is {any_size.describe()}.")
        if self.first is not None and rounding is None:
            said.append("No difference is larger than rounding explains.")
        elif rounding is not None and _place(rounding) != _place(self.first):
            said.append(f"More than rounding explains: first {rounding.describe()}.")
        return said

    def shown_rows(self, most: int) -> list[Row]:
        """The rows that say most: those beyond the tolerance, as they follow; else the largest."""
        beyond = [row for row in self.rows if row.first is not None]
        beyond.sort(key=lambda row: row.first.step if row.first else 0)
        largest = sorted((row for row in self.rows if row.decides), key=lambda row: -row.largest)
        return (beyond or [row for row in largest if row.largest > 0])[:most]

    def render(self, columns: int = _COLUMNS) -> str:
        """The answer as text of at most so many columns."""
        out, last = [], ""
        for label, text in self.lines():
            room = max(columns - _INDENT, 20)
            wrapped = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [
                ""
            ]
            out.append(f"{'' if label == last else label:{_INDENT}}{wrapped[0]}")
            out += [f"{'':{_INDENT}}{line}" for line in wrapped[1:]]
            last = label
        return "\n".join(out)

    def __str__(self) -> str:
        return self.render()

    def to_dict(self) -> dict[str, object]:
        """The result for JSON: NaN becomes null, infinities "inf" and "-inf"."""
        names = (
            "a", "b", "agree", "answer", "reading", "differs", "notes", "tolerance", "steps",
            "blocks", "losses",
        )  # fmt: skip
        document: dict[str, object] = {name: getattr(self, name) for name in names}
        for name in ("first", "first_of_any_size", "first_beyond_rounding"):
            found: Parting | None = getattr(self, name)
            document[name] = None if found is None else asdict(found)
        document["differs"] = {key: list(both) for key, both in self.differs.items()}
        document["metrics"] = [asdict(row) for row in self.rows]
        return {key: plain(value) for key, value in document.items()}


def _place(found: Parting | None) -> tuple[object, ...] | None:
    return None if found is None else (found.step, found.block, found.metric)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _steps(steps: tuple[int, ...]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"{len(steps)} recorded steps from {steps[0]} to {steps[-1]}" if steps else "no step"
