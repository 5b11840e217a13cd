"""What a lesion did, with its spread over seeds, and whether it cures what the verdict claims."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resdiag.data.dataset import ImageData, open_data
from resdiag.data.registry import known_specs
from resdiag.errors import UsageError
from resdiag.interventions.arm import Arm, Start, last_checkpoint, other_seeds, run_arm
from resdiag.interventions.lesions import Lesion, check_lesion, propose
from resdiag.runs.config import RunConfig
from resdiag.runs.folder import Run


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One control and one changed arm per seed, each pair on the same batches.

    Attributes:
        name: Of the lesion.
        words: What was changed.
        claim: The finding that it should cure, a name of `resdiag.judge`; "" tests what ails the
            control: its death, else its loss.
        control: Arms as the run was.
        changed: Arms with the lesion.
    """

    name: str
    words: str
    claim: str = ""
    control: tuple[Arm, ...]
    changed: tuple[Arm, ...]

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
        """Whether it cures the claim, in every seed.

        The changed arms survive; and where the claim is a finding, every control has it and no
        changed arm has it any more (an explosion at initialisation must be gone at the first step,
        not only be survived). Without one: every control died, or the changed arms end with a
        lower loss in every seed, by twice the standard error of the difference.
        """
        if not self.shown or not all(arm.survived for arm in self.changed):
            return False
        if self.claim in ("exploded", "at_risk"):
            return True
        if self.claim not in ("", "stalled"):
            return not any(self.claim in arm.findings for arm in self.changed)
        if not any(arm.survived for arm in self.control):
            return True
        return all(arm.survived for arm in self.control) and self._lower()

    def _lower(self) -> bool:
        pairs = zip(self.control, self.changed, strict=True)
        gains = np.array([old.losses[-1] - new.losses[-1] for old, new in pairs])
        error = gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
        return bool((gains > 0).all() and gains.mean() > 2 * error)

    @property
    def reason(self) -> str:
        """Why it is not confirmed; "" if it is."""
        if self.confirmed:
            return ""
        if not self.shown:
            return f"the control does not show '{self.claim}' in so few steps"
        died = sum(not arm.survived for arm in self.changed)
        if died:
            return f"{died} of {len(self.changed)} changed arms died"
        still = sum(self.claim in arm.findings for arm in self.changed) if self.claim else 0
        if still:
            return f"still '{self.claim}' in {still} of {len(self.changed)} seeds"
        return "the loss is not lower in every seed by twice the standard error"

    def describe(self, lr: float) -> str:
        """One line: what was changed, its effect with the range over seeds, confirmed or not."""
        arms = (self.control, self.changed)
        before, after = (sum(arm.survived for arm in side) for side in arms)
        rate = "" if self.name in ("lower_lr", "warmup") else f"lr {lr:g} "
        growths = [spread([arm.growth for arm in side]) for side in arms]
        losses = [spread([arm.losses[-1] for arm in side]) for side in arms]
        verdict = "confirmed" if self.confirmed else f"not confirmed ({self.reason})"
        if "skip" in self.claim or self.name in ("no_after_add", "after_add_elu"):
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
            "name": self.name,
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


def run_lesions(
    config: RunConfig,
    data: ImageData,
    names: Sequence[str],
    *,
    claim: str = "",
    seeds: int = 3,
    steps: int = 10,
    start: Start | None = None,
) -> list[Effect]:
    """Run one control and one arm per lesion, each from the same start on the same batches.

    Args:
        config: The run; its seed is the first one.
        data: Its images.
        names: Of `resdiag.interventions.lesions.LESIONS`.
        claim: See `Effect`.
        seeds: How many: initialisations, or with a checkpoint data orders.
        steps: Steps of each arm; an arm ends when it dies.
        start: A checkpoint; None is the initialisation.

    Raises:
        UsageError: See `check_lesion` and `run_arm`.
    """
    lesions = {name: check_lesion(name, config.variant) for name in names}
    return try_lesions(config, data, lesions, claim=claim, seeds=seeds, steps=steps, start=start)


def try_lesions(
    config: RunConfig,
    data: ImageData,
    lesions: dict[str, Lesion],
    *,
    claim: str = "",
    seeds: int = 3,
    steps: int = 10,
    start: Start | None = None,
) -> list[Effect]:
    """As `run_lesions`, of lesions that need not be in the table."""
    runs = other_seeds(config, seeds)
    control = tuple(run_arm(run, data, steps=steps, start=start) for run in runs)
    return [
        Effect(
            name=name,
            words=lesion.words,
            claim=claim,
            control=control,
            changed=tuple(run_arm(run, data, lesion, steps=steps, start=start) for run in runs),
        )
        for name, lesion in lesions.items()
    ]


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
    """Run the lesions named, or those that the verdict proposes, against the verdict's claim.

    Raises:
        UsageError: The run is of a foreign model, a lesion is not one of its variant's, or it has
            no checkpoint to start from.
    """
    config = run.config
    if not isinstance(config, RunConfig):
        raise UsageError(
            "lesions of a run need a run of one of the variants", "resdiag lesion MODEL"
        )
    claim = "" if verdict == "healthy" else verdict
    start = last_checkpoint(run) if from_checkpoint else None
    chosen = list(names) or propose(verdict, config.variant)
    return run_lesions(config, data, chosen, claim=claim, seeds=seeds, steps=steps, start=start)


def open_images(run: Run, spec: str = "", root: Path | None = None) -> ImageData:
    """The images of a run.

    Raises:
        UsageError: The run does not say how to open them, or they are other images.
    """
    name = spec or run.config.data.removesuffix("-jpeg")
    if name not in known_specs() and ":" not in name:
        raise UsageError(f"the images of this run are called {name!r}", "name them with --data")
    data = open_data(name, root)
    if data.identity["sha256"] != run.data.get("sha256"):
        raise UsageError(f"{name} is not what this run was trained on", "name that with --data")
    return data
