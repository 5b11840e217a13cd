"""What an entry of the catalogue is, and the entries that every site has: its moments."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


Column: TypeAlias = "NDArray[np.float64]"
Columns: TypeAlias = "Mapping[str, NDArray[np.float64]]"

BROCK = "Brock et al. 2021, arXiv:2101.08692, signal propagation plots"
CLEVERT = "Clevert et al. 2015, arXiv:1511.07289, section 2 (bias shift)"


@dataclass(frozen=True)
class Metric:
    """One entry of the catalogue.

    Attributes:
        id: Column name in frames and Parquet files.
        label: Words for an axis.
        formula: Definition in the symbols of `catalog`.
        unit: "1" for ratios, else that of the quantity it scales with.
        site: Where it is taken; "block" for the whole unit, "run" for one value per step.
        source: Paper and place.
        reading: One sentence: what a high or low value means.
        over_ranks: How the ranks' values make the one of all: "mean", "rms" (weighted by what each
            is a mean over), "gradient" (norms of each rank's mean loss), "norm" (of parts); the
            last word "shards" where all ranks have the whole value unless parameters are sharded.
            "" if it is made from other sums, as moments are from channel means.
        derive: For derived metrics, the function of a frame's columns; None if recorded.
    """

    id: str
    label: str
    formula: str
    unit: str
    site: str
    source: str
    reading: str
    over_ranks: str = ""
    derive: Callable[[Columns], Column] | None = None


def site_metrics(site: str) -> list[Metric]:
    """The moments of one site: recorded in a form that cannot overflow, then derived."""
    mean, std = f"{site}_channel_mean_rms", f"{site}_channel_std"
    # fmt: off
    quantiles = [
        Metric(f"{site}_mean_q{q}", f"{q} % quantile of the {site}'s channel means",
            f"quantile_{q / 100:g} over c of mu_c", "activation", site, CLEVERT + ", Fig. 1",
            "a wide spread around 0 is bias shift that the signed mean hides")
        for q in (10, 50, 90)
    ]
    return [
        Metric(f"{site}_mean", f"mean of the {site}", "mean_c mu_c", "activation", site, CLEVERT,
            "B1; 0 is centred; after a BatchNorm it is the learned bias"),
        Metric(f"{site}_channel_mean_rms", f"RMS over channels of the {site}'s channel means",
            "sqrt(mean_c mu_c^2)", "activation", site, BROCK,
            "the part of the signal that is the same for every sample"),
        Metric(f"{site}_channel_std",
            f"RMS over channels of the {site}'s channel standard deviations",
            "sqrt(mean_c sigma_c^2)", "activation", site, BROCK,
            "the part of the signal that differs between samples and positions"),
        *quantiles,
        Metric(f"{site}_nonfinite", f"non-finite fraction of the {site}",
            "share of NaN and infinite elements", "1", site, "definition",
            "above 0: the forward pass has produced NaN or infinity"),
        Metric(f"{site}_bias", f"bias shift of the {site}",
            "sqrt(mean_c mu_c^2 / mean_c sigma_c^2)", "1", site, CLEVERT,
            "B2; 0 is centred, above 1 the mean is larger than the signal",
            derive=lambda f: f[mean] / f[std]),
        Metric(f"{site}_second_moment", f"second moment of the {site}",
            "E[x^2] = mean_c mu_c^2 + mean_c sigma_c^2", "activation^2", site,
            "De & Smith 2020, arXiv:2002.10444; Hanin & Rolnick 2018, arXiv:1803.01719",
            "straight and rising on a log axis is exponential growth with depth",
            derive=lambda f: f[mean] ** 2 + f[std] ** 2),
        Metric(f"{site}_channel_mean_sq", f"average channel squared mean of the {site}",
            "mean_c mu_c^2", "activation^2", site, BROCK,
            "above the average channel variance, means dominate the signal",
            derive=lambda f: f[mean] ** 2),
        Metric(f"{site}_channel_var", f"average channel variance of the {site}", "mean_c sigma_c^2",
            "activation^2", site, BROCK,
            "grows by the branch's variance per block; resets at a transition",
            derive=lambda f: f[std] ** 2),
    ]
    # fmt: on
