"""Where in a training step each recorded number arises, and in which unit two of them are compared.

A difference spreads: what is wrong in one block reaches all later ones, then the gradients of all
blocks, then their updates. So the place of the cause is the first one in the order of computation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from resdiag.catalog.custom import GRADIENT_SITES
from resdiag.catalog.table import SITES

DIRECTIONS = ("data", "forward", "loss", "backward", "optimizer", "update", "evaluation")
"""The parts of a training step in the order in which they are computed."""

_BACKWARD = ("grad_output", "grad_sum", "grad_param", "grad_input")
_SITE_WORDS = {
    "input": "at the block's input",
    "branch": "at the branch's output",
    "shortcut": "at the shortcut",
    "sum": "at the sum",
    "output": "at the block's output",
    "grad_output": "in the gradient at the block's output",
    "grad_sum": "in the gradient at the sum",
    "grad_param": "in the gradient of the block's parameters",
    "grad_input": "in the gradient at the block's input",
}


@dataclass(frozen=True)
class Place:
    """Where a number arises, and how two values of it are compared.

    Attributes:
        metric: Column of one of a run's two tables.
        direction: One of `DIRECTIONS`.
        site: Within the direction: a site of a block, or words for a number of the whole step.
        order: Position within the direction and, of a number per block, within the block.
        per_block: Whether there is one number per block.
        unit: What a difference is divided by. "size": the larger of both values; "rms": the RMS
            of the tensor at the site, as a mean near 0 has no digits of its own; "one": 1 or the
            larger of both values; "largest": the largest loss so far.
        decides: Whether it can be where two runs part first. A share of elements cannot: if one
            element crosses a threshold, it changes by 1/N, however small the cause. Nor can a ratio
            to a number that may be small.
        exact: Whether rounding cannot change it at all.
    """

    metric: str
    direction: str
    site: str
    order: int = 0
    per_block: bool = False
    unit: str = "size"
    decides: bool = True
    exact: bool = False

    @property
    def words(self) -> str:
        """The site in words."""
        return _SITE_WORDS.get(self.site, f"in the {self.site}")

    def rank(self, block: int) -> tuple[int, int, int]:
        """Position within a step: backward passes go through the blocks from the last one."""
        backward = self.direction == "backward" and self.per_block
        at = (-block if backward else block) if self.per_block else 1 << 30
        return DIRECTIONS.index(self.direction), at, self.order


def _of_site(site: str, at: int) -> list[Place]:
    """The moments of one site, in the order of the sites."""
    moments = ("channel_mean_rms", "channel_std", "mean", "mean_q10", "mean_q50", "mean_q90")
    first = Place(f"{site}_nonfinite", "forward", site, 10 * at, True, "one", exact=True)
    return [
        first,
        *(
            Place(f"{site}_{name}", "forward", site, 10 * at + place, True, "rms")
            for place, name in enumerate(moments, start=1)
        ),
    ]


def _share(metric: str, direction: str, site: str, order: int = 0, *, block: bool = False) -> Place:
    """A share of elements or of samples."""
    return Place(metric, direction, site, order, block, "one", decides=False)


_CHANGES = ("perturbation", "identity_defect", "identity_drift")
_SHARES = {
    "negative_fraction": "sum", "slope_mean": "sum", "slope_mean_sq": "sum",
    "skip_gain_stage": "output", "skip_gain": "output",
    "saturated_fraction": "output", "dead_fraction": "output",
}  # fmt: skip
_LABELS = ("label_share", "rows_ignored", "softmax_twice", "label_copies")
_SETTINGS = {"lr": "learning rate", "momentum": "momentum", "weight_decay": "weight decay"}

# fmt: off
_PLACES = [
    Place("data_nonfinite", "data", "input of the model", 0, unit="one", exact=True),
    Place("data_mean", "data", "input of the model", 1, unit="rms"),
    Place("data_std", "data", "input of the model", 2, unit="rms"),
    Place("data_between", "data", "input of the model", 3, unit="one"),
    *(place for at, site in enumerate(SITES) for place in _of_site(site, at)),
    *(Place(name, "forward", "output", 50 + at, True, "one") for at, name in enumerate(_CHANGES)),
    *(_share(name, "forward", site, 60, block=True) for name, site in _SHARES.items()),
    Place("head_bias", "forward", "classifier's input", unit="one", decides=False),
    Place("loss", "loss", "loss", 0, unit="largest"),
    Place("head_loss", "loss", "cross-entropy at the logits", 1, unit="largest"),
    Place("output_loss", "loss", "cross-entropy at the output", 2, unit="largest"),
    *(_share(name, "loss", "labels", 3) for name in _LABELS),
    _share("error", "loss", "error", 3),
    Place("grad_nonfinite", "backward", "grad_output", 0, True, "one", exact=True),
    *(Place(name, "backward", name, at, True) for at, name in enumerate(_BACKWARD, start=1)),
    Place("shortcut_share", "backward", "grad_input", 9, True, "one"),
    Place("grad_norm", "backward", "gradient norm of all parameters"),
    *(Place(name, "optimizer", words) for name, words in _SETTINGS.items()),
    Place("update_ratio", "update", "update of the block's parameters", per_block=True),
    Place("train_loss", "evaluation", "training loss", unit="largest"),
    Place("test_loss", "evaluation", "test loss", unit="largest"),
    *(_share(name, "evaluation", "error") for name in ("train_error", "test_error")),
]
# fmt: on

PLACES: Mapping[str, Place] = MappingProxyType({place.metric: place for place in _PLACES})
"""The compared columns by name. Those that are computed from other columns are left out."""


def custom_place(metric: str, site: str) -> Place:
    """The place of a custom metric: it is in the table, but how it rounds is not known."""
    backward = site in GRADIENT_SITES
    where = site if backward or site in SITES else "output"
    direction = "backward" if backward else "forward"
    return Place(metric, direction, where, 70, True, decides=False)
