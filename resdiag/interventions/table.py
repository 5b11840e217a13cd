"""The table of interventions: a row says one thing to change about a network or its training.

No torch is imported here: names are checked and help is printed before anything slow is loaded.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from resdiag.errors import UsageError, unknown
from resdiag.models.variants import Variant, find_variant
from resdiag.registry import RegistrationError, Registry
from resdiag.runs.config import RunConfig

if TYPE_CHECKING:
    from torch import nn

    from resdiag.models.resnet import ResNet


@dataclass(frozen=True, kw_only=True)
class AdditionChange:
    """What happens at every chosen residual addition of any model.

    Attributes:
        branch: Factor on the branch, a function of the number of blocks of the model.
        shortcut: Factor on the shortcut.
        learned: Whether the branch's factor is a parameter per block.
        after_add: False removes the activation or normalisation that follows the sum.
    """

    branch: Callable[[int], float] = lambda blocks: 1.0
    shortcut: float = 1.0
    learned: bool = False
    after_add: bool = True


@dataclass(frozen=True, kw_only=True)
class VariantChange:
    """What is changed about the training of one of the variants; None leaves a part as it is.

    Attributes:
        row: Returns the changed row of the variants' table, or None if there is nothing to change.
        network: Changes the built network in place.
        weights: Changes the initial weights in place; refused on trained weights.
        recipe: Returns the changed settings of the run.
        words: What is changed, where the row's words hold for any model only.
    """

    row: Callable[[Variant], Variant | None] | None = None
    network: "Callable[[ResNet], object] | None" = None
    weights: "Callable[[ResNet], object] | None" = None
    recipe: Callable[[RunConfig], RunConfig] | None = None
    words: str = ""


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """One thing to change, and what is expected of it.

    A row with `addition` applies to any model, the variants included; `variant` says how a variant
    is changed if that differs. A row without `addition` applies to the variants only.

    Attributes:
        name: What users call it.
        words: What is changed, as the subject of a sentence: "halving the branch".
        expects: What theory or its source expects of it.
        source: Where it comes from.
        addition: The change of residual additions, or None.
        variant: The change of a variant's training, or None.
        remedy_for: Verdicts for which `resdiag explain --lesion` proposes it.
        reports_skip_gain: Whether its effect is described by the skip gain as well.
    """

    name: str
    words: str
    expects: str
    source: str
    addition: AdditionChange | None = None
    variant: VariantChange | None = None
    remedy_for: tuple[str, ...] = ()
    reports_skip_gain: bool = False

    @property
    def changes_recipe(self) -> bool:
        """Whether the settings of the training differ."""
        return self.variant is not None and self.variant.recipe is not None

    def changed_row(self, row: Variant) -> Variant | None:
        """The row of a variant's changed network; None where there is nothing to change."""
        if self.variant is not None:
            return self.variant.row(row) if self.variant.row else row
        has_after_add = row.after_add != "none"
        able = self.addition is not None and (self.addition.after_add or has_after_add)
        return row if able and row.shortcut else None


def _swap_activation(row: Variant) -> Variant:
    other = {"elu": "relu", "relu": "elu"}

    def swap(steps: str) -> str:
        return "-".join(other.get(step, step) for step in steps.split("-"))

    return replace(
        row, branch=swap(row.branch), after_add=swap(row.after_add), stem=swap(row.stem),
        head=swap(row.head), law="",
    )  # fmt: skip


def _insert_norm(row: Variant) -> Variant | None:
    return None if row.branch.endswith("bn") else replace(row, branch=row.branch + "-bn", law="")


def _set_after_add(name: str) -> Callable[[Variant], Variant | None]:
    def change(row: Variant) -> Variant | None:
        has_one = row.after_add != "none"
        return None if has_one == (name != "none") else replace(row, after_add=name, law="")

    return change


def _delete_shortcut(row: Variant) -> Variant | None:
    return replace(row, shortcut=False, law="") if row.shortcut else None


def _drop_one_block(network: "ResNet") -> None:
    """Drop the last block of a stage that has one without a transition."""
    first, middle, _ = cast("Iterable[nn.Sequential]", network.stages)
    # depth 8 has one block a stage: only the first stage's keeps the shape
    del (middle if len(middle) > 1 else first)[-1]


