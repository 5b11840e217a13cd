"""The verdict on a run: what happened, where, since when, why, and what to look at next."""

import functools
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from resdiag.diagnose.advice import plots
from resdiag.diagnose.breakdown import EXPLODED
from resdiag.diagnose.finding import Evidence, Finding, NotJudged, Rule, Threshold, plain
from resdiag.diagnose.learning import STALLED
from resdiag.diagnose.progress import (
    LEAST_CHECKS,
    LEAST_LOSSES,
    find_doubts,
    has_learned,
    span_words,
)
from resdiag.diagnose.rates import LR_TOO_HIGH
from resdiag.diagnose.registry import (
    CAUSES_FROM_THE_START,
    FINDINGS,
    HEALTHY,
    UNDETERMINED,
    is_built_in,
)
from resdiag.diagnose.rundata import RunData
from resdiag.runs.folder import Run
from resdiag.runs.watched import load_run
from resdiag.runs.watched_config import WatchedConfig

if TYPE_CHECKING:
    from resdiag.watch.loop.monitor import Monitor

FIRST_STEPS = Threshold(
    5, "Steps after which a fault is sudden that is dated no later than a loss that gets worse."
)
_CAUSES_OF_A_STALL = {
    "data_fault": "a fault of the inputs",
    "loss_fault": "a fault of the loss",
    "vanishing": "a vanishing signal or gradient",
    "frozen_block": "blocks that do not move",
    "dead_block": "dead blocks",
    "saturated_block": "saturated units",
    "lr_too_low": "too small updates",
    "lr_too_high": "a learning rate that is too high",
}
"""Rules that would explain why a network guesses, in words."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Verdict:
    """The conclusion on one run.

    Attributes:
        name: The most upstream rule that reported something, a key of `resdiag.FINDINGS`; "healthy"
            where none did and the run shows that it learns; else "undetermined".
        cause: The cause in a few words; "" if no rule names the verdict.
        step: Step since when; None if it covers the run or no rule names the verdict.
        block: Index of the first block concerned; None if none can be named.
        summary: One sentence.
        why: One or two sentences naming the mechanism, theory beside measurement; of an
            undetermined run what is missing.
        evidence: The numbers of every rule that reported something, the verdict's own first.
        next: Commands to run, or what to change, next.
        findings: What every rule reported, in the order of `resdiag.FINDINGS`; conditions that did
            not keep the run from learning stand last.
        not_judged: Rules that could not be applied, each with its reason.
        waiting: Those of `not_judged` that a longer run would answer, with what they need.
        checks: How many rules had all that they need, and how many apply to such a run.
    """

    name: str
    cause: str = ""
    step: int | None = None
    block: int | None = None
    summary: str
    why: str
    evidence: tuple[Evidence, ...] = ()
    next: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    not_judged: tuple[str, ...] = ()
    waiting: tuple[NotJudged, ...] = ()
    checks: tuple[int, int] = (0, 0)

    @property
    def is_named(self) -> bool:
        """Whether a rule names the verdict: it is neither healthy nor undetermined."""
        return self.name not in (HEALTHY, UNDETERMINED)

    def to_dict(self) -> dict[str, object]:
        """The verdict for JSON: NaN becomes null, infinities "inf" and "-inf"."""
        return {name: plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Verdict":
        """What `to_dict` wrote, perhaps of an older version: what is missing is unknown."""
        waiting = [{"name": "", "reason": "", **entry} for entry in document.get("waiting", ())]
        whole, applied = document.get("checks", (0, 0))
        return cls(
            **{name: str(document.get(name, "")) for name in ("name", "cause", "summary", "why")},
            step=document.get("step"),
            block=document.get("block"),
            evidence=tuple(map(Evidence.from_dict, document.get("evidence", ()))),
            next=tuple(map(str, document.get("next", ()))),
            findings=tuple(map(Finding.from_dict, document.get("findings", ()))),
            not_judged=tuple(map(str, document.get("not_judged", ()))),
            waiting=tuple(NotJudged(**entry) for entry in waiting),
            checks=(whole, applied),
        )

    def __repr__(self) -> str:
        from resdiag.diagnose.text import title

        return f"<Verdict {title(self)}. {self.summary}>"

    def __str__(self) -> str:
        """The text of `resdiag explain`, see `resdiag.diagnose.text.render`."""
        from resdiag.diagnose.text import render

        return render(self)

    def _repr_html_(self) -> str:
        from resdiag.diagnose.text import to_html

        return to_html(self)


Said = TypeVar("Said", Finding, Verdict)


def judge(run: "str | os.PathLike[str] | Run | Monitor") -> Verdict:
    """Judge a run by every rule of `resdiag.FINDINGS`; the most upstream one names it.

    A run that grew at initialisation and broke down later is `grows_at_init`: that is the cause;
    its summary says both. A condition, such as that growth, does not name the verdict on a run that
    learned all the same. Where no rule reports anything, the run is healthy only if a third of
    the rules had what they need, and if it shows that it learns: 20 losses or more, the last
    below that of guessing, or falling where that is not known. Else it is undetermined, as is a
    run of `resdiag run` that was stopped before its end. No rule
    raises on a missing or odd column: what cannot be judged is listed in `not_judged`.

    Args:
        run: A run's folder, a run, or a monitor; it may still be in progress.

    Raises:
        UsageError: There is no run in the folder, or a file of it is damaged.
    """
    run = load_run(run)
    seen = RunData(run)
    outcomes = {row.name: _apply(row, seen) for row in FINDINGS.values()}
    every = [outcome for of_rule in outcomes.values() for outcome in of_rule]
    unanswered = [i for i in every if isinstance(i, NotJudged)]
    open_questions = [str(i) for i in unanswered]
    far = f"step {run.steps} of {run.config.steps}"
    is_whole = run.status == "diverged" or run.steps >= run.config.steps
    if not is_whole:
        open_questions.append(f"the rest of the run: it is at {far} ({run.status})")
    doubts, checks = [*find_doubts(seen)], _count_checks(outcomes, seen)
    # what model and loop consist of says little about how the training goes
    of_numbers = {n: of for n, of in outcomes.items() if FINDINGS[n].needs != ("inventory",)}
    whole, applied = _count_checks(of_numbers, seen)
    if whole < LEAST_CHECKS * applied:
        doubts.append(f"only {whole} of {applied} checks had the numbers that they need")
    found = [_of_run(i, run) for i in every if isinstance(i, Finding)]
    found.sort(key=functools.partial(_place, worse=_dates(found, LR_TOO_HIGH.name)))
    broke = EXPLODED.name in {finding.name for finding in found}
    survived = not doubts and not broke and has_learned(seen)
    # the loops of others stop early for reasons of their own, and are judged by what they did
    if run.status == "stopped" and not is_whole and not isinstance(run.config, WatchedConfig):
        doubts.append(f"the run was stopped at {far}")
    naming = [i for i in found if not (survived and FINDINGS[i.name].is_condition)]
    findings = (*naming, *(i for i in found if i not in naming))
    verdict = (
        _named(naming[0], seen, outcomes) if naming else _unnamed(seen, doubts, checks, findings)
    )
    return replace(
        _of_run(verdict, run),
        # a breakdown is evidence of two rules, and said once
        evidence=_once([item for finding in findings for item in finding.evidence]),
        findings=findings,
        not_judged=tuple(open_questions),
        waiting=tuple(i for i in unanswered if i.needs),
        checks=checks,
    )


def _apply(row: Rule, seen: RunData) -> list[Finding | NotJudged]:
    if is_built_in(row):
        return list(row.judge(seen))
    try:
        return list(row.judge(seen))
    except Exception as error:  # somebody else's rule must not take the verdict from a run
        return [row.not_judged(f"{type(error).__name__}: {error}")]


def _of_run(said: Said, run: Run) -> Said:
    """With the run's folder behind the commands that draw it; in Python if a monitor holds it."""
    return replace(said, next=tuple(_draw_of_run(line, run) for line in said.next))


