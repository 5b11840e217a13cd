"""The variants as rows of a table: what stands on the branch, after the addition, at stem and head.

No torch here: names are checked before anything slow is imported.
"""

from dataclasses import dataclass

from resdiag.errors import UsageError, unknown
from resdiag.registry import RegistrationError, Registry


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One residual unit, `y = h(x) + F(x)`, `x' = f(y)`, and the network around it.

    Attributes:
        id: Name used everywhere.
        alias: The paper's letter, or "".
        branch: Operations of F in order, joined by "-": conv, bn, relu, elu.
        after_add: f, applied to the sum inside the block: relu, elu or none.
        stem: Operations before the first block.
        head: Operations between the last block and the global average pooling, or "".
        shortcut: Whether there is a shortcut at all (False: a plain network).
        source: Reference for the variant.
        law: Name of the law that predicts its statistics (`resdiag.theory.laws`); "": none.
    """

    id: str
    alias: str = ""
    branch: str
    after_add: str
    stem: str
    head: str = ""
    shortcut: bool = True
    source: str
    law: str = ""

    @property
    def norm(self) -> bool:
        """Whether the branch has batch normalisation."""
        return "bn" in self.branch.split("-")

    @property
    def activation(self) -> str:
        """The branch's non-linearity: relu or elu."""
        return "elu" if "elu" in self.branch.split("-") else "relu"


_HE2015 = "He et al. 2015, arXiv:1512.03385, section 3.3 and 4.2; the paper's baseline"
_PAPER = "Shah et al. 2016, arXiv:1604.04112, section "
_ROWS = (
    Variant(
        id="original", branch="conv-bn-relu-conv-bn", after_add="relu", stem="conv-bn-relu",
        source=_HE2015,
        law="relu_walk",
    ),
    Variant(
        id="elu_nobn", alias="a", branch="conv-elu-conv-elu", after_add="none", stem="conv-elu",
        source=_PAPER + "3.2.1, Fig. 3a",
        law="elu_sum",
    ),
    Variant(
        id="elu_pre", alias="b", branch="elu-conv-elu-conv", after_add="none", stem="conv",
        head="elu", source=_PAPER + "3.2.2, Fig. 3b",
        law="elu_first_sum",
    ),
    Variant(
        id="elu_after", alias="c", branch="conv-elu-conv-bn", after_add="elu", stem="conv-elu",
        source=_PAPER + "3.2.3, Fig. 3c, eq. 2",
        law="elu_walk",
    ),
    Variant(
        id="elu", alias="d", branch="conv-elu-conv-bn", after_add="none", stem="conv-elu",
        head="elu", source=_PAPER + "3.2.4, Fig. 3d, eq. 3",
        law="normalised_elu_sum",
    ),
    Variant(
        id="no_relu", branch="conv-bn-relu-conv-bn", after_add="none", stem="conv-bn-relu",
        head="relu",
        source="control: original with nothing on the skip path (gcr/torch-residual-networks)",
        law="normalised_relu_sum",
    ),
    Variant(
        id="relu_pre", branch="bn-relu-conv-bn-relu-conv", after_add="none", stem="conv",
        head="bn-relu", source="control: He et al. 2016, arXiv:1603.05027, full pre-activation",
        law="normalised_first_sum",
    ),
    Variant(
        id="relu_nobn", branch="conv-relu-conv", after_add="relu", stem="conv-relu",
        source="control: original without normalisation (is it ELU or the missing norm?)",
        law="growing_relu_walk",
    ),
    Variant(
        id="plain", branch="conv-bn-relu-conv-bn", after_add="relu", stem="conv-bn-relu",
        shortcut=False, source="control: He et al. 2015, arXiv:1512.03385, plain network",
        law="normalised_stack",
    ),
)  # fmt: skip

VARIANTS = Registry("variant", _ROWS, key="id")
"""Every variant by id, in the order of the design's table; registered ones behind."""

STAGE_CHANNELS = (16, 32, 64)
"""Channels of the three stages at width 1, of the first one's stem too (He et al. 2015, 4.2)."""

_WORDS = ("conv", "bn", "relu", "elu")


def register_variant(row: Variant) -> None:
    """Add a variant, so that it can be built, run, probed and compared by its id in this process.

    Raises:
        UsageError: There is another variant of that id or letter, or an operation is unknown.

    >>> mine = Variant(
    ...     id="elu_tail", branch="conv-bn-conv-bn-elu", after_add="none", stem="conv-elu",
    ...     source="an example",
    ... )
    >>> register_variant(mine)
    >>> find_variant("elu_tail").law
    ''
    >>> unregister_variant("elu_tail")
    """
    after = "" if row.after_add == "none" else row.after_add
    for step in "-".join(filter(None, (row.branch, after, row.stem, row.head))).split("-"):
        if step not in _WORDS:
            raise unknown("operation", step, _WORDS)
    letters = [known.alias for known in VARIANTS.values() if known.alias]
    if row.alias and _find_id(row.alias) in VARIANTS:
        raise RegistrationError(f"variant '{row.alias}' exists already: choose another letter")
    VARIANTS.add(row, taken=letters)


def unregister_variant(name: str) -> None:
    """Forget a registered variant; those of the paper stay.

    Raises:
        UsageError: A built-in variant, or no variant has that id.
    """
    VARIANTS.remove(find_variant(name).id)


def _find_id(name: str) -> str:
    """The id that belongs to a letter, or `name` itself."""
    return next((row.id for row in VARIANTS.values() if row.alias == name), name)


def find_variant(name: str) -> Variant:
    """Look a variant up by id or by the paper's letter.

    Raises:
        UsageError: `name` is neither; the message has the nearest match.

    >>> find_variant("b").id
    'elu_pre'
    """
    row = VARIANTS.get(_find_id(name)) if name else None
    if row is None:
        aliases = [row.alias for row in VARIANTS.values() if row.alias]
        raise unknown("variant", name, [*VARIANTS, *aliases])
    return row


def variant_words(variant: str) -> str:
    """A variant with the paper's letter.

    >>> variant_words("elu_pre")
    'elu_pre (b)'
    """
    row = VARIANTS.get(variant)
    return f"{variant} ({row.alias})" if row and row.alias else variant


def list_variants() -> list[str]:
    """Every variant with the paper's letter, those of extensions too.

    >>> list_variants()[:3]
    ['original', 'elu_nobn (a)', 'elu_pre (b)']
    """
    return [variant_words(name) for name in VARIANTS]


def count_blocks(depth: int) -> int:
    """Blocks per stage n of a CIFAR ResNet of `depth` = 6n+2 weighted layers (He 2015, 4.2).

    Raises:
        UsageError: `depth` is not 6n+2 with n >= 1.

    >>> count_blocks(110)
    18
    """
    if depth < 8 or (depth - 2) % 6:
        low = max(8, (depth - 2) // 6 * 6 + 2)
        raise UsageError(
            f"depth {depth} is not 6n+2; nearest: {low}, {low + 6}; paper: 20, 32, 44, 56, 110"
        )
    return (depth - 2) // 6
