"""What an intervention did: a control and a changed arm per seed, and whether it cures a claim."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from resdiag.data.dataset import ImageData, open_data
from resdiag.data.registry import known_specs
from resdiag.diagnose.registry import FINDINGS, HEALTHY
from resdiag.errors import UsageError, unknown
from resdiag.interventions.additions import Site, find_sites, pick_sites
from resdiag.interventions.arms import ArmResult, train_arm
from resdiag.interventions.starts import ModelStart, StartingPoint, VariantStart, last_checkpoint
from resdiag.interventions.table import (
    Intervention,
    find_for_model,
    find_for_variant,
    models_interventions,
    propose,
)
from resdiag.models.source import build_source
from resdiag.probe.batch import load_weights
from resdiag.runs.checkpoint import Checkpoint
from resdiag.runs.config import RunConfig
from resdiag.runs.folder import Run
from resdiag.watch.find.blocks import Block


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One control and one changed arm per seed, each pair on the same batches.

    Attributes:
        intervention: What was changed.
        words: The same in words.
        claim: The finding that it should cure, a name of `resdiag.judge`. "" tests the survival of
            the control, or its loss if it survives.
        control: Arms as they were.
        changed: Arms with the intervention.
    """

    intervention: Intervention
    words: str
    claim: str = ""
    control: tuple[ArmResult, ...]
    changed: tuple[ArmResult, ...]

    @property
    def shown(self) -> bool:
        """Whether every control arm shows what is to be cured."""
        if self.claim in ("", "stalled"):  # a stall takes an epoch: what can be seen is the loss
            return True
        if self.claim in ("exploded", "at_risk"):
            return not any(arm.survived for arm in self.control)
        return all(self.claim in arm.findings for arm in self.control)

    @property
    def confirmed(self) -> bool:
        """Whether it cures the claim, in every seed."""
        return not self.reason

    @property
    def reason(self) -> str:
        """Why it is not confirmed; "" if it is.

        To be confirmed, the changed arms survive; and where the claim is a finding, every control
        has it and no changed arm has it any more (an explosion at initialisation must be gone at
        the first step, not only be survived). Without one: every control died, or the changed arms
        end with a lower loss in every seed, by twice the standard error of the difference.
        """
        if not self.shown:
            return f"the control does not show '{self.claim}' in so few steps"
        died = sum(not arm.survived for arm in self.changed)
        if died:
            return f"{died} of {len(self.changed)} changed arms died"
        if self.claim in ("exploded", "at_risk"):
            return ""
        still = sum(self.claim in arm.findings for arm in self.changed) if self.claim else 0
        remains = f"still '{self.claim}' in {still} of {len(self.changed)} seeds" if still else ""
        if self.claim not in ("", "stalled"):
            return remains
        alive = sum(arm.survived for arm in self.control)
        if not alive or (alive == len(self.control) and self._lowers_loss()):
            return ""
        return remains or "the loss is not lower in every seed by twice the standard error"

    def _lowers_loss(self) -> bool:
        pairs = zip(self.control, self.changed, strict=True)
        gains = np.array([old.losses[-1] - new.losses[-1] for old, new in pairs])
        error = gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
        return bool((gains > 0).all() and gains.mean() > 2 * error)

    def describe(self, lr: float) -> str:
        """One line: what was changed, its effect with the range over seeds, confirmed or not."""
        arms = (self.control, self.changed)
        before, after = (sum(arm.survived for arm in side) for side in arms)
        rate = "" if self.intervention.changes_recipe else f"lr {lr:g} "
        growths = [spread([arm.growth for arm in side]) for side in arms]
        losses = [spread([arm.losses[-1] for arm in side]) for side in arms]
        verdict = "confirmed" if self.confirmed else f"not confirmed ({self.reason})"
        if "skip" in self.claim or self.intervention.reports_skip_gain:
            gains = [spread([arm.skip_gain_end for arm in side]) for side in arms]
            growths = [f"{g}, skip gain {p}" for g, p in zip(growths, gains, strict=True)]
        return (
            f"{self.words}: growth per block {growths[0]} -> {growths[1]}, survives "
            f"{rate}in {before} -> {after} of {len(self.control)} seeds, last loss {losses[0]} -> "
            f"{losses[1]}: {verdict}"
        )

    def to_dict(self) -> dict[str, object]:
        """Numbers per seed."""
        return {
            "name": self.intervention.name,
            "words": self.words,
            "claim": self.claim,
            "confirmed": self.confirmed,
            "reason": self.reason,
            "control": [arm.to_dict() for arm in self.control],
            "changed": [arm.to_dict() for arm in self.changed],
        }


def spread(values: Sequence[float]) -> str:
    """Lowest and highest, once if they are the same.

    >>> spread([1.0, 1.5, 1.25])
    '1..1.5'
    """
    low, high = min(values), max(values)
    texts = f"{low:.3g}", f"{high:.3g}"
    return texts[0] if texts[0] == texts[1] else f"{texts[0]}..{texts[1]}"


def compare_arms(
    starts: Sequence[StartingPoint],
    interventions: Sequence[Intervention],
    *,
    claim: str = "",
    steps: int = 10,
) -> list[Effect]:
    """Train a control and an arm per intervention from each start, on the same batches.

    Args:
        starts: One per seed.
        interventions: Rows, which need not be in the table.
        claim: See `Effect`.
        steps: Of each arm; an arm ends when it dies.
    """
    control = tuple(train_arm(start.prepare(), steps) for start in starts)
    return [
        Effect(
            intervention=row,
            words=starts[0].words_for(row),
            claim=claim,
            control=control,
            changed=tuple(train_arm(start.prepare(row), steps) for start in starts),
        )
        for row in interventions
    ]


