"""How often the verdict is right: trainings with a planted fault, and healthy ones."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from planted.faults import FAULTS
from planted.networks import DEVELOPMENT, HEALTHY, HELD_OUT, SmallNetwork, draw, loss_of
from planted.trial import Fault, Trial

from resdiag.diagnose.verdict import judge
from resdiag.runs.folder import Run
from resdiag.runs.watched import as_run
from resdiag.watch.find.blocks import find_blocks
from resdiag.watch.loop.attach import attach

_CHEAP = ("residual-mlp", "plain-bn", "bare-plain", "bare-residual", "residual-mlp-gelu")
_QUICK = 24


@dataclass(frozen=True)
class Case:
    """One training of the suite.

    Attributes:
        network: The network.
        fault: What is planted; None for a healthy training.
        seed: Of weights and batches; it also chooses the block.
        strength: Factor on the fault's magnitude.
        told: Whether the loop tells the monitor its loss.
    """

    network: SmallNetwork
    fault: Fault | None
    seed: int
    strength: float = 1.0
    told: bool = True

    @property
    def name(self) -> str:
        """What it is called in a table of cases."""
        return f"{self.fault.name if self.fault else 'healthy'} | {self.network.name} | {self.seed}"


def prepare(case: Case) -> Trial:
    """Build the network and plant the fault; the global random state is seeded."""
    torch.manual_seed(case.seed)
    network = case.network
    model = network.build()
    images, _ = draw(network, case.seed, 0)
    blocks = find_blocks(model, images, blocks=network.units or None)
    residual = [b.index for b in blocks if not b.transition or b.index == 0] or [0]
    at = residual[(1 + 2 * case.seed) % len(residual)]
    trial = Trial(network, model, blocks, at, case.strength, network.lr)
    if case.fault is not None:
        case.fault.plant(trial)
    elif case.told:
        trial.steps, trial.evaluate = 120, 12  # `overfit` has something to be wrong about
    return trial


def train(case: Case, trial: Trial) -> Run:
    """Train as anybody would, watched; what was recorded."""
    network, model = case.network, trial.model
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if network.optimizer == "adam":
        optimizer = torch.optim.AdamW(trained, trial.lr, weight_decay=trial.decay)
    else:
        optimizer = torch.optim.SGD(
            trained, trial.lr, momentum=trial.momentum, weight_decay=trial.decay
        )
    losses: list[float] = []
    curve: dict[str, list[float]] = {name: [] for name in ("step", "train_loss", "test_loss")}
    with attach(model, optimizer=optimizer, blocks=network.units or None) as monitor:
        for step in range(trial.steps):
            trial.step = step
            batch = trial.change(draw(network, case.seed, step), step)
            loss = trial.weigh(loss_of(model, batch))
            optimizer.zero_grad()
            loss.backward()
            trial.before(step)
            if trial.updates:
                optimizer.step()
            monitor.step(loss=loss if case.told else None)
            losses.append(float(loss.detach()))
            if trial.evaluate and (step + 1) % trial.evaluate == 0:
                seen = losses[-trial.evaluate :]
                values = (step, sum(seen) / len(seen), evaluate(case, model))
                for column, value in zip(curve.values(), values, strict=True):
                    column.append(value)
    run = as_run(
        monitor, model=network.name, data=network.task, curve=curve if trial.evaluate else None
    )
    return replace(run, config=replace(run.config, variant=trial.variant))


def evaluate(case: Case, model: torch.nn.Module) -> float:
    """Mean loss on four batches of a seed that no training of the suite has."""
    model.eval()
    with torch.no_grad():
        losses = [float(loss_of(model, draw(case.network, 900, i))) for i in range(4)]
    model.train()
    return sum(losses) / len(losses)


SETS = ("development", "held-out", "fresh")
"""Where thresholds were set; where they were first tried; drawn after the last change of any."""


def cases(which: str) -> list[Case]:
    """The trainings of one set, in order.

    Args:
        which: "development"; "held-out", other networks, seeds and magnitudes; "fresh", those
            networks with a further seed; or "quick", a few of the cheapest of the first two, for a
            continuous test.
    """
    if which == "quick":
        some = [c for c in [*cases("development"), *cases("held-out")] if c.network.name in _CHEAP]
        some = [c for c in some if c.seed in (0, 7)]
        healthy = [c for c in some[1::2] if c.fault is None]  # every one of them, of ill ones half
        return [*some[::2], *healthy][:_QUICK]
    networks = DEVELOPMENT if which == "development" else HELD_OUT
    seeds, strengths, each = {
        "development": ((0,), (1.0,), 2),
        "held-out": ((7, 8), (0.5, 3.0), 2),
        "fresh": ((21,), (2.0,), 1),
    }[which]
    found = []
    for seed, strength in zip(seeds, strengths, strict=True):
        also = HEALTHY if seed == 7 else ()
        found += [Case(network, None, seed) for network in (*networks, *also)]
        for index, fault in enumerate(FAULTS):
            fit = [p for p in networks if not fault.makes or p.name.startswith(fault.makes)]
            chosen = dict.fromkeys((index + 3 * seed + j) % len(fit) for j in range(each) if fit)
            for j, place in enumerate(chosen):
                factor = strength if fault.scales else 1.0
                found.append(Case(fit[place], fault, seed, factor, (index + j) % 2 == 0))
    return found


@dataclass(frozen=True)
class Result:
    """What became of one case.

    Attributes:
        name: Of the case.
        set: One of `SETS`, or "quick".
        fault: What was planted, "" for none.
        wanted: The verdict that names it.
        block: The planted block; None where it is in none.
        verdict: The verdict that was given.
        named: The block that it named.
        findings: Every finding, the verdict's first.
        cause: The verdict's cause.
    """

    name: str
    set: str
    fault: str
    wanted: str
    block: int | None
    verdict: str
    named: int | None
    findings: tuple[str, ...]
    cause: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "findings": list(self.findings)}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Result":
        """The inverse of `to_dict`."""
        return cls(**{**document, "findings": tuple(document["findings"])})


def try_case(case: Case, which: str) -> Result:
    """Train one case and judge what was recorded; warnings of the monitor are left aside."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        trial = prepare(case)
        return assess(case, which, trial.at, train(case, trial))


