"""The laws: how signal and gradient of one kind of residual unit move from block to block.

A variant names its law (`Variant.law`). Nothing is inferred from how a unit looks: of two units
that look alike to a few flags, one may grow by x2.4 per block and the other by x2. A variant that
names no law, or one that is not registered, has no prediction.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from resdiag.registry import Registry
from resdiag.theory.geometry import BlockShape
from resdiag.theory.gradient_recursion import grow_back, parameter_gradient_norm
from resdiag.theory.growth import columns, grow
from resdiag.theory.moments import Array
from resdiag.theory.normalised import NormalisedBranch, stack_plain, sum_normalised
from resdiag.theory.walk import WalkUnit, walk


@dataclass(frozen=True, kw_only=True)
class Start:
    """A network and what comes out of its stem.

    Attributes:
        shapes: The blocks.
        s0: E[H_0^2] at the stem's output.
        m0: E[H_0] there.
        variances: Of each of the stem's channels, if they are known.
        width: Multiple of the 16/32/64 channels; infinity is the mean field.
        width_px: Width of the images.
    """

    shapes: Sequence[BlockShape]
    s0: float
    m0: float
    variances: Sequence[float] = ()
    width: float = 1.0
    width_px: int = 32

    def constant(self, value: float) -> Array:
        """One value for every block."""
        return np.full(len(self.shapes), value)


@dataclass(frozen=True, kw_only=True)
class Law:
    """What theory predicts for one kind of residual unit at initialisation, without fitting.

    Attributes:
        name: Name, as in `Variant.law`.
        unit: The branch and the after-add that it is derived for.
        basis: The law and its source, in one sentence.
        columns: From the start the arrays of `resdiag.theory.prediction.Prediction`, one value per
            block; those that it leaves out are NaN.
        largest: The largest s0 that it can compute.
        gradient_norm: Norm of all parameter gradients from the blocks, E[H^2] at the stem and
            behind every block, the gradient's growth and the number of classes; None: not known.
        holds_scaled: Whether it holds for branches that are scaled at initialisation.
    """

    name: str
    unit: str
    basis: str
    columns: Callable[[Start], dict[str, Array]]
    largest: float = sys.float_info.max
    gradient_norm: Callable[[Sequence[BlockShape], Array, Array, int], float] | None = None
    holds_scaled: bool = False


_NOTHING_AFTER = {
    "skip_gain": 1.0,
    "skip_gain_stage": 1.0,
    "perturbation": 0.0,
    "identity_defect": 0.0,
    "identity_drift": 0.0,
    "attenuation": 1.0,
    "slope_mean": 1.0,
    "slope_mean_sq": 1.0,
}
"""Exact where nothing stands after the addition."""


def _grow_both_ways(start: Start, *, pre: bool) -> dict[str, Array]:
    levels = grow(
        start.shapes, start.s0, start.m0, pre=pre, width=start.width, width_px=start.width_px
    )
    exact = {name: start.constant(value) for name, value in _NOTHING_AFTER.items()}
    return exact | columns(levels) | {"grad_growth": grow_back(levels, pre=pre)}


def _add_normalised(start: Start, *, unit: NormalisedBranch) -> dict[str, Array]:
    exact = {name: start.constant(value) for name, value in _NOTHING_AFTER.items()}
    return exact | sum_normalised(unit, start.shapes, start.s0, start.m0, start.variances)


def _walk(start: Start, *, unit: WalkUnit) -> dict[str, Array]:
    return walk(unit, start.shapes, start.s0)


def _multiplying(name: str, unit: str, *, pre: bool) -> Law:
    """A law of a sum without normalisation."""
    return Law(
        name=name,
        unit=unit,
        basis="un-normalised residual sum: every block multiplies the second moment, by the "
        "recursion of resdiag.theory.growth (Zhang et al. 2019 (Fixup); De & Smith 2020), and the "
        "gradient, by that of resdiag.theory.gradient_recursion, with its component along the "
        "signal",
        columns=partial(_grow_both_ways, pre=pre),
        gradient_norm=partial(parameter_gradient_norm, pre=pre),
        holds_scaled=True,
    )


def _adding(name: str, unit: str, branch: NormalisedBranch) -> Law:
    """A law of a sum to which a normalised branch adds a constant."""
    return Law(
        name=name,
        unit=unit,
        basis="BatchNorm at the end of the branch, no after-add: E[H^2] grows by a constant per "
        "block (De & Smith 2020)",
        columns=partial(_add_normalised, unit=branch),
    )


_WALK = (
    "random walk of each unit with an activation after the addition, computed exactly "
    "(resdiag.theory.walk; Sparre Andersen 1954 for its skip gain)"
)
_LARGEST_WALK = 1e3  # the grid grows with its root; a stem on normalised images gives .1 ... 1
_ELU_BRANCH, _FIRST = NormalisedBranch(inner="elu"), NormalisedBranch(first=True)

_ROWS = (
    _multiplying("elu_sum", "conv-elu-conv-elu, then nothing", pre=False),
    _multiplying("elu_first_sum", "elu-conv-elu-conv, then nothing", pre=True),
    _adding("normalised_elu_sum", "conv-elu-conv-bn, then nothing", _ELU_BRANCH),
    _adding("normalised_relu_sum", "conv-bn-relu-conv-bn, then nothing", NormalisedBranch()),
    _adding("normalised_first_sum", "bn-relu-conv-bn-relu-conv, then nothing", _FIRST),
    Law(
        name="relu_walk",
        unit="conv-bn-relu-conv-bn, then relu",
        basis=_WALK,
        columns=partial(_walk, unit=WalkUnit(after_add="relu", branch=NormalisedBranch())),
        largest=_LARGEST_WALK,
    ),
    Law(
        name="elu_walk",
        unit="conv-elu-conv-bn, then elu",
        basis=_WALK,
        columns=partial(_walk, unit=WalkUnit(after_add="elu", branch=_ELU_BRANCH)),
        largest=_LARGEST_WALK,
    ),
    Law(
        name="growing_relu_walk",
        unit="conv-relu-conv, then relu",
        basis=_WALK + "; its step grows with the signal, so E[H^2] grows geometrically",
        columns=partial(_walk, unit=WalkUnit(after_add="relu")),
    ),
    Law(
        name="normalised_stack",
        unit="conv-bn-relu-conv-bn without a shortcut, then relu",
        basis="BatchNorm and no shortcut: E[H^2] is 1/2 in every block, the squared gradient grows "
        "by (pi/(pi-1))^2 per block, less at the border (Yang et al. 2019, mean field of "
        "BatchNorm), if all samples keep the same energy; in deep networks one sample dominates, "
        "and the growth is smaller",
        columns=lambda start: stack_plain(start.shapes, start.width_px),
    ),
)
LAWS = Registry("law", _ROWS)
"""Every law by name."""


def register_law(law: Law) -> None:
    """Add a law, so that variants can name it.

    Raises:
        RegistrationError: There is another law of that name.

    >>> from resdiag.theory.laws import Law, register_law, unregister_law
    >>> doubling = Law(
    ...     name="doubling", unit="any", basis="E[H^2] doubles per block",
    ...     columns=lambda start: {"forward_growth": start.constant(2.0)},
    ... )
    >>> register_law(doubling)
    >>> unregister_law("doubling")
    """
    LAWS.add(law)


def unregister_law(name: str) -> None:
    """Forget a law; variants that name it have no prediction from then on.

    Raises:
        RegistrationError: It is built in, or not registered.
    """
    LAWS.remove(name)