def run_lesions(
    config: RunConfig,
    data: ImageData,
    names: Sequence[str],
    *,
    claim: str = "",
    seeds: int = 3,
    steps: int = 10,
    checkpoint: Checkpoint | None = None,
) -> list[Effect]:
    """Compare interventions on a run of one of the variants.

    Args:
        config: The run; its seed is the first one.
        data: Its images.
        names: Of `INTERVENTIONS`.
        claim: See `Effect`.
        seeds: How many: initialisations, or with a checkpoint data orders.
        steps: Steps of each arm; an arm ends when it dies.
        checkpoint: Where both arms start; None is the initialisation.

    Raises:
        UsageError: A name is unknown, changes nothing about the variant, or changes the initial
            weights of a checkpoint.
    """
    rows = [find_for_variant(name, config.variant) for name in names]
    starts = [
        VariantStart(replace(config, seed=config.seed + i, device="cpu"), data, checkpoint)
        for i in range(seeds)
    ]
    return compare_arms(starts, rows, claim=claim, steps=steps)


def prove(
    run: Run,
    verdict: str,
    names: Sequence[str],
    data: ImageData,
    *,
    seeds: int,
    steps: int,
    from_checkpoint: bool = False,
) -> list[Effect]:
    """Test the verdict on a run by the interventions named, or by those that are its remedies.

    Args:
        run: Of one of the variants.
        verdict: Its name: the claim, if a finding names it.
        names: Of `INTERVENTIONS`; none takes what the verdict proposes.
        data: The images of the run.
        seeds: How many.
        steps: Steps of each arm.
        from_checkpoint: Whether to start from the run's last checkpoint.

    Raises:
        UsageError: The run is of another model, an intervention is not one of its variant's, or it
            has no checkpoint to start from.
    """
    config = run.config
    if not isinstance(config, RunConfig):
        raise UsageError(
            "lesions of a run need a run of one of the variants", "resdiag lesion MODEL"
        )
    return run_lesions(
        config,
        data,
        list(names) or propose(verdict, config.variant),
        claim=verdict if verdict in FINDINGS else "",
        seeds=seeds,
        steps=steps,
        checkpoint=last_checkpoint(run) if from_checkpoint else None,
    )


def try_on_model(
    model: str,
    names: Sequence[str] = (),
    arguments: Mapping[str, Any] | None = None,
    *,
    blocks: Sequence[int | str] | None = None,
    shape: Sequence[int] | None = None,
    batch_size: int = 8,
    weights: Path | None = None,
    lr: float = 0.01,
    claim: str = "",
    seeds: int = 3,
    steps: int = 5,
) -> list[Effect]:
    """Compare interventions on any model, on generated batches with random labels.

    Args:
        model: See `resdiag.models.source`.
        names: Of interventions that change additions; none takes all that the model can have.
        arguments: Of its factory or configuration.
        blocks: Indices or names of the blocks to change; None changes all.
        shape: Shape of one sample of the main input.
        batch_size: Samples.
        weights: A state_dict to start from; None is the initialisation of each seed.
        lr: Of plain SGD with momentum 0.9.
        claim: The finding to be cured, see `Effect`.
        seeds: How many: initialisations, or with weights batches.
        steps: Of each arm.

    Raises:
        UsageError: The model, an intervention or a block is unknown, or does not fit the model.
    """
    if not 0 < lr < math.inf:
        raise UsageError(f"--lr {lr} must be positive")
    if claim and claim not in (*FINDINGS, HEALTHY):
        raise unknown("finding", claim, (*FINDINGS, HEALTHY))

    def start_of(seed: int) -> ModelStart:
        built = build_source(model, dict(arguments or {}), seed=0 if weights else seed)
        if weights:
            load_weights(built.model, weights)
        return ModelStart(built, lr, blocks, shape, batch_size, seed)

    first = start_of(0)
    # looked up after the model's module was imported, which may register interventions
    rows = [find_for_model(name) for name in names]
    example = first.example(0)
    found, sites = find_sites(first.built.model, *example.args, **example.kwargs)
    if not found:
        raise UsageError(f"{model} has no residual addition")
    starts = [first, *map(start_of, range(1, seeds))]
    return compare_arms(starts, rows or _applicable(found, sites, blocks), claim=claim, steps=steps)


def _applicable(
    found: Sequence[Block], sites: Sequence[Site], blocks: Sequence[int | str] | None
) -> list[Intervention]:
    """The interventions that the chosen blocks can have."""
    rows, refusals = list[Intervention](), list[UsageError]()
    for row in map(find_for_model, models_interventions()):
        try:
            if pick_sites(row, found, sites, blocks):
                rows.append(row)
        except UsageError as error:
            refusals.append(error)
    if not rows:
        raise refusals[0] if refusals else UsageError("no intervention can change these blocks")
    return rows


def open_images(run: Run, spec: str = "", root: Path | None = None) -> ImageData:
    """The images of a run.

    Args:
        run: The run.
        spec: Their name as of `--data`; "" takes what the run says.
        root: Folder of downloaded data sets.

    Raises:
        UsageError: The run does not say how to open them, or they are other images.
    """
    name = spec or run.config.data.removesuffix("-jpeg")
    if name not in known_specs() and ":" not in name:
        raise UsageError(
            f"the data set {name!r} of this run cannot be opened by its name", "pass it with --data"
        )
    data = open_data(name, root)
    if data.identity["sha256"] != run.data.get("sha256"):
        raise UsageError(f"this run was not trained on {name}", "pass its data set with --data")
    return data
