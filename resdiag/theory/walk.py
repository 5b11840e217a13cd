"""An activation after the addition (original, c, relu_nobn): a reflected random walk per unit.

Fresh weights make each unit a scalar walk u_l = H_{l-1} + sigma_l xi, H_l = phi(u_l), xi ~ N(0, 1),
with sigma = 1 where BatchNorm ends the branch: a walk reflected at 0 for ReLU, softly between -1
and 0 for ELU. Nothing is fitted and nothing is sampled: the density of u is carried from block to
block on Gauss-Legendre nodes. The pure-skip gain of the reflected walk from 0
is C(2n, n) / 4^n ~ 1 / sqrt(pi n) whatever the step's law (Sparre Andersen 1954).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resdiag.theory.geometry import BlockShape
from resdiag.theory.moments import ACTIVATIONS, Array
from resdiag.theory.normalised import NormalisedBranch
from resdiag.theory.walk_gradient import grow_back_reflected

_PANEL, _WEIGHTS = np.polynomial.legendre.leggauss(8)
_REACH = 7.0  # standard deviations kept: what is cut off is below 1e-11


@dataclass(frozen=True, kw_only=True)
class WalkUnit:
    """A residual unit with an activation after the addition.

    Attributes:
        after_add: phi: relu or elu.
        branch: A branch that ends with BatchNorm, whose steps have deviation 1; None for
            conv-ReLU-conv, whose steps grow with the signal.
    """

    after_add: str
    branch: NormalisedBranch | None = None

    def phi(self, u: Array) -> Array:
        """The activation."""
        return np.maximum(u, 0) if self.after_add == "relu" else np.where(u > 0, u, np.expm1(u))

    def slope(self, u: Array) -> Array:
        """Its slope."""
        return (u > 0).astype(float) if self.after_add == "relu" else np.exp(np.minimum(u, 0))


@dataclass(frozen=True, kw_only=True)
class Level:
    """The law of one block's units, on nodes of the sum u; level 0 is the stem.

    Attributes:
        nodes: Values of u, shape (K,).
        weights: Quadrature weights of the nodes, shape (K,).
        masses: One column per group of channels with the same past, shape (K, groups).
        shares: Share of the channels in each group, shape (groups,); group 0 is the channels
            that go back to the stem, each stage change appends a group.
        through: Mean product of slopes since the stem at each node, times the mass; group 0.
        stage_through: The same since the stage began, all channels.
        drifted: phi applied n times to the stage's first shortcut, with its masses.
    """

    nodes: Array
    weights: Array
    masses: Array
    shares: Array
    through: Array
    stage_through: Array
    drifted: tuple[Array, Array, Array]

    @property
    def law(self) -> Array:
        """Masses of a unit of any channel, shape (K,)."""
        return self.masses @ self.shares


def walk(unit: WalkUnit, shapes: Sequence[BlockShape], s0: float) -> dict[str, Array]:
    """Evolve the walk through all blocks, then the gradient's energy back through it.

    Args:
        unit: What the blocks are.
        shapes: The blocks.
        s0: E[H_0^2] at the stem's output; H_0 is taken as phi(N(0, q)) with this second moment.

    Returns:
        Columns by name, one value per block.
    """
    levels = [_start(unit, s0)]
    sigmas: list[float] = []
    steps: list[Array] = []
    grid = _common_grid(unit, s0, len(shapes)) if unit.branch else None
    for index, shape in enumerate(shapes):
        last = levels[-1]
        sigma = _branch_std(unit, shape, _second_moment(unit, last))
        nodes, weights = grid or _next_grid(unit, last, sigma)
        if grid and index > 1:
            step = steps[-1]  # same grid, same sigma: one matrix serves all blocks
        else:
            step = weights[:, None] * _gauss(nodes[:, None] - unit.phi(last.nodes), sigma)
        levels.append(_advance(unit, last, shape, nodes, weights, step, sigma))
        sigmas.append(sigma)
        steps.append(step)
    pairs = zip(levels, levels[1:], shapes, sigmas, strict=False)
    rows = [_describe(unit, *pair) for pair in pairs]
    columns = {name: np.array([entry[name] for entry in rows]) for name in rows[0]}
    columns |= _backward(unit, levels, shapes, steps)
    if unit.branch is None:
        laws = [(unit.phi(level.nodes), level.law) for level in levels]
        gates = columns["attenuation"] ** 2
        columns["grad_growth"] = grow_back_reflected(laws, shapes, sigmas, gates)
    return columns


def _grid(low: float, high: float, width: float) -> tuple[Array, Array]:
    """Nodes and weights on panels of `width` with an edge at 0, where phi has its kink."""
    edges = width * np.arange(np.floor(low / width), np.ceil(high / width))
    nodes = (edges[:, None] + width * (_PANEL + 1) / 2).ravel()
    return nodes, np.tile(_WEIGHTS * width / 2, len(edges))


def _gauss(x: Array, sigma: float) -> Array:
    return np.asarray(np.exp(-((x / sigma) ** 2) / 2) / (sigma * np.sqrt(2 * np.pi)))


def _start(unit: WalkUnit, s0: float) -> Level:
    q = ACTIVATIONS[unit.after_add].input_variance(s0)
    nodes, weights = _grid(-_REACH * np.sqrt(q), _REACH * np.sqrt(q), np.sqrt(q))
    masses = weights * _gauss(nodes, np.sqrt(q))
    values = unit.phi(nodes)
    return Level(
        nodes=nodes,
        weights=weights,
        masses=masses[:, None],
        shares=np.ones(1),
        through=masses,
        stage_through=masses,
        drifted=(values, values, masses),
    )


def _branch_std(unit: WalkUnit, shape: BlockShape, s: float) -> float:
    """sigma_l: 1 behind BatchNorm; else the recursion q2 = g2 M(g1 s)."""
    if unit.branch:
        return 1.0
    activation = ACTIVATIONS["relu"]
    return float(np.sqrt(shape.gain2 * activation.second_moment(shape.gain1 * s)))


def _common_grid(unit: WalkUnit, s0: float, blocks: int) -> tuple[Array, Array]:
    """A grid wide enough for every block of a walk with unit steps."""
    lowest = float(unit.phi(np.array([-np.inf]))[0])
    return _grid(lowest - _REACH, _REACH * (np.sqrt(s0 + blocks) + 1), 1.0)


def _next_grid(unit: WalkUnit, last: Level, sigma: float) -> tuple[Array, Array]:
    """A grid that follows the scale of the signal, and drops a tail that nothing reaches."""
    values = unit.phi(last.nodes)
    spread = np.sqrt(_second_moment(unit, last) + sigma**2)
    high = min(float(values.max()), _REACH * spread) + _REACH * sigma
    return _grid(float(values.min()) - _REACH * sigma, high, sigma)


def _advance(
    unit: WalkUnit,
    last: Level,
    shape: BlockShape,
    nodes: Array,
    weights: Array,
    step: Array,
    sigma: float,
) -> Level:
    """The law behind one more block; `step[i, j]`: probability to go from node j to node i."""
    slope = unit.slope(nodes)
    masses, shares, through = step @ last.masses, last.shares, slope * (step @ last.through)
    first, current, law = last.drifted
    if shape.transition:
        appended = weights * _gauss(nodes, sigma)
        masses = np.column_stack([masses, appended])
        shares = np.append(shares * shape.kept, 1 - shape.kept)
        arriving = shape.kept * (step @ last.law) + (1 - shape.kept) * appended
        first = current = unit.phi(last.nodes)
        law = last.law
    else:
        arriving = step @ last.stage_through
    return Level(
        nodes=nodes,
        weights=weights,
        masses=masses,
        shares=shares,
        through=through,
        stage_through=slope * arriving,
        drifted=(first, unit.phi(current), law),
    )


def _second_moment(unit: WalkUnit, level: Level) -> float:
    return float(level.law @ unit.phi(level.nodes) ** 2)


def _describe(
    unit: WalkUnit, last: Level, now: Level, shape: BlockShape, sigma: float
) -> dict[str, float]:
    """One block's numbers, named as in `Prediction`."""
    law, u, slope = now.law, now.nodes, unit.slope(now.nodes)
    h, x = unit.phi(u), unit.phi(last.nodes)
    shortcut = shape.kept * float(last.law @ x**2)
    first, drifted, masses = now.drifted
    return {
        "second_moment": float(law @ h**2),
        "mean": float(law @ h),
        "skip_gain": float(now.through.sum()),
        "skip_gain_stage": float(now.stage_through.sum()),
        "perturbation": float(np.sqrt((law @ (h - u) ** 2) / (law @ u**2))),
        "identity_defect": _relative(last.law, unit.phi(x) - x, x),
        "identity_drift": _relative(masses, drifted - first, first),
        "branch_ratio": sigma / np.sqrt(shortcut),
        "negative_fraction": float(law[u < 0].sum()),
        "slope_mean": float(law @ slope),
        "slope_mean_sq": float(law @ slope**2),
    }