def _draw_of_run(line: str, run: Run) -> str:
    match = re.fullmatch(r"resdiag plot (\w+)", line)
    if match is None:
        return line
    if run.path != Path():
        return f"{line} {shlex.quote(str(run.path))}"
    return f'resdiag.draw("{match[1]}", monitor)' if isinstance(run.config, WatchedConfig) else line


def _dates(found: Sequence[Finding], name: str) -> int:
    """Since when a rule reports something; 0 if it does not, or of the whole run."""
    return max((finding.step or 0 for finding in found if finding.name == name), default=0)


def _place(finding: Finding, worse: int) -> int:
    """Where a finding stands among causes and consequences.

    What came with training is a consequence, unless the training went well until then: `worse` is
    the step since when the learning rate seems too high.
    """
    step = finding.step or 0
    late = finding.name in CAUSES_FROM_THE_START and step > 0
    sudden = FIRST_STEPS < step <= worse
    return list(FINDINGS).index("exploded" if late and not sudden else finding.name)


def _count_checks(
    outcomes: Mapping[str, Sequence[Finding | NotJudged]], seen: RunData
) -> tuple[int, int]:
    """How many rules had all that they need, and how many apply."""
    applied = whole = 0
    for name, of_rule in outcomes.items():
        missing = [outcome for outcome in of_rule if isinstance(outcome, NotJudged)]
        if all(outcome.applies for outcome in missing):
            applied += 1
            whole += not missing and all(seen.has(need) for need in FINDINGS[name].needs)
    return whole, applied


