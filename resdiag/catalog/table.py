"""The catalogue of everything that is recorded: one entry per metric; the derived ones' formulas.

Symbols: x block input, h(x) shortcut, F(x) branch, u = h + F the sum, H = f(u) the output with f
the after-add; g = dL/dH, L the mean loss over a batch of B samples; mu_c, sigma_c^2 mean and
variance of channel c over batch and positions. No torch here: plots and tables do not need it.
"""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from resdiag.catalog.set_metrics import OF_BLOCKS, ON_CADENCE
from resdiag.catalog.site_metrics import CLEVERT, Column, site_metrics
from resdiag.catalog.site_metrics import Metric as Metric

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


SITES = ("input", "branch", "shortcut", "sum", "output")
"""Where a tensor is taken in a block: x, F(x), h(x), u, H."""

POINTS = ("local", "reduced", "unscaled", "pre_clip", "post_clip")
"""Points at which gradients can be read; every series carries one."""

_HE2016 = "He et al. 2016, arXiv:1603.05027, eq. 5"
_SHAH = "Shah et al. 2016, arXiv:1604.04112, section "
_YANG = "Yang & Schoenholz 2017, arXiv:1712.08969"
_SLOPES = f"{_YANG} (E phi', E phi'^2)"
_GAIN = f"{_HE2016} (product of shortcut scalings)"
_BLEW = _SHAH + "3.2.1 ('the gradients blew up')"
_LECUN = "LeCun et al. 1998, Efficient BackProp, section 4.3"

# fmt: off
_GRADIENT = [
    Metric("grad_param", "gradient norm of the block's parameters",
        "||dL/dtheta||_2 after backward, before weight decay and clipping", "loss/parameter",
        "block", _BLEW,
        "G1; compare its level between depths: within an exploding net it can be flat over blocks",
        over_ranks="norm of shards"),
    Metric("grad_input", "gradient at the block's input", "sqrt(B) ||dL/dx||_F", "loss/activation",
        "input", _HE2016,
        "G2 at the input: the gradient that earlier blocks receive; independent of batch size",
        over_ranks="gradient"),
    Metric("grad_sum", "gradient at the sum", "sqrt(B) ||dL/du||_F", "loss/activation", "sum",
        _HE2016, "G2 at the sum, after the backward pass through the after-add",
        over_ranks="gradient"),
    Metric("grad_output", "gradient at the block's output", "sqrt(B) ||dL/dH||_F",
        "loss/activation", "output", _HE2016,
        "G2; rising towards block 0: exploding gradient; falling: vanishing gradient",
        over_ranks="gradient"),
    Metric("grad_nonfinite", "non-finite fraction of the output's gradient",
        "share of NaN and infinite elements of dL/dH", "1", "output", "definition",
        "above 0 the backward pass has broken", over_ranks="mean"),
    Metric("elasticity", "elasticity of the loss in the output",
        "sqrt(B) ||dL/dH||_F x RMS_n ||H_n||", "loss", "output",
        "Philipp et al. 2018, arXiv:1712.05577 (GSC surrogate)",
        "G4; scale-invariant: flat if the gradient only compensates the scale of the activations"),
    Metric("shortcut_share", "share of the gradient that came back through the shortcut",
        "<(dh/dx)^T dL/du, dL/dx> / ||dL/dx||^2", "1", "input", _HE2016 + " (the additive 1)",
        "1: all through the shortcut; with the branch's share it sums to 1", over_ranks="mean"),
    Metric("branch_share", "share of the gradient that came back through the branch",
        "1 - shortcut_share", "1", "input", _HE2016,
        "negative: the branch cancels part of the shortcut's gradient",
        derive=lambda f: 1 - f["shortcut_share"]),
    Metric("grad_growth", "squared backward growth per block", "(grad_input / grad_output)^2", "1",
        "block",
        "Yang & Schoenholz 2017, arXiv:1712.08969; Zaeemzadeh et al. 2018, arXiv:1805.07477",
        "G3; above 1 in every block is exponential growth of the gradient",
        derive=lambda f: (f["grad_input"] / f["grad_output"]) ** 2),
    Metric("attenuation", "after-add attenuation of the gradient", "||dL/du|| / ||dL/dH||", "1",
        "block", _HE2016 + " (the derivative of f)",
        "G5; 1 if the block has no after-add",
        derive=lambda f: f["grad_sum"] / f["grad_output"]),
]

