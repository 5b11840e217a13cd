"""Metrics outside the full set: attention, experts, the optimizer, extremes; and the sets.

They cost more than the others, or most networks lack what they are about. Each set is recorded at a
cadence of its own, and its columns are in a record only where something was measured.
"""

from collections.abc import Mapping

from resdiag.catalog.site_metrics import Metric
from resdiag.errors import unknown

SETS = ("full", "core", "attention", "experts", "optimizer", "extremes")
"""Sets of recorded columns, the first two for every recorded step: everything about the blocks, or
what costs next to nothing of it."""

BASES = SETS[:2]

USUAL = {"full": 1, "attention": 50, "experts": 50}
"""What `attach` records unless told otherwise: sets, and every how many steps."""

EXTREME_SITES = ("branch", "shortcut", "output")
"""Where extremes are looked for: what is added, and what goes on."""

_ZHAI = "Zhai et al. 2023, arXiv:2303.06296"
_DEHGHANI = "Dehghani et al. 2023, arXiv:2302.05442, section 2 (QK normalisation)"
_XIAO = "Xiao et al. 2023, arXiv:2309.17453 (attention sinks)"
_FEDUS = "Fedus et al. 2021, arXiv:2101.03961, section 2.2"
_ZOPH = "Zoph et al. 2022, arXiv:2202.08906 (router z-loss)"
_PALM = "Chowdhery et al. 2022, arXiv:2204.02311, section 5 (z-loss)"
_ADAM = "Kingma & Ba 2014, arXiv:1412.6980"
_DETTMERS = "Dettmers et al. 2022, arXiv:2208.07339 (outlier features)"
_HE2024 = "He et al. 2024, arXiv:2405.19279, section 2"

# fmt: off
ATTENTION = [
    Metric("attention_logit", "largest attention logit",
        "max over heads, queries and visible keys of the scaled q.k, biases and masks added",
        "nat", "block", _DEHGHANI,
        "what softmax sees; growing into the hundreds, attention becomes one-hot and trains no "
        "more"),
    Metric("attention_logit_head", "head with the largest attention logit",
        "argmax over heads of the largest logit", "index", "block", "definition",
        "heads of several attentions of one block are counted on"),
    Metric("attention_entropy", "entropy of attention",
        "mean over heads and queries of -sum_k p_k ln p_k", "nat", "block", _ZHAI,
        "0: every query looks at one key"),
    Metric("attention_entropy_share", "entropy of attention over that of uniform weights",
        "mean over heads and queries of -sum_k p_k ln p_k / ln T, T the number of visible keys",
        "1", "block", _ZHAI, "0: every query looks at one key; 1: at all keys alike"),
    Metric("attention_entropy_least", "lowest entropy of a head over that of uniform weights",
        "min over heads of the mean over queries of -sum_k p_k ln p_k / ln T", "1", "block", _ZHAI,
        "near 0: this head has collapsed; single heads of healthy models do so, too"),
    Metric("attention_entropy_head", "head with the lowest entropy",
        "argmin over heads of the mean of -sum_k p_k ln p_k / ln T", "index", "block",
        "definition", "heads of several attentions of one block are counted on"),
    Metric("attention_first", "attention on the first key",
        "mean over heads and queries of p_0", "1", "block", _XIAO,
        "near 1: the first token is a sink, and the others are hardly read"),
]

EXPERTS = [
    Metric("expert_load", "largest share of an expert",
        "max over experts e of n_e / sum_e n_e, n_e the tokens that the router sends to e", "1",
        "block", _FEDUS, "1 / E is balanced, 1 / k the most that top-k routing can do"),
    Metric("expert_busiest", "busiest expert", "argmax over experts e of n_e", "index",
        "block", "definition", "the expert that the router collapses on"),
    Metric("expert_entropy", "evenness of the load",
        "(-sum_e f_e ln f_e - ln k) / (ln E - ln k), f_e = n_e / sum_e n_e, of top-k routing", "1",
        "block", _FEDUS, "1: balanced; 0: the router sends every token to the same k experts"),
    Metric("expert_dead", "share of experts without a token",
        "share of experts with n_e = 0 in this pass", "1", "block", _FEDUS,
        "parameters that are not used and not trained"),
    Metric("expert_tokens", "tokens per expert", "sum_e n_e / E", "tokens", "block", "definition",
        "how many tokens an expert would get if all got as many"),
    Metric("router_logit_z", "log-sum-exp of the router's logits",
        "sqrt(mean_n (ln sum_e exp z_ne)^2)", "nat", "block", _ZOPH,
        "the root of the router's z-loss; growing: rounding decides between experts"),
]