def _named(
    first: Finding, seen: RunData, outcomes: Mapping[str, Sequence[Finding | NotJudged]]
) -> Verdict:
    why, commands = first.why, first.next
    if first.name == STALLED.name:
        why, commands = f"{why} {_describe_search(seen, outcomes)}", (*_ask(seen), *commands)
    return Verdict(
        name=first.name, cause=first.cause, step=first.step, block=first.block,
        summary=first.summary, why=why, next=commands,
    )  # fmt: skip


def _describe_search(seen: RunData, outcomes: Mapping[str, Sequence[Finding | NotJudged]]) -> str:
    """Which causes of a stall the record rules out, and which it cannot."""
    known = [name for name in _CAUSES_OF_A_STALL if name in outcomes and not outcomes[name]]
    out = [name for name in known if all(seen.has(need) for need in FINDINGS[name].needs)]
    words = {name: text for name, text in _CAUSES_OF_A_STALL.items() if name in FINDINGS}
    found = [name for name, of_rule in outcomes.items() if name not in known
             and any(isinstance(one, Finding) for one in of_rule)]  # fmt: skip
    not_judged = [text for name, text in words.items() if name not in (*out, *found)]
    text = f"Looked for and not found: {', '.join(words[name] for name in out) or 'nothing'}."
    return f"{text} Could not be judged: {', '.join(not_judged)}." if not_judged else text


def _ask(seen: RunData) -> tuple[str, ...]:
    """How to find out by experiments on one batch what the record alone does not say."""
    why = "memorises one batch, sweeps the rate, checks gradients"
    if isinstance(seen.run.config, WatchedConfig):
        return (f"resdiag.examine(model, batch, optimizer=optimizer)  # {why}",)
    path = "RUN" if seen.run.path == Path() else shlex.quote(str(seen.run.path))
    return (f"resdiag explain {path} --ask  # {why}",)


def _unnamed(
    seen: RunData, doubts: Sequence[str], checks: tuple[int, int], conditions: Sequence[Finding]
) -> Verdict:
    """No rule names the verdict; how far the run went is said, not what it may still do."""
    losses = seen.series("loss")
    span = f" in {span_words(losses)}, last loss {losses.iloc[-1]:.3g}" if len(losses) else ""
    if len(losses) and seen.classes:
        span += f" (guessing is {math.log(seen.classes):.3g})"
    summary = f"No rule reports a fault{span}; {checks[0]} of {checks[1]} checks could run in full."
    for condition in conditions:
        summary += f" It learns although {condition.name} was found: {condition.summary}"
    if not doubts:
        why = "Growth, gradients, skip path and loss stayed within the thresholds of every rule"
        why += f" that could be applied, and {_describe_learning(seen)}."
        kinds = plots("signal", "gradnorms", "biasshift")
        return Verdict(name=HEALTHY, summary=summary, why=why, next=kinds)
    why = "That does not show that the training works: " + "; ".join(doubts) + "."
    notes = [f"The recording says: {note}" for note in seen.run.notes[:2]]
    return Verdict(
        name=UNDETERMINED, summary=summary, why=" ".join([why, *notes]), next=_missing(seen)
    )


def _describe_learning(seen: RunData) -> str:
    return "the loss is below that of guessing" if seen.classes else "the loss falls"


def _missing(seen: RunData) -> tuple[str, ...]:
    """How an undetermined run would become one that can be judged."""
    foreign, found = isinstance(seen.run.config, WatchedConfig), []
    if foreign and seen.series("loss").empty:
        found.append("monitor.step(loss) tells the loss")
    if foreign and not seen.has("update_ratio"):
        found.append("attach(model, optimizer=optimizer) records the updates")
    return (*found, f"train {LEAST_LOSSES:g} steps or more and judge again", *_ask(seen))


def _once(items: list[Evidence]) -> tuple[Evidence, ...]:
    """Without repetitions, in order; compared by their words, for NaN differs from itself."""
    return tuple({(item.metric, item.text): item for item in reversed(items)}.values())[::-1]