_SKIP = [
    Metric("perturbation", "perturbation of the sum", "||H - u||_F / ||u||_F", "1", "block",
        _SHAH + "3.2.3 ('perturb the output')",
        "P1; relative change of the sum by the after-add; 0 without one", over_ranks="rms"),
    Metric("identity_defect", "identity defect", "||f(h) - h||_F / ||h||_F", "1", "block",
        _SHAH + "3.2.3; He et al. 2016 section 4.2",
        "P2; error of the block as an identity when its branch is 0", over_ranks="rms"),
    Metric("skip_gain_stage", "skip gain since the stage began",
        "mean over units of prod f'(u_k), k from the stage's first block", "1", "block",
        _GAIN,
        "P3 (i); what is left of a unit gradient that passed through shortcuts only",
        over_ranks="mean"),
    Metric("skip_gain", "skip gain since the network's first block",
        "mean over surviving units of prod f'(u_k), k from the first block, through h; from the "
        "stage's first block where that has a projection", "1", "block", _GAIN,
        "P3 (ii); below 0.05 at the last block the skip path has collapsed; a stage that begins "
        "with a projection begins it anew, since no unit leads on through it", over_ranks="mean"),
    Metric("identity_drift", "identity drift since the stage began",
        "||f^(n)(h_1) - h_1||_F / ||h_1||_F, n blocks into the stage", "1", "block",
        _SHAH + "3.2.3; accumulated P2",
        "P4; 0 if f is idempotent (ReLU) or absent, grows with n for ELU", over_ranks="rms"),
    Metric("branch_ratio", "branch to shortcut ratio", "||F||_F / ||h||_F", "1", "block",
        "De & Smith 2020, arXiv:2002.10444",
        "near 1 in every block doubles the variance per block; l^-1/2 with BatchNorm"),
    Metric("negative_fraction", "negative fraction of the sum", "share of u < 0", "1", "sum",
        _SLOPES,
        "the share of units that the after-add acts on", over_ranks="mean"),
    Metric("slope_mean", "mean slope of the after-add", "mean f'(u)", "1", "sum",
        _SLOPES,
        "its product over blocks is NOT the skip gain: gates correlate along depth",
        over_ranks="mean"),
    Metric("slope_mean_sq", "mean squared slope of the after-add", "mean f'(u)^2", "1", "sum",
        _YANG,
        "factor on the squared gradient, if it were independent of the slopes", over_ranks="mean"),
]

_HEALTH = [
    Metric("forward_growth", "forward growth per block", "E[H^2] / E[x^2]", "1", "block",
        "Zhang et al. 2019, arXiv:1901.09321 (Fixup), eq. 4",
        "2 in every block: an un-normalised sum doubles the variance",
        derive=lambda f: f["output_second_moment"] / f["input_second_moment"]),
    Metric("saturated_fraction", "saturated fraction",
        "share of activation outputs in the block whose slope is below 0.05", "1", "block",
        "definition", "half is normal for ReLU; near 1 little gradient passes the activations"),
    Metric("dead_fraction", "dead fraction",
        "share of the block's activation channels saturated for every sample and position", "1",
        "block", "definition", "channels that pass no gradient for any recorded sample"),
    Metric("update_ratio", "update to weight ratio",
        "||theta_after - theta_before||_2 / ||theta_before||_2", "1", "block",
        "You et al. 2017, arXiv:1708.03888 (trust ratio)",
        "about 1e-3 is usual; above 0.1 a step replaces the weights", over_ranks="rms of shards"),
]