def _units(network: "ResNet") -> "list[nn.Module]":
    return [network.get_submodule(name) for name in network.unit_names]


def _scale_as_fixup(network: "ResNet") -> None:
    from torch import nn

    units = _units(network)
    for unit in units:
        first, last = (m for m in unit.modules() if isinstance(m, nn.Conv2d))
        first.weight.data.mul_(len(units) ** -0.5)
        last.weight.data.zero_()
    network.classifier.weight.data.zero_()


def _halve_variance(network: "ResNet") -> None:
    from torch import nn

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(0.5**0.5)


def _tenth_of_branches(network: "ResNet") -> None:
    from resdiag.models.resnet import scale_branches

    scale_branches(network, 0.1)


def _freeze_blocks(network: "ResNet") -> None:
    for unit in _units(network):
        unit.requires_grad_(False)


_HE2016 = "He et al. 2016, arXiv:1603.05027"
_SHAH2016 = "Shah et al. 2016, arXiv:1604.04112"
_ROWS = (
    Intervention(
        name="bn_before_add", words="inserting BN before the addition",
        expects="each branch adds 1 to E[H^2]: it grows by an amount per block, not by a factor",
        source=_SHAH2016 + ", section 3.2.4",
        variant=VariantChange(row=_insert_norm),
        remedy_for=("grows_at_init", "exploded"),
    ),
    Intervention(
        name="no_shortcut", words="deleting the skip",
        expects="the training error grows with depth",
        source="He et al. 2015, arXiv:1512.03385, section 4.1",
        addition=AdditionChange(shortcut=0.0),
        variant=VariantChange(row=_delete_shortcut),
    ),
    Intervention(
        name="drop_block", words="dropping the block's branch",
        expects="little changes: neighbouring blocks do similar things",
        source="Veit et al. 2016, arXiv:1605.06431, section 4.1",
        addition=AdditionChange(branch=lambda blocks: 0.0),
        variant=VariantChange(network=_drop_one_block, words="dropping a block"),
    ),
    Intervention(
        name="half_branch", words="halving the branch",
        expects="the branch adds a quarter of its second moment",
        source="E[(F/2)^2] = E[F^2] / 4",
        addition=AdditionChange(branch=lambda blocks: 0.5),
    ),
    Intervention(
        name="sqrt_depth", words="scaling the branch by 1/sqrt(L)",
        expects="growth of E[H^2] over the network is bounded in depth",
        source="Hayou et al. 2021, arXiv:2010.12859",
        addition=AdditionChange(branch=lambda blocks: max(1, blocks) ** -0.5),
    ),
    Intervention(
        name="skipinit", words="scaling the branch by a learned 0 (SkipInit)",
        expects="every block is its shortcut at the first step",
        source="De and Smith 2020, arXiv:2002.10444",
        addition=AdditionChange(branch=lambda blocks: 0.0, learned=True),
        remedy_for=("grows_at_init", "stalled"),
    ),
    Intervention(
        name="no_after_add", words="removing what follows the addition",
        expects="the skip gain is 1 within a stage", source=_HE2016 + ", section 3",
        addition=AdditionChange(after_add=False),
        variant=VariantChange(
            row=_set_after_add("none"), words="removing the after-add activation"
        ),
        remedy_for=("skip_collapsed", "stalled"), reports_skip_gain=True,
    ),
    Intervention(
        name="after_add_elu", words="inserting ELU after the addition",
        expects="the skip gain falls below 1 and shrinks with depth",
        source=_SHAH2016 + ", section 3.2.3",
        variant=VariantChange(row=_set_after_add("elu")), reports_skip_gain=True,
    ),
    Intervention(
        name="after_add_relu", words="inserting ReLU after the addition",
        expects="no output of a block is negative",
        source="He et al. 2015, arXiv:1512.03385, section 3.2",
        variant=VariantChange(row=_set_after_add("relu")), reports_skip_gain=True,
    ),
    Intervention(
        name="swap_activation", words="swapping ELU and ReLU",
        expects="an explosion that remains is not caused by the activation",
        source=_SHAH2016 + ", section 3",
        variant=VariantChange(row=_swap_activation), remedy_for=("grows_at_init",),
    ),
    Intervention(
        name="lower_lr", words="a tenth of the learning rate",
        expects="an explosion of the updates is survived; one at initialisation remains",
        source="control: is it the step or the signal?",
        variant=VariantChange(recipe=lambda config: replace(config, lr=config.lr / 10)),
        remedy_for=("grows_at_init", "exploded", "at_risk", "skip_collapsed", "stalled"),
    ),
    Intervention(
        name="warmup", words="warming up for 5 steps at a tenth of the learning rate",
        expects="the first steps are survived", source="He et al. 2015, arXiv:1512.03385, 4.2",
        variant=VariantChange(
            recipe=lambda config: replace(config, warmup=5, warmup_lr=config.lr / 10)
        ),
        remedy_for=("exploded", "at_risk", "skip_collapsed"),
    ),
    Intervention(
        name="fixup", words="a Fixup-like initialisation",
        expects="every branch is 0 at the first step",
        source="Zhang et al. 2019, arXiv:1901.09321",
        variant=VariantChange(weights=_scale_as_fixup),
    ),
    Intervention(
        name="half_variance", words="initialising with half He's variance",
        expects="without normalisation the branch's second moment is a quarter",
        source="He et al. 2015, arXiv:1502.01852, halved",
        variant=VariantChange(weights=_halve_variance),
    ),
    Intervention(
        name="tenth_branch", words="initialising the last weights of each branch at a tenth",
        expects="E[H^2] no longer grows; that steps are too large without normalisation remains",
        source="dose of the branch: resdiag run --branch-scale",
        variant=VariantChange(weights=_tenth_of_branches),
        remedy_for=("grows_at_init",),
    ),
    Intervention(
        name="freeze", words="freezing the blocks",
        expects="what goes wrong without updates of the blocks is not caused by them",
        source="control", variant=VariantChange(network=_freeze_blocks),
    ),
)  # fmt: skip
INTERVENTIONS = Registry("intervention", _ROWS)
"""Every intervention by name: the built-in ones, then what was registered."""


