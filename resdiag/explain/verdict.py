"""The verdict on a run: what happened, where, since when, why, and what to look at next."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import pandas as pd

from resdiag.explain.finding import Evidence, Finding, plain

NAMES = ("exploded_at_init", "exploded", "skip_collapsed", "stalled", "at_risk", "healthy")
"""Every verdict, most upstream cause first: the first that fires names the run."""


class ConfigLike(Protocol):
    """What a verdict needs of a run's configuration."""

    @property
    def variant(self) -> str: ...
    @property
    def depth(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def momentum(self) -> float: ...


class RunLike(Protocol):
    """What a verdict needs of a run; `resdiag.runs.folder.Run` has it."""

    @property
    def config(self) -> ConfigLike: ...
    @property
    def blocks(self) -> Sequence[Mapping[str, Any]]: ...
    @property
    def status(self) -> str: ...
    @property
    def data(self) -> Mapping[str, Any]: ...
    def metrics(self) -> pd.DataFrame: ...
    def curve(self) -> pd.DataFrame: ...


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The conclusion on one run.

    Attributes:
        name: One of `NAMES`: the most upstream rule that fired.
        step: Step since when; None if it covers the run or nothing fired.
        block: Index of the first block concerned; None if none can be named.
        summary: One sentence.
        why: One or two sentences naming the mechanism, theory beside measurement.
        evidence: The numbers of every rule that fired, the verdict's own first.
        next: Commands to run next.
        findings: Every rule that fired, in the order of `NAMES`.
        not_judged: Rules that could not be applied, each with its reason.
    """

    name: str
    step: int | None = None
    block: int | None = None
    summary: str
    why: str
    evidence: tuple[Evidence, ...] = ()
    next: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    not_judged: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The verdict for JSON: NaN becomes null, infinities "inf" and "-inf"."""
        return {name: plain(value) for name, value in asdict(self).items()}


def judge(run: RunLike) -> Verdict:
    """Judge a run by the rules of science section 3."""
    raise NotImplementedError(run)


def render(verdict: Verdict) -> str:
    """The verdict as plain text: Verdict, Why, Evidence, Next; lines of at most 100 columns."""
    raise NotImplementedError(verdict)
