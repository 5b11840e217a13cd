"""Lesions: from one initialisation change one thing, run a few steps on the same batches."""

import hashlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from resdiag.errors import UsageError, unknown
from resdiag.explain.observed import Observed
from resdiag.models.resnet import Block, ResNet, build_model
from resdiag.models.variants import Variant, find_variant
from resdiag.runs.config import RunConfig
from resdiag.runs.folder import Run
from resdiag.runs.watched import WatchedConfig, as_run
from resdiag.training.augment import Augmenter
from resdiag.training.data import SPECS, ImageData, open_data
from resdiag.training.recipe import learning_rate
from resdiag.watch.monitor import attach

BLOWN = 1e3
"""A loss above this many times max(first loss, 1) counts as dead, like a non-finite one."""


class Scale(nn.Module):
    """Multiplies by one number, learned (SkipInit) or fixed."""

    def __init__(self, value: float, learned: bool) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value), requires_grad=learned)

    def forward(self, x: Tensor) -> Tensor:
        """`value` x."""
        return self.value * x


@dataclass(frozen=True, kw_only=True)
class Lesion:
    """One thing to change.

    Attributes:
        words: What it is, "inserting BN before the addition".
        row: The changed row of the variants table, or None where there is nothing to change.
        model: Changes the built model in place.
        config: The changed recipe.
    """

    words: str
    row: Callable[[Variant], Variant | None] = lambda row: row
    model: Callable[[ResNet], object] = lambda model: None
    config: Callable[[RunConfig], RunConfig] = lambda config: config


def _blocks(model: ResNet) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


def _swap(row: Variant) -> Variant:
    other = {"elu": "relu", "relu": "elu"}

    def swap(steps: str) -> str:
        return "-".join(other.get(step, step) for step in steps.split("-"))

    return replace(
        row, branch=swap(row.branch), after_add=swap(row.after_add), stem=swap(row.stem),
        head=swap(row.head),
    )  # fmt: skip


def _insert_norm(row: Variant) -> Variant | None:
    return None if row.branch.endswith("bn") else replace(row, branch=row.branch + "-bn")


def _after(name: str) -> Callable[[Variant], Variant | None]:
    def change(row: Variant) -> Variant | None:
        return (
            None if (row.after_add == "none") == (name == "none") else replace(row, after_add=name)
        )

    return change


def _scale(model: ResNet, value: float, learned: bool) -> None:
    for block in _blocks(model):
        block.branch = nn.Sequential(block.branch, Scale(value, learned))


def _drop(model: ResNet) -> None:
    """The last block of the second stage: it keeps the shape."""
    stage = model.stages[1]
    assert isinstance(stage, nn.Sequential)
    if len(stage) > 1:
        stage[len(stage) - 1] = nn.Identity()
    else:  # depth 8: the first stage has the only block without a transition
        model.stages[0] = nn.Sequential()


@torch.no_grad()
def _fixup(model: ResNet) -> None:
    blocks = _blocks(model)
    for block in blocks:
        first, last = (m for m in block.branch.modules() if isinstance(m, nn.Conv2d))
        first.weight.mul_(len(blocks) ** -0.5)
        last.weight.zero_()
    model.classifier.weight.zero_()


@torch.no_grad()
def _halve(model: ResNet) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.mul_(0.5**0.5)


LESIONS: Mapping[str, Lesion] = MappingProxyType(
    {
        "bn_before_add": Lesion(words="inserting BN before the addition", row=_insert_norm),
        "no_after_add": Lesion(words="removing the after-add activation", row=_after("none")),
        "after_add_elu": Lesion(words="inserting ELU after the addition", row=_after("elu")),
        "after_add_relu": Lesion(words="inserting ReLU after the addition", row=_after("relu")),
        "swap_activation": Lesion(words="swapping ELU and ReLU", row=_swap),
        "no_shortcut": Lesion(
            words="deleting the skip",
            row=lambda row: replace(row, shortcut=False) if row.shortcut else None,
        ),
        "drop_block": Lesion(words="dropping a block", model=_drop),
        "skipinit": Lesion(
            words="scaling the branch by a learned 0 (SkipInit)",
            model=lambda model: _scale(model, 0.0, learned=True),
        ),
        "sqrt_depth": Lesion(
            words="scaling the branch by 1/sqrt(L)",
            model=lambda model: _scale(model, len(_blocks(model)) ** -0.5, learned=False),
        ),
        "fixup": Lesion(words="a Fixup-like initialisation", model=_fixup),
        "half_variance": Lesion(words="initialising with half He's variance", model=_halve),
        "lower_lr": Lesion(
            words="a tenth of the learning rate",
            config=lambda config: replace(config, lr=config.lr / 10),
        ),
        "warmup": Lesion(
            words="warming up for 5 steps at a tenth of the learning rate",
            config=lambda config: replace(config, warmup=5, warmup_lr=config.lr / 10),
        ),
        "freeze": Lesion(
            words="freezing the blocks",
            model=lambda model: [block.requires_grad_(False) for block in _blocks(model)],
        ),
    }
)
"""Every lesion by name."""

_REMEDIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "exploded_at_init": ("bn_before_add", "skipinit", "swap_activation", "lower_lr"),
        "exploded": ("bn_before_add", "lower_lr", "warmup"),
        "at_risk": ("lower_lr", "warmup"),
        "skip_collapsed": ("no_after_add", "warmup", "lower_lr"),
        "stalled": ("no_after_add", "lower_lr", "skipinit"),
    }
)


def propose(verdict: str, variant: str) -> list[str]:
    """Lesions that a verdict proposes and the variant allows; none for a healthy run.

    >>> propose("exploded_at_init", "b")
    ['bn_before_add', 'skipinit', 'swap_activation', 'lower_lr']
    """
    row = find_variant(variant)
    return [name for name in _REMEDIES.get(verdict, ()) if LESIONS[name].row(row) is not None]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One short training.

    Attributes:
        growth: Growth of E[H^2] per block at step 0.
        skip_gain: P3 at the last block at step 0.
        losses: Loss of each step; ends with the one that died.
        survived: Whether no loss was non-finite or beyond `BLOWN`.
        batches: SHA-256 of all batches that were seen.
        weights: The parameters and buffers at the end.
    """

    growth: float
    skip_gain: float
    losses: tuple[float, ...]
    survived: bool
    batches: tuple[str, ...]
    weights: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What a lesion did, one control and one changed arm per seed."""

    name: str
    control: tuple[Arm, ...]
    changed: tuple[Arm, ...]

    @property
    def confirmed(self) -> bool:
        """Whether it cures what ails the control arms, in every seed.

        Where a control died: all changed arms survive. Else all changed arms survive and end with
        a loss below their control's.
        """
        if not all(arm.survived for arm in self.changed):
            return False
        if not all(arm.survived for arm in self.control):
            return True
        pairs = zip(self.control, self.changed, strict=True)
        return all(new.losses[-1] < old.losses[-1] for old, new in pairs)

    def describe(self, lr: float) -> str:
        """One line: what was changed, its effect with the range over seeds, confirmed or not."""
        before, after = (sum(arm.survived for arm in arms) for arms in (self.control, self.changed))
        count = len(self.control)
        rate = "" if self.name in ("lower_lr", "warmup") else f"lr {lr:g} "
        growths = [_spread([arm.growth for arm in arms]) for arms in (self.control, self.changed)]
        losses = [_spread([a.losses[-1] for a in arms]) for arms in (self.control, self.changed)]
        return (
            f"{LESIONS[self.name].words}: growth per block {growths[0]} -> {growths[1]}, survives "
            f"{rate}in {before} -> {after} of {count} seeds, last loss {losses[0]} -> "
            f"{losses[1]}: {'confirmed' if self.confirmed else 'not confirmed'}"
        )

    def to_dict(self) -> dict[str, object]:
        """Numbers per seed."""
        arms = {"control": self.control, "changed": self.changed}
        return {
            "name": self.name,
            "words": LESIONS[self.name].words,
            "confirmed": self.confirmed,
            **{
                key: [
                    {"growth_per_block": a.growth, "skip_gain": a.skip_gain, "loss": a.losses[-1],
                     "steps": len(a.losses), "survived": a.survived}
                    for a in arm
                ]
                for key, arm in arms.items()
            },
        }  # fmt: skip