def _relative(law: Array, change: Array, value: Array) -> float:
    return float(np.sqrt((law @ change**2) / (law @ value**2)))


def _backward(
    unit: WalkUnit, levels: Sequence[Level], shapes: Sequence[BlockShape], steps: Sequence[Array]
) -> dict[str, Array]:
    """|g_{l-1}|^2 / |g_l|^2 = gate_l (1 + G_l), with the gates' memory.

    e_l(H), the expected squared gradient of a unit whose value is H, obeys
    e_{l-1}(H) = E[phi'(u)^2 e_l(phi(u)) | H] + G_l E[phi'^2 e_l]: the shortcut keeps it with the
    unit, the branch (random weights) spreads it evenly. Units away from the barrier have kept
    their gradient, so gates of successive blocks are not independent. The power of the depth is
    right; measured totals ||g_0||/||g_L|| lie between 0.6 and 1.8 times the predicted ones.
    """
    growth = np.empty(len(shapes))
    attenuation = np.empty(len(shapes))
    energy = np.ones(len(levels[-1].nodes))
    for index in range(len(shapes) - 1, -1, -1):
        last, now, shape = levels[index], levels[index + 1], shapes[index]
        gated = unit.slope(now.nodes) ** 2 * energy
        total, passed = float(now.law @ energy), float(now.law @ gated)
        # per unit: at a transition one position of four is kept and units halve in number
        kept, units = (0.25, 2.0) if shape.transition else (1.0, 1.0)
        energy = kept * (gated @ steps[index]) + _gain(unit, last, shape) * passed / units
        growth[index] = units * float(last.law @ energy) / total
        attenuation[index] = np.sqrt(passed / total)
    return {"grad_growth": growth, "attenuation": attenuation}


def _gain(unit: WalkUnit, last: Level, shape: BlockShape) -> float:
    """G of a branch: with BatchNorm `NormalisedBranch.gain`, else g1 g2 D(g1 s)."""
    s = _second_moment(unit, last)
    if unit.branch:
        mean_sq = float((unit.phi(last.nodes) @ last.masses) ** 2 @ last.shares)
        return unit.branch.gain(shape, s, mean_sq)
    slope = float(ACTIVATIONS["relu"].slope_sq(shape.gain1 * s))
    return shape.gain1 * shape.gain2 * slope
