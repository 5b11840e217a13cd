"""The kinds of plots by name: a row each, and the module of this folder that draws it.

No matplotlib here: a mistyped kind is refused before anything slow is imported.
"""

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from resdiag.catalog.custom import known_metrics
from resdiag.errors import UsageError, unknown
from resdiag.plots.plotkind import Draw, PlotKind
from resdiag.registry import Registry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from resdiag.plots.view import View


def _drawn_by(module: str) -> Draw:
    """The `draw` of a module of this folder, which is imported when it draws."""

    def draw(view: "View", /) -> "Figure":
        figure: Figure = import_module(f"resdiag.plots.{module}").draw(view)
        return figure

    return draw


def _quantiled(site: str) -> tuple[str, ...]:
    return (f"{site}_mean", f"{site}_mean_q10", f"{site}_mean_q90", f"{site}_bias")


_FROM_STEM = "the output of the stem at step 0"
_ROWS = (
    PlotKind(
        name="gradnorms",
        title="Gradient norms by block",
        question="Does the gradient explode or vanish in the backward pass, and from which step?",
        reading=(
            "on the log axis, a straight line that rises towards block 0 is an exploding "
            "gradient, one that falls a vanishing gradient. For the parameter gradient, the "
            "level matters as much as the slope: without normalisation it is flat over blocks, "
            "and grows with the depth."
        ),
        needs=("grad_output", "grad_input", "grad_param"),
        draw=_drawn_by("gradnorms"),
        theory_from=f"{_FROM_STEM}, and the level of the gradient at the last block",
    ),
    PlotKind(
        name="biasshift",
        title="Bias shift by block and step",
        question="Are the activations centred, and does their mean drift?",
        reading=(
            "0 is centred. A band away from 0 is a shift that all channels share; a wide band "
            "around 0 is a shift that the mean over channels hides. B2 above 1: the mean is "
            "larger than the signal. After a BatchNorm, the mean of the branch is the learned "
            "bias, 0 at step 0."
        ),
        needs=(*_quantiled("output"), *_quantiled("branch"), "head_mean", "head_bias"),
        draw=_drawn_by("biasshift"),
    ),
    PlotKind(
        name="skip",
        title="Skip path by block",
        question="How much of the identity path survives the activation after the addition?",
        reading=(
            "P1, P2 and P4 are 0 and P3 is 1 if nothing follows the addition. P3 is what is "
            "left of a gradient that passed through shortcuts only; below 0.05 at the last "
            "block, the skip path has collapsed. P2 above 0: the block cannot be an identity."
        ),
        needs=(
            "perturbation",
            "identity_defect",
            "identity_drift",
            "branch_ratio",
            "skip_gain_stage",
            "skip_gain",
        ),
        draw=_drawn_by("skip"),
        theory_from=_FROM_STEM,
    ),
    PlotKind(
        name="signal",
        title="Signal propagation by block",
        question="Does the signal keep its scale in the forward pass?",
        reading=(
            "on the log axis, a straight rising line is exponential growth. With BatchNorm on "
            "the branch, its variance starts at 1, and that of the output grows by a constant "
            "per block, reset at each stage. Squared mean above variance: the means dominate "
            "the signal."
        ),
        needs=(
            "output_second_moment",
            "output_channel_mean_sq",
            "output_channel_var",
            "branch_channel_var",
        ),
        draw=_drawn_by("signal"),
        theory_from=_FROM_STEM,
    ),
    PlotKind(
        name="growth",
        title="Growth per block, forward and backward",
        question="By what factor does each block multiply the signal and the gradient?",
        reading=(
            "a factor of 1 keeps the scale. A factor that stays above 1 in a stage compounds: "
            "1.8 per block is 10^14 over 54 blocks. A factor that falls to 1 with depth is a "
            "power law, not an explosion. Stage means are geometric, bars show the range over "
            "the blocks; transition blocks are excluded."
        ),
        needs=("forward_growth", "grad_growth"),
        draw=_drawn_by("growth"),
        theory_from=_FROM_STEM,
        first_step_only=True,
    ),
    PlotKind(
        name="curves",
        title="Training curves",
        question="Does the network learn, stall or diverge?",
        reading=(
            "a loss of ln K is that of random guessing. If the loss jumps in the first steps "
            "and returns to ln K, the network has lost its features; the gradient norm shows "
            "whether the gradient is lost too."
        ),
        needs=("loss", "error", "lr", "grad_norm", "train_error", "test_error", "test_loss"),
        draw=_drawn_by("curves"),
        axis="step",
    ),
    PlotKind(
        name="depth",
        title="Error by depth",
        question="Does a deeper network of the same variant learn better or worse?",
        reading=(
            "a variant with a falling line gains from depth, one with a rising line degrades. "
            "If the training error rises too, the optimisation fails, not the generalisation. "
            "Markers are medians over seeds, bars show the range."
        ),
        needs=("test_error", "train_error"),
        draw=_drawn_by("bydepth"),
        axis="step",
        compares=True,
    ),
    PlotKind(
        name="updates",
        title="Update to weight ratio by block and step",
        question="How far does a step move the weights of each block?",
        reading=(
            "about 1e-3 is usual; above 0.1 a step replaces the weights, far below 1e-4 a block"
            " hardly learns. Blocks whose ratios differ by decades train at different speeds."
        ),
        needs=("update_ratio",),
        draw=_drawn_by("by_metric"),
    ),
    PlotKind(
        name="nonfinite",
        title="Where and when values become non-finite",
        question="Where do infinities or NaN first appear: block, step, and direction of the pass?",
        reading=(
            "the mark is the first step with a non-finite value, and the block where it arose: the "
            "lowest in the forward pass, the highest in the backward pass. What follows is a "
            "consequence. Of one run that stays finite, the change of the gradient is shown "
            "instead."
        ),
        needs=("output_nonfinite", "grad_nonfinite", "grad_output"),
        draw=_drawn_by("nonfinite"),
        axis="runs",
    ),
)
KINDS: Registry[PlotKind] = Registry("plot", _ROWS)
"""Every kind of plot by name, in the order of the documentation; registered ones behind."""

