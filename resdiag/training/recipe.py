"""Recipes: named defaults that become a complete `RunConfig` once the data set's size is known.

No torch here: a wrong option must be answered before anything slow is imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from resdiag.data.registry import known_specs
from resdiag.errors import UsageError
from resdiag.models.variants import find_variant
from resdiag.runs.config import RunConfig, Settings, check_value, row_of, setting, settings


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train, apart from model and data.

    Attributes:
        steps: Optimizer steps, or 0 to count in epochs.
        epochs: Passes over the training images if `steps` is 0.
        batch_size: Samples per step; the last batch of an epoch has what is left.
        lr: Learning rate.
        milestones: Fractions of the training after which the learning rate is divided by 10.
        record_first: Steps at the start that are all recorded.
        every: Record each `every`-th step after that.
        evaluate: Whether the test error is measured after each epoch; always at the end.
        source: Where the numbers come from.
    """

    steps: int
    epochs: int
    batch_size: int
    lr: float
    milestones: tuple[float, ...]
    record_first: int
    every: int
    evaluate: bool
    source: str


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "short": Recipe(
            steps=60,
            epochs=0,
            batch_size=64,
            lr=0.1,
            milestones=(),
            record_first=20,
            every=5,
            evaluate=False,
            source="the paper's start: an explosion or a collapsed skip path shows within it",
        ),
        "paper": Recipe(
            steps=0,
            epochs=164,
            batch_size=128,
            lr=0.1,
            milestones=(81 / 164, 122 / 164),
            record_first=50,
            every=50,
            evaluate=True,
            source="Shah et al. 2016, 4.1; epochs and Nesterov from fb.resnet.torch",
        ),
    }
)
"""What `--recipe` accepts."""


@settings
class Request(Settings):
    """The settings a user gave: None leaves a number to the recipe."""

    recipe: str = setting(
        "short: the first 60 steps; paper: 164 epochs.", default="short", choices=tuple(RECIPES)
    )
    data: str = setting(f"{', '.join(known_specs())}.", default="auto")
    epochs: int | None = setting(
        "Number of epochs; scales the recipe's milestones.", default=None, least=1
    )

    def check(self) -> None:
        """Refuse what can be refused without reading the data.

        Raises:
            UsageError: A value is not one that its setting can have, or two contradict each other.
        """
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None:
                check_value(entry.name, row_of(entry), value, as_option=True)
        self.check_conflicts(self.device)

    def check_conflicts(self, device: str) -> None:
        """Refuse settings that contradict each other.

        Args:
            device: Where it is to run; "auto" if that is not known yet.

        Raises:
            UsageError: Two do.
        """
        if self.backend == "fast" and not device.startswith(("cpu", "auto")):
            raise UsageError(f"backend 'fast' is for the CPU, not {device}", "--backend eager")
        if self.backend == "graph" and device.startswith("cpu"):
            raise UsageError("backend 'graph' replays CUDA graphs, not on cpu", "--backend eager")
        if self.steps is not None and self.epochs is not None:
            raise UsageError("--steps and --epochs exclude each other")


def resolve(request: Request, *, data_name: str, train_size: int) -> RunConfig:
    """Complete a request with its recipe's numbers, everything counted in optimizer steps.

    Args:
        request: The settings that were given.
        data_name: Name of the data set that was opened.
        train_size: Its training images.

    Raises:
        UsageError: See `Request.check`.

    >>> config = resolve(
    ...     Request(variant="d", depth=20, recipe="paper", epochs=10),
    ...     data_name="cifar10", train_size=50_000,
    ... )
    >>> config.variant, config.steps, config.milestones
    ('elu', 3910, (1931, 2909))
    """
    request.check()
    recipe = RECIPES[request.recipe]
    asked = {entry.name: getattr(request, entry.name) for entry in fields(Settings)}
    numbers = {name: getattr(recipe, name, None) for name, value in asked.items() if value is None}
    per_epoch = -(-train_size // (request.batch_size or recipe.batch_size))
    steps = _count_steps(request, recipe, per_epoch)
    decided: dict[str, Any] = {
        "variant": find_variant(request.variant).id,
        "data": data_name,
        "backend": _choose_backend(request),
        "steps": steps,
        "commit_every": request.commit_every or min(per_epoch, 100),
        "eval_every": per_epoch if recipe.evaluate else 0,
        "milestones": tuple(max(1, round(share * steps)) for share in recipe.milestones),
    }
    return RunConfig(**{**asked, **numbers, **decided})


def _choose_backend(request: Request) -> str:
    """The backend that `auto` means: what is measured to be faster and computes the same."""
    if request.backend != "auto":
        return request.backend
    row = find_variant(request.variant)
    has_elu = "elu" in f"{row.branch}-{row.after_add}-{row.stem}-{row.head}".split("-")
    return "fast" if has_elu and request.device == "cpu" else "eager"


def learning_rate(config: RunConfig, step: int) -> float:
    """Learning rate of update `step`: constant at first if warming up, then by milestones.

    The warm-up is He et al. 2015's (section 4.2): a small constant rate before the first one.
    """
    if step < config.warmup:
        return config.warmup_lr
    passed = sum(step >= milestone for milestone in config.milestones)
    return config.lr * config.gamma**passed


def _count_steps(request: Request, recipe: Recipe, per_epoch: int) -> int:
    if request.steps is not None:
        return request.steps
    if request.epochs is not None:
        return request.epochs * per_epoch
    return recipe.steps or recipe.epochs * per_epoch