def register_intervention(row: Intervention) -> None:
    """Add an intervention to the table for this process.

    Raises:
        RegistrationError: Its name is taken or cannot be one, or it changes nothing.

    >>> register_intervention(Intervention(
    ...     name="third_branch", words="a third of the branch", expects="less growth",
    ...     source="example", addition=AdditionChange(branch=lambda blocks: 1 / 3)))
    >>> models_interventions()[-1]
    'third_branch'
    >>> unregister_intervention("third_branch")
    """
    if row.addition is None and row.variant is None:
        raise RegistrationError(f"intervention '{row.name}' must have addition= or variant=")
    INTERVENTIONS.add(row)


def unregister_intervention(name: str) -> None:
    """Remove a registered intervention from the table.

    Raises:
        RegistrationError: It is built in, or not registered.
    """
    INTERVENTIONS.remove(name)


def models_interventions() -> list[str]:
    """Names of the interventions that apply to any model."""
    return [name for name, row in INTERVENTIONS.items() if row.addition is not None]


def find_for_model(name: str) -> Intervention:
    """The intervention of this name, if it applies to any model.

    Raises:
        UsageError: It is unknown or applies to the variants only.
    """
    row = INTERVENTIONS.get(name)
    if row is None:
        raise unknown("lesion", name, models_interventions())
    if row.addition is None:
        raise UsageError(
            f"lesion '{name}' applies to runs of the variants only",
            f"resdiag explain RUN --lesion {name}",
        )
    return row


def find_for_variant(name: str, variant: str) -> Intervention:
    """The intervention of this name, if it changes something about a variant.

    Raises:
        UsageError: It is unknown, or the variant has nothing that it could change.
    """
    if name not in INTERVENTIONS:
        raise unknown("lesion", name, INTERVENTIONS)
    row = find_variant(variant)
    if INTERVENTIONS[name].changed_row(row) is None:
        raise UsageError(f"lesion '{name}' has nothing to change in variant {row.id}")
    return INTERVENTIONS[name]


def propose(verdict: str, variant: str) -> list[str]:
    """Names of the interventions that are a remedy for a verdict and that the variant allows.

    >>> propose("grows_at_init", "b")
    ['bn_before_add', 'skipinit', 'swap_activation', 'lower_lr', 'tenth_branch']
    """
    row = find_variant(variant)
    remedies = [known for known in INTERVENTIONS.values() if verdict in known.remedy_for]
    return [known.name for known in remedies if known.changed_row(row) is not None]
