"""The lesions of the variants: what one thing to change is called, and how it is changed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from resdiag.errors import UsageError, unknown
from resdiag.models.resnet import Block, ResNet
from resdiag.models.variants import Variant, find_variant
from resdiag.runs.config import RunConfig


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
        initial: Whether it changes the initialisation, so that it says nothing of trained weights.
    """

    words: str
    row: Callable[[Variant], Variant | None] = lambda row: row
    model: Callable[[ResNet], object] = lambda model: None
    config: Callable[[RunConfig], RunConfig] = lambda config: config
    initial: bool = False


def blocks_of(model: ResNet) -> list[Block]:
    """Its units in forward order."""
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
    for block in blocks_of(model):
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
    blocks = blocks_of(model)
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
            model=lambda model: _scale(model, len(blocks_of(model)) ** -0.5, learned=False),
        ),
        "fixup": Lesion(words="a Fixup-like initialisation", model=_fixup, initial=True),
        "half_variance": Lesion(
            words="initialising with half He's variance", model=_halve, initial=True
        ),
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
            model=lambda model: [block.requires_grad_(False) for block in blocks_of(model)],
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