_RUN = [
    Metric("loss", "loss", "mean cross-entropy of the batch", "nat", "run", "definition",
        "ln K is guessing"),
    Metric("grad_norm", "gradient norm of all parameters", "||dL/dtheta||_2 over the network",
        "loss/parameter", "run", _BLEW,
        "over depth on a log axis: the level rises steeply for a variant that explodes"),
    Metric("lr_grad_norm", "learning rate times gradient norm", "lr ||dL/dtheta||_2", "loss", "run",
        "observed on a and b with He initialisation, see the theory page",
        "a rule of thumb: of runs of a and b below 0.6, 28 of 28 lived 50 steps, above it 7 of 68",
        derive=lambda f: f["lr"] * f["grad_norm"]),
    Metric("head_mean", "mean of the pooled features",
        "mean_c of the batch mean of the classifier's input", "activation", "run", CLEVERT,
        "B1 at the head"),
    Metric("head_bias", "bias shift of the pooled features",
        "sqrt(mean_c mu_c^2 / mean_c sigma_c^2) of the classifier's input", "1", "run", CLEVERT,
        "B2 at the head"),
    Metric("head_kick", "head kick", "lr (1 + momentum) (||E_n hbar||^2 + 1) max_k |p_k - y_k|",
        "logit", "run",
        "first-order effect of one Nesterov step of a cross-entropy on the classifier",
        "B3; how far the first step moves a mean logit; grows with the head's mean"),
    Metric("head_loss", "cross-entropy at the last linear layer",
        "mean over rows of -log p_k; the label k is where dL/dlogits is least", "nat", "run",
        "dL/dlogits = (p - y) / N",
        "the loss, even if the loop did not report it; negative where the loop maximises it; NaN "
        "if the gradient is not that of a cross-entropy"),
    Metric("label_share", "share of the most frequent label in the batch",
        "max_k of the share of rows with label k", "1", "run", "definition",
        "1 in every batch: the labels are constant"),
    Metric("head_factor", "factor on the mean cross-entropy",
        "number of rows with a gradient times the median over them of -g_k / (1 - p_k)", "1",
        "run", "dL/dlogits = (p - y) / N",
        "1 for a mean over the batch, the number of rows for a sum, 1/k where a step adds up k "
        "batches"),
    Metric("rows_ignored", "share of rows without a gradient at the logits",
        "share of rows of dL/dlogits that are 0", "1", "run", "definition",
        "1: no sample counts, as where every label is ignored"),
    Metric("softmax_twice", "share of rows that fit a cross-entropy of probabilities",
        "share of rows with dL/dz parallel to J (q - y), p = softmax(z), q = softmax(p), J = dp/dz",
        "1", "run", "definition",
        "1: softmax is applied twice, before the loss and in it"),
    Metric("label_copies", "share of labels that are the token at the same place",
        "share of rows with a gradient whose label is the model's input there", "1", "run",
        "definition",
        "1 in every batch: the targets are the input; NaN where the input is not token ids"),
    Metric("output_loss", "cross-entropy at the model's output behind an activation",
        "as head_loss, of the activated output in place of the logits", "nat", "run",
        "dL/dlogits = (p - y) / N",
        "not NaN: the loss takes the activated output, with which the model ends, for logits"),
    Metric("grad_kept", "norm of the gradient that is there before the backward pass",
        "||dL/dtheta||_2 of the first parameter of the blocks that gets a gradient, right before "
        "it does, in steps with one forward pass that follow an update", "loss/parameter", "run",
        "definition", "above 0: the gradients of the step before were not set to zero"),
    Metric("data_mean", "mean of the model's input",
        "mean of the model's first floating-point input", "input", "run",
        _LECUN,
        "far from 0 in units of the standard deviation: not normalised"),
    Metric("data_std", "standard deviation of the model's input",
        "standard deviation of the model's first floating-point input", "input", "run",
        _LECUN,
        "about 1 where the input is normalised; 0 if it is constant"),
    Metric("data_nonfinite", "non-finite fraction of the model's input",
        "share of NaN and infinite elements of the model's first floating-point input", "1", "run",
        "definition", "above 0: the data contain NaN or infinity"),
    Metric("data_between", "spread between samples of the model's input",
        "RMS deviation of the first 8 samples from their mean over the input's standard deviation; "
        "of whole numbers, the share that differ from those of the first sample", "1", "run",
        "definition", "0: every sample is the same"),
    Metric("momentum", "momentum", "of the optimizer's first group; 0 where it has no such setting",
        "1", "run", "definition", "the step is 1 / (1 - momentum) times as large in the long run"),
    Metric("weight_decay", "weight decay", "the largest of the optimizer's groups", "1", "run",
        "definition", "times the learning rate: the fraction by which a step shrinks the weights"),
]
# fmt: on

METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        entry.id: entry
        for group in (
            *(_GRADIENT, *map(site_metrics, SITES), _SKIP, _HEALTH, _RUN),
            *ON_CADENCE.values(),
        )
        for entry in group
    }
)
"""Every metric by id, in the order in which frames show them."""

RECORDED = tuple(
    m.id for m in METRICS.values() if m.derive is None and m.site != "run" and m.id not in OF_BLOCKS
)
"""Columns of every run's metrics files, one value per step and block; those of
`set_metrics.ON_CADENCE` are there only where something was measured."""

CORE = tuple(
    name
    for name in RECORDED
    if name.startswith(("branch_", "shortcut_mean", "shortcut_channel", "output_"))
    or name in ("shortcut_nonfinite", "grad_param", "grad_output", "grad_nonfinite")
    or name in ("elasticity", "perturbation")
)
"""The columns of `attach(metrics="core")`: gradient norms by parameter and by output, moments of
branch, shortcut and output, branch over shortcut, and P1. The others are NaN."""

DATA = ("data_mean", "data_std", "data_nonfinite", "data_between")
"""What a batch shows of the data."""

HEAD_LOSS = (
    *("head_loss", "label_share", "head_factor", "rows_ignored", "softmax_twice"),
    "label_copies",
)
"""What the gradient at the logits tells."""

LOCAL = (*DATA, *HEAD_LOSS, "output_loss", "grad_kept")
"""What is recorded of eager passes that one process records alone."""

RECORDED_PER_STEP = (
    *("lr", "grad_norm", "head_mean", "head_bias", "head_kick", *HEAD_LOSS, "output_loss"),
    *("grad_kept", *DATA, "momentum", "weight_decay"),
)
"""What a Monitor records once per step; training adds loss, error and speed."""


class _Asked(dict[str, float]):
    """Stands for a frame's columns and remembers which ones a formula reads."""

    def __missing__(self, key: str) -> float:
        self[key] = 1.0
        return 1.0


def inputs_of(metric: str) -> set[str]:
    """The recorded metrics that `metric` is computed from, itself if recorded.

    >>> sorted(inputs_of("grad_growth"))
    ['grad_input', 'grad_output']
    """
    entry = METRICS.get(metric)
    if entry is None or entry.derive is None:
        return {metric}
    asked: Any = _Asked()
    entry.derive(asked)
    return set().union(*(inputs_of(name) for name in asked))


def derive(
    columns: Mapping[str, "ArrayLike"],
    *,
    per_step: bool = False,
    names: Collection[str] | None = None,
) -> dict[str, Column]:
    """Compute the derived metrics from recorded columns (numpy arrays or pandas Series).

    Columns are cast to float64 first: squares of finite float32 values then stay finite. Division
    by zero gives inf or NaN, never an error.

    Args:
        columns: Recorded columns by id; derived ones whose inputs are missing are left out.
        per_step: Derive the `site == "run"` metrics instead of the per-block ones.
        names: Those to compute, and what they are made of; None for all.
    """
    import numpy as np

    wanted = None if names is None else _with_intermediate(names)
    read = None if wanted is None else set().union(*(inputs_of(name) for name in wanted), [])
    known = {
        name: np.asarray(values, dtype=np.float64)
        for name, values in columns.items()
        if read is None or name in read
    }
    out: dict[str, Column] = {}
    # moments first: forward growth is made of them
    order = sorted(METRICS.values(), key=lambda metric: metric.id == "forward_growth")
    with np.errstate(all="ignore"):
        for metric in order:
            if metric.derive is None or (metric.site == "run") != per_step:
                continue
            if wanted is not None and metric.id not in wanted:
                continue
            try:
                out[metric.id] = metric.derive({**known, **out})
            except KeyError:
                continue
    return out


def _with_intermediate(names: Collection[str]) -> set[str]:
    """Derived metrics among `names`, and derived ones that those are made of."""
    out: set[str] = set()
    for name in names:
        entry = METRICS.get(name)
        if entry is not None and entry.derive is not None:
            asked: Any = _Asked()
            entry.derive(asked)
            out |= {name} | _with_intermediate(asked)
    return out