ACTIVATION_PLOT = PlotKind(
    name="activations",
    title="ReLU and ELU",
    question="How do the two activations shift the mean of their output?",
    reading=(
        "ReLU is never negative, so its mean output is far from 0; ELU's negative values, "
        "down to -1, pull it towards 0. Horizontal lines: the mean output for standard "
        "normal input. Neither slope exceeds 1: no activation makes a gradient explode by "
        "itself."
    ),
    needs=(),
    draw=_drawn_by("activations"),
)
"""A plot that no run is needed for; a study file may name it, `resdiag plot` not."""


def register_plot(kind: PlotKind) -> None:
    """Add a kind of plot to `resdiag.draw`, `resdiag plot`, reports and study files.

    It is available in this process only; to use it on the command line, start the command from a
    script that registers it first.

    Raises:
        RegistrationError: There is another kind, or a metric, of that name.
    """
    KINDS.add(kind, taken=known_metrics())


def unregister_plot(name: str) -> None:
    """Forget a kind of plot that was registered.

    Raises:
        RegistrationError: It is built in, or not registered.
    """
    KINDS.remove(name)


def find_kind(name: str, custom: Iterable[Mapping[str, str]] = ()) -> PlotKind:
    """Look a kind of plot up by name, or make one of a metric per block.

    Args:
        name: One of `KINDS`, or the id of a metric.
        custom: Custom metrics that the runs to draw have: id, label, unit, ...

    Raises:
        UsageError: There is none; the message has the nearest match.

    >>> find_kind("growth").needs
    ('forward_growth', 'grad_growth')
    """
    if name in KINDS:
        return KINDS[name]
    metrics = {m.id: m for m in known_metrics().values() if m.site != "run"}
    labels = {m.id: (m.label, m.formula, m.reading) for m in metrics.values()}
    labels |= {
        entry["id"]: (entry["label"], entry.get("formula", ""), entry.get("reading", ""))
        for entry in custom
    }
    if name not in labels:
        near = unknown("plot", name, [*KINDS, *labels]).message.partition(" known:")[0]
        listed = ", ".join([*KINDS, *(entry["id"] for entry in custom)])
        raise UsageError(f"{near} known: {listed}; or any metric of `resdiag metrics`")
    label, formula, reading = labels[name]
    return PlotKind(
        name=name,
        title=f"{label[:1].upper()}{label[1:]} by block and step",
        question=f"How does {name} = {formula} change along depth and over time?",
        reading=f"{reading}. {name} = {formula}.",
        needs=(name,),
        draw=_drawn_by("by_metric"),
    )