OPTIMIZER = [
    Metric("moment_first", "RMS of the first moment",
        "sqrt(mean m^2) over the block's parameters after the step; SGD: the momentum buffer",
        "loss/parameter", "block", _ADAM, "what the optimizer takes for the gradient"),
    Metric("moment_second", "root of the mean second moment",
        "sqrt(mean v) over the block's parameters after the step, v as it is stored",
        "loss/parameter", "block", _ADAM, "what Adam takes for the gradient's size"),
    Metric("moment_mismatch", "gradient over the second moment's root",
        "sqrt(mean g^2 / max(v / (1 - beta2^t), eps^2)) over the block's parameters", "1", "block",
        "Wortsman et al. 2023, arXiv:2304.13013, section 3.4 (RMS_t)",
        "about 1; above 2.3 the second moment is out of date, and a spike of the loss may follow"),
    Metric("update_size", "RMS of the update", "RMS of theta_after - theta_before", "parameter",
        "block", _ADAM, "about the learning rate for Adam"),
]

EXTREMES = [
    metric
    for site in EXTREME_SITES
    for metric in (
        Metric(f"{site}_largest", f"largest magnitude of the {site}", f"max |x| over the {site}",
            "activation", site, _DETTMERS, "beside the RMS: how far single numbers stick out"),
        Metric(f"{site}_kurtosis", f"kurtosis over channels of the {site}",
            f"mean_c s_c^4 / (mean_c s_c^2)^2, s_c the RMS of channel c of the {site}", "1", site,
            _HE2024, "1: all channels alike; the number of channels: one has everything"),
        Metric(f"{site}_outliers", f"outlier channels of the {site}",
            f"number of channels with s_c > 6 median_c s_c of the {site}", "channels", site,
            _DETTMERS, "channels that low precision cannot hold together with the others"),
    )
]
HEAD = [
    Metric("head_logit", "largest logit of the head",
        "max |z| over the first rows of the last linear layer's output", "nat", "run", _PALM,
        "growing without bound: the head runs away"),
    Metric("head_z", "log-sum-exp of the head's logits",
        "sqrt(mean_n (ln sum_k exp z_nk)^2) over the first rows", "nat", "run", _PALM,
        "the root of the z-loss; ln K where the logits are small"),
]
# fmt: on

ON_CADENCE: Mapping[str, tuple[Metric, ...]] = {
    "attention": tuple(ATTENTION),
    "experts": tuple(EXPERTS),
    "optimizer": tuple(OPTIMIZER),
    "extremes": (*EXTREMES, *HEAD),
}
"""The metrics of each set that has a cadence of its own."""


OF_BLOCKS = tuple(m.id for group in ON_CADENCE.values() for m in group if m.site != "run")
"""Their columns by step and block,"""
OF_STEPS = tuple(m.id for group in ON_CADENCE.values() for m in group if m.site == "run")
"""and by step."""


def columns_of(name: str) -> tuple[str, ...]:
    """The columns of a set with a cadence of its own."""
    return tuple(metric.id for metric in ON_CADENCE[name])


def cadences(metrics: str | Mapping[str, int]) -> dict[str, int]:
    """Every how many steps each set is recorded, one of `BASES` first.

    Args:
        metrics: "full" for `USUAL`, "core" for that set alone, or sets with their cadences; without
            one of `BASES` among them, "full" is added.

    Raises:
        ValueError: An unknown set, both bases, or a cadence that is no whole number from 1 on, or
            of a base not 1.

    >>> cadences({"core": 1, "attention": 10})
    {'core': 1, 'attention': 10}
    """
    if isinstance(metrics, str):
        if metrics not in BASES:
            raise ValueError(unknown("set of metrics", metrics, BASES).message)
        return dict(USUAL) if metrics == "full" else {metrics: 1}
    for name, every in metrics.items():
        if name not in SETS:
            raise ValueError(unknown("set of metrics", str(name), SETS).message)
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"metrics={{'{name}': {every!r}}} must be a whole number from 1 on")
        if name in BASES and every != 1:
            raise ValueError(
                f"metrics={{'{name}': {every}}} must be 1: attach(..., every={every}) records "
                "every so many steps"
            )
    bases = [name for name in BASES if name in metrics]
    if len(bases) > 1:
        raise ValueError("metrics has both 'full' and 'core', and 'full' contains 'core'")
    base = bases[0] if bases else "full"
    return {base: 1, **{name: every for name, every in metrics.items() if name != base}}
