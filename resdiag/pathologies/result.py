"""What became of one case: what was planted, what the verdict said, and whether that is right."""

import math
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from resdiag.diagnose.finding import plain
from resdiag.diagnose.progress import find_doubts
from resdiag.diagnose.registry import HEALTHY, UNDETERMINED
from resdiag.diagnose.rundata import RunData
from resdiag.diagnose.verdict import judge
from resdiag.pathologies.architectures import SETS, Architecture, traits_of
from resdiag.pathologies.grammar import KINDS, WAYS, Case
from resdiag.pathologies.optimizers import OPTIMIZERS
from resdiag.pathologies.tasks import logits_of
from resdiag.pathologies.train import train, train_unwatched
from resdiag.pathologies.trial import Trial

CRASHED = "crashed"
"""The verdict on a case whose training or judgement raised an error."""
_UNSEEN = 901
_HARM = 0.05
"""Rise of the loss, in units of the loss before training, from which on a fault does harm."""
_BY_NAME = {row.name: row for rows in SETS.values() for row in rows}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one case.

    Attributes:
        case: The case.
        family: Family of its architecture.
        wanted: The verdict that names it, "healthy" where nothing is planted.
        wanted_cause: Words that the verdict's cause should contain; "" if any will do.
        also: Other verdicts that say the same.
        blocks: Indices of which one should be named; () where the fault is in no single block.
        verdict: The verdict that was given.
        cause: Its cause.
        block: The block that it names.
        step: The step since when.
        findings: Every finding: name, cause, block, step; the verdict's first.
        doubts: What is missing to say that the run learns.
        losses: Mean over the first and the last fifth of the training.
        harm: Whether the training ends worse than its healthy twin; None if not compared.
        error: Of a case that crashed, the end of its traceback.
    """

    case: Case
    family: str
    wanted: str
    wanted_cause: str = ""
    also: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    verdict: str = ""
    cause: str = ""
    block: int | None = None
    step: int | None = None
    findings: tuple[tuple[str, str, int | None, int | None], ...] = ()
    doubts: tuple[str, ...] = ()
    losses: tuple[float | None, float | None] = (None, None)
    harm: bool | None = None
    error: str = ""

    @property
    def is_planted(self) -> bool:
        """Whether it has a fault that counts: one that does harm, as far as that was compared."""
        return bool(self.case.kind) and self.harm is not False

    @property
    def is_healthy(self) -> bool:
        """Whether nothing was planted."""
        return not self.case.kind

    @property
    def names_a_fault(self) -> bool:
        """Whether the verdict is a finding, right or wrong."""
        return self.verdict not in (HEALTHY, UNDETERMINED, CRASHED)

    @property
    def is_right(self) -> bool:
        """Whether the verdict and its cause are those of what was planted."""
        if self.is_healthy:
            return not self.names_a_fault and self.verdict != CRASHED
        if self.verdict in self.also:
            return True
        return self.verdict == self.wanted and self.wanted_cause in self.cause

    @property
    def names_the_block(self) -> bool:
        """Whether a block is planted and the verdict names it."""
        return self.block in self.blocks

    @property
    def date_error(self) -> int:
        """Steps between the fault's begin and the verdict's; a verdict on the run dates it 0."""
        return abs((self.step or 0) - self.case.onset)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what has its default value is left out."""
        made = {"family": self.family, **_without_defaults(self.case)}
        rest = {k: v for k, v in _without_defaults(self).items() if k not in ("case", "family")}
        return {str(key): plain(value) for key, value in {**made, **rest}.items()}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Result":
        """The inverse of `to_dict`."""
        own = {entry.name for entry in fields(Case)}
        case = Case(**{k: _frozen(v) for k, v in document.items() if k in own})
        rest = {k: _frozen(v) for k, v in document.items() if k not in own}
        return cls(case=case, **rest)


def _without_defaults(row: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        entry.name: getattr(row, entry.name)
        for entry in fields(row)
        if getattr(row, entry.name) != entry.default
    }


def _frozen(value: Any) -> Any:  # noqa: ANN401
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def prepare(case: Case) -> Trial:
    """Build the network and plant the fault, or follow the recipe; the random state is seeded."""
    torch.manual_seed(case.seed)
    row = _BY_NAME[case.architecture]
    uses_sgd, factor, _ = OPTIMIZERS[case.optimizer]
    task = row.learns
    trial = Trial(
        architecture=row,
        model=row.build(),
        blocks=traits_of(row).blocks,
        at=case.at,
        onset=case.onset,
        strength=case.strength,
        seed=case.seed,
        optimizer=case.optimizer,
        lr=factor * (row.sgd if uses_sgd else row.adam),
        decay=1e-4 if uses_sgd else 0.01,
        samples=row.samples,
        told=case.told,
        loss=lambda output, targets, step: task.loss(output, targets),
    )
    if case.kind:
        KINDS[case.kind].plant(trial)
    elif case.recipe:
        WAYS[case.recipe].prepare(trial)
    return trial


def try_case(case: Case) -> Result:
    """Train one case and judge what was recorded; an error becomes the result "crashed"."""
    expected = _expected(case)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            return _judged(case, expected)
        except Exception:
            lines = traceback.format_exc().strip().splitlines()
            error = " | ".join(line.strip() for line in lines[-3:])
            return replace(expected, verdict=CRASHED, error=error[-300:])


def _expected(case: Case) -> Result:
    row: Architecture = _BY_NAME[case.architecture]
    if not case.kind:
        return Result(case=case, family=row.family, wanted=HEALTHY)
    kind = KINDS[case.kind]
    placed = case.extent in ("one", "stage")
    return Result(
        case=case,
        family=row.family,
        wanted=kind.finding,
        wanted_cause=kind.cause,
        also=kind.also,
        blocks=tuple(case.at[0] + shift for shift in kind.shifts) if placed else (),
    )


def _judged(case: Case, expected: Result) -> Result:
    trial = prepare(case)
    run, losses = train(trial)
    verdict = judge(run)
    harm = None
    if case.kind and KINDS[case.kind].hurts:
        harm = _does_harm(case, trial)
    fifth = max(1, len(losses) // 5)
    return replace(
        expected,
        verdict=verdict.name,
        cause=verdict.cause,
        block=verdict.block,
        step=verdict.step,
        findings=tuple((f.name, f.cause, f.block, f.step) for f in verdict.findings),
        doubts=tuple(find_doubts(RunData(run))),
        losses=(_mean(losses[:fifth]), _mean(losses[-fifth:])),
        harm=harm,
    )


def _mean(values: list[float]) -> float | None:
    mean = sum(values) / len(values)
    return float(f"{mean:.4g}") if math.isfinite(mean) else None


def _does_harm(case: Case, trial: Trial) -> bool:
    """Whether the trained model is worse than one that was trained without the fault."""
    twin = prepare(replace(case, kind=""))
    before = _loss_on_unseen(twin)
    train_unwatched(twin)
    rise = _loss_on_unseen(trial) - _loss_on_unseen(twin)
    return not rise <= _HARM * before


def _loss_on_unseen(trial: Trial) -> float:
    """The task's own loss on four batches that no training sees, in training mode."""
    task, losses = trial.architecture.learns, []
    with torch.no_grad():
        for index in range(4):
            inputs, targets = task.batch(_UNSEEN, index, max(8, trial.samples))
            losses.append(float(task.loss(logits_of(trial.model(inputs)), targets)))
    return sum(losses) / len(losses)