def _spread(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    texts = f"{low:.3g}", f"{high:.3g}"
    return texts[0] if texts[0] == texts[1] else f"{texts[0]}..{texts[1]}"


def check_lesion(name: str, variant: str) -> Lesion:
    """The lesion of this name.

    Raises:
        UsageError: It is unknown, or the variant has nothing that it could change.
    """
    if name not in LESIONS:
        raise unknown("lesion", name, LESIONS)
    row = find_variant(variant)
    if LESIONS[name].row(row) is None:
        raise UsageError(f"lesion '{name}' has nothing to change in variant {row.id}")
    return LESIONS[name]


def run_lesions(
    config: RunConfig, data: ImageData, names: Sequence[str], *, seeds: int = 3, steps: int = 10
) -> list[Effect]:
    """Run one control and one arm per lesion, from the initialisation of each of several seeds.

    Args:
        config: The run; its seed is the first one.
        data: Its images.
        names: Of `LESIONS`.
        seeds: How many.
        steps: Steps of each arm; an arm ends when it dies.

    Raises:
        UsageError: See `check_lesion`.
    """
    lesions = {name: check_lesion(name, config.variant) for name in names}
    runs = [replace(config, seed=config.seed + i, device="cpu") for i in range(seeds)]
    control = tuple(run_arm(run, data, steps=steps) for run in runs)
    return [
        Effect(
            name=name,
            control=control,
            changed=tuple(run_arm(run, data, lesion, steps=steps) for run in runs),
        )
        for name, lesion in lesions.items()
    ]


def run_arm(
    config: RunConfig, data: ImageData, lesion: Lesion | None = None, *, steps: int = 10
) -> Arm:
    """Train one arm as `resdiag run` would on a CPU in float32; no lesion is the control."""
    model = _build(config, data, lesion)
    config = lesion.config(config) if lesion else config
    rule = SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov and config.momentum > 0,
        weight_decay=config.weight_decay,
    )
    batches = Augmenter(data, config.batch_size, config.seed, config.augment, channels_last=True)
    losses, seen = list[float](), list[str]()
    names = [n for n, m in model.named_modules() if isinstance(m, Block)]
    shortcut = _blocks(model)[0].shortcut is not None
    watch = None if shortcut else names
    with attach(model, blocks=watch, every=sys.maxsize, record_first=1) as monitor:
        for step in range(steps):
            for group in rule.param_groups:
                group["lr"] = learning_rate(config, step)
            images, labels = batches.batch(step)
            seen.append(
                hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
            )
            rule.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            torch.autograd.backward(loss)
            losses.append(float(loss.detach()))
            rule.step()
            monitor.step()
            if not losses[-1] <= BLOWN * max(losses[0], 1.0):
                break
        run = as_run(monitor, config=WatchedConfig(model=config.variant))
    observed = Observed(run)
    last = observed.indices[-1] if observed.indices else 0
    return Arm(
        growth=observed.growth_per_block(0),
        skip_gain=observed.value("skip_gain", 0, last),
        losses=tuple(losses),
        survived=math.isfinite(losses[-1]) and losses[-1] <= BLOWN * max(losses[0], 1.0),
        batches=tuple(seen),
        weights={name: value.clone() for name, value in model.state_dict().items()},
    )


def _build(config: RunConfig, data: ImageData, lesion: Lesion | None) -> ResNet:
    """The run's own initialisation, with its convolutions and classifier in the changed network."""
    model = build_model(
        config.variant, config.depth, width=config.width, num_classes=len(data.classes),
        stem_bn=config.stem_bn, seed=config.seed,
    )  # fmt: skip
    row = find_variant(config.variant)
    changed = lesion.row(row) if lesion else row
    if lesion and changed is not None and changed != row:
        with torch.random.fork_rng(devices=[]):
            other = ResNet(
                changed, config.depth, width=config.width, num_classes=len(data.classes),
                stem_bn=config.stem_bn,
            )  # fmt: skip
        kinds = (nn.Conv2d, nn.Linear)
        pairs = zip(
            [m for m in model.modules() if isinstance(m, kinds)],
            [m for m in other.modules() if isinstance(m, kinds)],
            strict=True,
        )
        for mine, its in pairs:
            its.load_state_dict(mine.state_dict())
        model = other
    if lesion:
        lesion.model(model)
    layout: dict[str, torch.memory_format] = {"memory_format": torch.channels_last}
    return model.to("cpu", **layout)  # type: ignore[call-overload,no-any-return]


def open_images(run: Run, spec: str = "", root: Path | None = None) -> ImageData:
    """The images of a run.

    Raises:
        UsageError: The run does not say how to open them, or they are other images.
    """
    name = spec or run.config.data.removesuffix("-jpeg")
    if name not in SPECS and ":" not in name:
        raise UsageError(f"the images of this run are called {name!r}", "name them with --data")
    data = open_data(name, root)
    if data.identity["sha256"] != run.data.get("sha256"):
        raise UsageError(f"{name} is not what this run was trained on", "name that with --data")
    return data


def prove(
    run: Run, verdict: str, names: Sequence[str], data: ImageData, *, seeds: int, steps: int
) -> list[Effect]:
    """Run the lesions named, or those that the verdict proposes.

    Raises:
        UsageError: The run is of a foreign model, or a lesion is not one of its variant's.
    """
    config = run.config
    if not isinstance(config, RunConfig):
        raise UsageError("lesions need a run of one of the variants", "resdiag variants")
    chosen = list(names) or propose(verdict, config.variant)
    return run_lesions(config, data, chosen, seeds=seeds, steps=steps)