def assess(case: Case, which: str, at: int, run: Run) -> Result:
    """Judge a run beside what was planted in it."""
    verdict = judge(run)
    fault = case.fault
    return Result(
        name=case.name,
        set=which,
        fault=fault.name if fault else "",
        wanted=fault.finding if fault else "healthy",
        block=at if fault and fault.where else None,
        verdict=verdict.name,
        named=verdict.block,
        findings=tuple(finding.name for finding in verdict.findings),
        cause=verdict.cause,
    )


@dataclass(frozen=True)
class Score:
    """How often one verdict was right.

    Attributes:
        finding: Its name; "all" for the sum over findings, "healthy" for trainings without a fault.
        planted: Cases in which it was the right one.
        given: Cases in which it was given.
        right: Cases in which it was both.
    """

    finding: str
    planted: int
    given: int
    right: int

    @property
    def counts(self) -> tuple[int, int, int]:
        """Planted, given, right."""
        return self.planted, self.given, self.right

    @property
    def precision(self) -> float:
        """Share of the right ones among those given; NaN if none was."""
        return self.right / self.given if self.given else math.nan

    @property
    def recall(self) -> float:
        """Share of the given ones among those planted; NaN if none was."""
        return self.right / self.planted if self.planted else math.nan


def score(results: Sequence[Result]) -> list[Score]:
    """Per verdict, "all" findings at the end, without "healthy"."""
    ill = dict.fromkeys(r.wanted for r in results if r.wanted != "healthy")
    names = [*ill, *dict.fromkeys(r.verdict for r in results if r.verdict not in {*ill, "healthy"})]
    rows = [
        Score(
            name,
            sum(r.wanted == name for r in results),
            sum(r.verdict == name for r in results),
            sum(r.wanted == r.verdict == name for r in results),
        )
        for name in ("healthy", *names)
    ]
    total = [sum(column) for column in zip(*(row.counts for row in rows[1:]), strict=True)]
    return [*rows, Score("all findings", *(total or [0, 0, 0]))]


def count_blocks_named(results: Sequence[Result]) -> tuple[int, int]:
    """Of the cases with an ill block: in how many it was named, and how many there are."""
    placed = [r for r in results if r.block is not None]
    return sum(r.named == r.block and r.verdict == r.wanted for r in placed), len(placed)


def count_false_alarms(results: Sequence[Result]) -> tuple[int, int]:
    """Of the healthy trainings: how many had any finding, and how many there are."""
    healthy = [r for r in results if not r.fault]
    return sum(bool(r.findings) for r in healthy), len(healthy)
