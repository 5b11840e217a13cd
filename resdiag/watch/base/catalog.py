"""The catalogue of everything that is recorded: one entry per metric; the derived ones' formulas.

Symbols: x block input, h(x) shortcut, F(x) branch, u = h + F the sum, H = f(u) the output with f
the after-add; g = dL/dH, L the mean loss over a batch of B samples; mu_c, sigma_c^2 mean and
variance of channel c over batch and positions. No torch here: plots and tables do not need it.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

Column: TypeAlias = "NDArray[np.float64]"
Columns: TypeAlias = "Mapping[str, NDArray[np.float64]]"

SITES = ("input", "branch", "shortcut", "sum", "output")
"""Where a tensor is taken in a block: x, F(x), h(x), u, H."""

SETS = ("full", "core")
"""Sets of recorded columns: everything, or what costs next to nothing; see `CORE`."""

POINTS = ("local", "reduced", "unscaled", "pre_clip", "post_clip")
"""Points at which gradients can be read; every series carries one."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One entry of the catalogue.

    Attributes:
        id: Column name in frames and Parquet files.
        label: Words for an axis.
        formula: Definition in the symbols of this module.
        unit: "1" for ratios, else that of the quantity it scales with.
        site: Where it is taken; "block" for the whole unit, "run" for one value per step.
        source: Paper and place.
        reading: One sentence: what a high or low value means.
        derive: For derived metrics, the function of a frame's columns; None if recorded.
    """

    id: str
    label: str
    formula: str
    unit: str
    site: str
    source: str
    reading: str
    derive: Callable[[Columns], Column] | None = None


_BROCK = "Brock et al. 2021, arXiv:2101.08692, signal propagation plots"
_CLEVERT = "Clevert et al. 2015, arXiv:1511.07289, section 2 (bias shift)"
_HE2016 = "He et al. 2016, arXiv:1603.05027, eq. 5"
_SHAH = "Shah et al. 2016, arXiv:1604.04112, section "


def _site_metrics(site: str) -> list[Metric]:
    """The moments of one site: recorded in a form that cannot overflow, then derived."""

    def bias(f: Columns) -> Column:
        return f[f"{site}_channel_mean_rms"] / f[f"{site}_channel_std"]

    def second_moment(f: Columns) -> Column:
        return f[f"{site}_channel_mean_rms"] ** 2 + f[f"{site}_channel_std"] ** 2

    def channel_mean_sq(f: Columns) -> Column:
        return f[f"{site}_channel_mean_rms"] ** 2

    def channel_var(f: Columns) -> Column:
        return f[f"{site}_channel_std"] ** 2

    quantiles = [
        Metric(
            id=f"{site}_mean_q{q}",
            label=f"{q} % quantile of the {site}'s channel means",
            formula=f"quantile_{q / 100:g} over c of mu_c",
            unit="activation",
            site=site,
            source=_CLEVERT + ", Fig. 1",
            reading="a wide spread around 0 is bias shift that the signed mean hides",
        )
        for q in (10, 50, 90)
    ]
    return [
        Metric(
            id=f"{site}_mean",
            label=f"mean of the {site}",
            formula="mean_c mu_c",
            unit="activation",
            site=site,
            source=_CLEVERT,
            reading="B1; 0 is centred; after a BatchNorm it is the learned bias",
        ),
        Metric(
            id=f"{site}_channel_mean_rms",
            label=f"RMS over channels of the {site}'s channel means",
            formula="sqrt(mean_c mu_c^2)",
            unit="activation",
            site=site,
            source=_BROCK,
            reading="the part of the signal that is the same for every sample",
        ),
        Metric(
            id=f"{site}_channel_std",
            label=f"RMS over channels of the {site}'s channel standard deviations",
            formula="sqrt(mean_c sigma_c^2)",
            unit="activation",
            site=site,
            source=_BROCK,
            reading="the part of the signal that tells samples and positions apart",
        ),
        *quantiles,
        Metric(
            id=f"{site}_nonfinite",
            label=f"non-finite fraction of the {site}",
            formula="share of NaN and infinite elements",
            unit="1",
            site=site,
            source="definition",
            reading="above 0 the forward pass has broken",
        ),
        Metric(
            id=f"{site}_bias",
            label=f"bias shift of the {site}",
            formula="sqrt(mean_c mu_c^2 / mean_c sigma_c^2)",
            unit="1",
            site=site,
            source=_CLEVERT,
            reading="B2; 0 is centred, above 1 the mean is larger than the signal",
            derive=bias,
        ),
        Metric(
            id=f"{site}_second_moment",
            label=f"second moment of the {site}",
            formula="E[x^2] = mean_c mu_c^2 + mean_c sigma_c^2",
            unit="activation^2",
            site=site,
            source="De & Smith 2020, arXiv:2002.10444; Hanin & Rolnick 2018, arXiv:1803.01719",
            reading="straight and rising on a log axis is exponential growth with depth",
            derive=second_moment,
        ),
        Metric(
            id=f"{site}_channel_mean_sq",
            label=f"average channel squared mean of the {site}",
            formula="mean_c mu_c^2",
            unit="activation^2",
            site=site,
            source=_BROCK,
            reading="above the average channel variance, means dominate the signal",
            derive=channel_mean_sq,
        ),
        Metric(
            id=f"{site}_channel_var",
            label=f"average channel variance of the {site}",
            formula="mean_c sigma_c^2",
            unit="activation^2",
            site=site,
            source=_BROCK,
            reading="grows by the branch's variance per block; resets at a transition",
            derive=channel_var,
        ),
    ]


_GRADIENT = [
    Metric(
        id="grad_param",
        label="gradient norm of the block's parameters",
        formula="||dL/dtheta||_2 after backward, before weight decay and clipping",
        unit="loss/parameter",
        site="block",
        source=_SHAH + "3.2.1 ('the gradients blew up')",
        reading="G1; its level against depth shows an explosion; within a net it can be flat",
    ),
    Metric(
        id="grad_input",
        label="gradient at the block's input",
        formula="sqrt(B) ||dL/dx||_F",
        unit="loss/activation",
        site="input",
        source=_HE2016,
        reading="G2 at the input: what earlier blocks receive; batch-size free",
    ),
    Metric(
        id="grad_sum",
        label="gradient at the sum",
        formula="sqrt(B) ||dL/du||_F",
        unit="loss/activation",
        site="sum",
        source=_HE2016,
        reading="G2 behind the after-add",
    ),
    Metric(
        id="grad_output",
        label="gradient at the block's output",
        formula="sqrt(B) ||dL/dH||_F",
        unit="loss/activation",
        site="output",
        source=_HE2016,
        reading="G2; rising towards block 0 explodes, falling vanishes",
    ),
    Metric(
        id="grad_nonfinite",
        label="non-finite fraction of the output's gradient",
        formula="share of NaN and infinite elements of dL/dH",
        unit="1",
        site="output",
        source="definition",
        reading="above 0 the backward pass has broken",
    ),
    Metric(
        id="elasticity",
        label="elasticity of the loss in the output",
        formula="sqrt(B) ||dL/dH||_F x RMS_n ||H_n||",
        unit="loss",
        site="output",
        source="Philipp et al. 2018, arXiv:1712.05577 (GSC surrogate)",
        reading="G4; scale free: flat if the gradient only undoes the activations' scale",
    ),
    Metric(
        id="shortcut_share",
        label="share of the gradient that came back through the shortcut",
        formula="<(dh/dx)^T dL/du, dL/dx> / ||dL/dx||^2",
        unit="1",
        site="input",
        source=_HE2016 + " (the additive 1)",
        reading="1: all through the shortcut; with the branch's share it sums to 1",
    ),
    Metric(
        id="branch_share",
        label="share of the gradient that came back through the branch",
        formula="1 - shortcut_share",
        unit="1",
        site="input",
        source=_HE2016,
        reading="negative: the branch cancels part of the shortcut's gradient",
        derive=lambda f: 1 - f["shortcut_share"],
    ),
    Metric(
        id="grad_growth",
        label="squared backward growth per block",
        formula="(grad_input / grad_output)^2",
        unit="1",
        site="block",
        source="Yang & Schoenholz 2017, arXiv:1712.08969; Zaeemzadeh et al. 2018, arXiv:1805.07477",
        reading="G3; above 1 in every block is exponential growth of the gradient",
        derive=lambda f: (f["grad_input"] / f["grad_output"]) ** 2,
    ),
    Metric(
        id="attenuation",
        label="after-add attenuation of the gradient",
        formula="||dL/du|| / ||dL/dH||",
        unit="1",
        site="block",
        source=_HE2016 + " (the derivative of f)",
        reading="G5; 1 where nothing stands after the addition",
        derive=lambda f: f["grad_sum"] / f["grad_output"],
    ),
]

_SKIP = [
    Metric(
        id="perturbation",
        label="perturbation of the sum",
        formula="||H - u||_F / ||u||_F",
        unit="1",
        site="block",
        source=_SHAH + "3.2.3 ('perturb the output')",
        reading="P1; what the after-add does to the sum; 0 without one",
    ),
    Metric(
        id="identity_defect",
        label="identity defect",
        formula="||f(h) - h||_F / ||h||_F",
        unit="1",
        site="block",
        source=_SHAH + "3.2.3; He et al. 2016 section 4.2",
        reading="P2; error of the block as an identity when its branch is 0",
    ),
    Metric(
        id="skip_gain_stage",
        label="skip gain since the stage began",
        formula="mean over units of prod f'(u_k), k from the stage's first block",
        unit="1",
        site="block",
        source=_HE2016 + " (product of shortcut scalings)",
        reading="P3 (i); what is left of a unit gradient that took shortcuts only",
    ),
    Metric(
        id="skip_gain",
        label="skip gain since the network's first block",
        formula="mean over surviving units of prod f'(u_k), k from the first block, through h",
        unit="1",
        site="block",
        source=_HE2016 + " (product of shortcut scalings)",
        reading="P3 (ii); below 0.05 at the last block the skip path has collapsed",
    ),
    Metric(
        id="identity_drift",
        label="identity drift since the stage began",
        formula="||f^(n)(h_1) - h_1||_F / ||h_1||_F, n blocks into the stage",
        unit="1",
        site="block",
        source=_SHAH + "3.2.3; accumulated P2",
        reading="P4; 0 if f is idempotent (ReLU) or absent, grows with n for ELU",
    ),
    Metric(
        id="branch_ratio",
        label="branch to shortcut ratio",
        formula="||F||_F / ||h||_F",
        unit="1",
        site="block",
        source="De & Smith 2020, arXiv:2002.10444",
        reading="near 1 in every block doubles the variance per block; l^-1/2 with BatchNorm",
    ),
    Metric(
        id="negative_fraction",
        label="negative fraction of the sum",
        formula="share of u < 0",
        unit="1",
        site="sum",
        source="Yang & Schoenholz 2017, arXiv:1712.08969 (E phi', E phi'^2)",
        reading="the share of units that the after-add acts on",
    ),
    Metric(
        id="slope_mean",
        label="mean slope of the after-add",
        formula="mean f'(u)",
        unit="1",
        site="sum",
        source="Yang & Schoenholz 2017, arXiv:1712.08969 (E phi', E phi'^2)",
        reading="its product over blocks is NOT the skip gain: gates correlate along depth",
    ),
    Metric(
        id="slope_mean_sq",
        label="mean squared slope of the after-add",
        formula="mean f'(u)^2",
        unit="1",
        site="sum",
        source="Yang & Schoenholz 2017, arXiv:1712.08969",
        reading="what independent gates would do to the squared gradient",
    ),
]

_HEALTH = [
    Metric(
        id="forward_growth",
        label="forward growth per block",
        formula="E[H^2] / E[x^2]",
        unit="1",
        site="block",
        source="Zhang et al. 2019, arXiv:1901.09321 (Fixup), eq. 4",
        reading="2 in every block: an un-normalised sum doubles the variance",
        derive=lambda f: f["output_second_moment"] / f["input_second_moment"],
    ),
    Metric(
        id="saturated_fraction",
        label="saturated fraction",
        formula="share of activation outputs in the block whose slope is below 0.05",
        unit="1",
        site="block",
        source="definition",
        reading="half is normal for ReLU; near 1 little gradient passes the activations",
    ),
    Metric(
        id="dead_fraction",
        label="dead fraction",
        formula="share of the block's activation channels saturated for every sample and position",
        unit="1",
        site="block",
        source="definition",
        reading="channels that pass no gradient on the samples looked at",
    ),
    Metric(
        id="update_ratio",
        label="update to weight ratio",
        formula="||theta_after - theta_before||_2 / ||theta_before||_2",
        unit="1",
        site="block",
        source="You et al. 2017, arXiv:1708.03888 (trust ratio)",
        reading="about 1e-3 is usual; above 0.1 a step replaces the weights",
    ),
]

_RUN = [
    Metric(
        id="loss",
        label="loss",
        formula="mean cross-entropy of the batch",
        unit="nat",
        site="run",
        source="definition",
        reading="ln K is guessing",
    ),
    Metric(
        id="grad_norm",
        label="gradient norm of all parameters",
        formula="||dL/dtheta||_2 over the network",
        unit="loss/parameter",
        site="run",
        source=_SHAH + "3.2.1 ('the gradients blew up')",
        reading="against depth on a log axis: the level tells an exploding family",
    ),
    Metric(
        id="lr_grad_norm",
        label="learning rate times gradient norm",
        formula="lr ||dL/dtheta||_2",
        unit="loss",
        site="run",
        source="observed on a and b with He initialisation, see the theory page",
        reading="0.6 and more: no such run has survived",
        derive=lambda f: f["lr"] * f["grad_norm"],
    ),
    Metric(
        id="head_mean",
        label="mean of the pooled features",
        formula="mean_c of the batch mean of the classifier's input",
        unit="activation",
        site="run",
        source=_CLEVERT,
        reading="B1 at the head",
    ),
    Metric(
        id="head_bias",
        label="bias shift of the pooled features",
        formula="sqrt(mean_c mu_c^2 / mean_c sigma_c^2) of the classifier's input",
        unit="1",
        site="run",
        source=_CLEVERT,
        reading="B2 at the head",
    ),
    Metric(
        id="head_kick",
        label="head kick",
        formula="lr (1 + momentum) (||E_n hbar||^2 + 1) max_k |p_k - y_k|",
        unit="logit",
        site="run",
        source="first-order effect of one Nesterov step of a cross-entropy on the classifier",
        reading="B3; how far the first step moves a mean logit; grows with the head's mean",
    ),
    Metric(
        id="head_loss",
        label="cross-entropy at the last linear layer",
        formula="mean over rows of -log p_k; the label k is where dL/dlogits is least",
        unit="nat",
        site="run",
        source="dL/dlogits = (p - y) / N",
        reading="the loss, also where nobody told it; negative where the loop maximises it; NaN if "
        "the gradient is no cross-entropy's",
    ),
    Metric(
        id="label_share",
        label="share of the most frequent label in the batch",
        formula="max_k of the share of rows with label k",
        unit="1",
        site="run",
        source="definition",
        reading="1 in every batch: the labels are constant",
    ),
    Metric(
        id="data_mean",
        label="mean of the model's input",
        formula="mean of the model's first floating-point input",
        unit="input",
        site="run",
        source="LeCun et al. 1998, Efficient BackProp, section 4.3",
        reading="far from 0 in units of the standard deviation: not normalised",
    ),
    Metric(
        id="data_std",
        label="standard deviation of the model's input",
        formula="standard deviation of the model's first floating-point input",
        unit="input",
        site="run",
        source="LeCun et al. 1998, Efficient BackProp, section 4.3",
        reading="about 1 where the input is normalised; 0 if it is constant",
    ),
    Metric(
        id="data_nonfinite",
        label="non-finite fraction of the model's input",
        formula="share of NaN and infinite elements of the model's first floating-point input",
        unit="1",
        site="run",
        source="definition",
        reading="above 0 the data are broken",
    ),
    Metric(
        id="momentum",
        label="momentum",
        formula="of the optimizer's first group; 0 where it has no such setting",
        unit="1",
        site="run",
        source="definition",
        reading="the step is 1 / (1 - momentum) times as large in the long run",
    ),
    Metric(
        id="weight_decay",
        label="weight decay",
        formula="the largest of the optimizer's groups",
        unit="1",
        site="run",
        source="definition",
        reading="times the learning rate: the share of the weights that a step takes away",
    ),
]

METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.id: metric
        for metric in [
            *_GRADIENT,
            *(metric for site in SITES for metric in _site_metrics(site)),
            *_SKIP,
            *_HEALTH,
            *_RUN,
        ]
    }
)
"""Every metric by id, in the order in which frames show them."""

RECORDED = tuple(m.id for m in METRICS.values() if m.derive is None and m.site != "run")
"""Columns of a run's metrics files, one value per step and block."""

CORE = tuple(
    name
    for name in RECORDED
    if name.startswith(("branch_", "shortcut_mean", "shortcut_channel", "output_"))
    or name in ("shortcut_nonfinite", "grad_param", "grad_output", "grad_nonfinite")
    or name in ("elasticity", "perturbation")
)
"""The columns of `attach(metrics="core")`: gradient norms by parameter and by output, moments of
branch, shortcut and output, branch over shortcut, and P1. The others are NaN."""

RECORDED_PER_STEP = (
    *("lr", "grad_norm", "head_mean", "head_bias", "head_kick", "head_loss", "label_share"),
    *("data_mean", "data_std", "data_nonfinite", "momentum", "weight_decay"),
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
