"""The forecast: what will happen to a variant at this learning rate, before any training."""

import copy
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from resdiag.data.augment import Augmenter
from resdiag.data.dataset import ImageData, open_data
from resdiag.diagnose.finding import plain
from resdiag.diagnose.rundata import RunData
from resdiag.errors import UsageError
from resdiag.models.resnet import ResNet, build_model
from resdiag.models.variants import find_variant
from resdiag.probe.critical_rate import RISE, critical_rate, largest_curvature
from resdiag.runs.watched import as_run
from resdiag.runs.watched_config import WatchedConfig
from resdiag.theory.prediction import CRITICAL, critical_lr, gradient_norm, predict
from resdiag.training.recipe import Request
from resdiag.watch.loop.attach import attach

_PRODUCTS = 6


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Theory beside the measurement on one batch; NaN where there is none.

    Attributes:
        theory: From the law of the variant, which continues from the measured stem.
        measured: On one batch; the geometric mean over seeds.
        note: How it is defined, and why a number is missing.
        seeds: What was measured at each seed.
    """

    theory: float
    measured: float
    note: str
    seeds: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What was forecast for one variant.

    Attributes:
        growth_per_block: E[H^2], geometric mean over the blocks.
        gradient_ratio: ||g_0|| / ||g_L||, first block's input over last block's output.
        critical_lr: The learning rate that separates survival from death in the first steps.
        fate: "dies", "at_risk", "survives", or "non_finite" if there is no finite gradient.
        why: One sentence on the fate.
        basis: The law and its source.
    """

    growth_per_block: Pair
    gradient_ratio: Pair
    critical_lr: Pair
    fate: str
    why: str
    basis: str

    def to_dict(self) -> dict[str, Any]:
        """The document of `resdiag predict --json`; a missing number is null."""
        pairs = {
            name: {"theory": pair.theory, "measured": pair.measured, "seeds": list(pair.seeds)}
            for name, pair in self.pairs().items()
        }
        document = plain({**pairs, "fate": self.fate})
        assert isinstance(document, dict)
        return document

    def pairs(self) -> dict[str, Pair]:
        """The three quantities by name."""
        names = ("growth_per_block", "gradient_ratio", "critical_lr")
        return {name: getattr(self, name) for name in names}


def forecast(
    variant: str,
    depth: int,
    *,
    lr: float = 0.1,
    data: str = "auto",
    data_root: Path | None = None,
    batch_size: int = 64,
    seed: int = 0,
    seeds: int = 1,
    width: float = 1.0,
    stem_bn: bool = False,
    branch_scale: float = 1.0,
) -> Forecast:
    """Forecast a training from theory and from one forward and backward pass per seed.

    The batch is the first one of `resdiag run` with the same seed, and so are the weights. The
    critical rate of one network scatters by a factor of 3 and more over seeds: several of them say
    how far.

    Args:
        variant: Id or letter of a variant.
        depth: 6n+2.
        lr: Learning rate of the first step.
        data: Images, as of `resdiag run --data`.
        data_root: Folder of downloaded data sets.
        batch_size: Images of the batch.
        seed: Of weights and batch; the first one of several.
        seeds: How many.
        width: Multiple of the 16/32/64 channels.
        stem_bn: BatchNorm in the stem.
        branch_scale: Factor on the last weights of each branch.

    Raises:
        UsageError: Unknown variant or data, a depth other than 6n+2, a batch below 2 or a learning
            rate that is not positive.
    """
    if not 0 < lr < math.inf:
        raise UsageError(f"--lr {lr} must be positive")
    first = Request(
        variant=find_variant(variant).id, depth=depth, lr=lr, data=data, batch_size=batch_size,
        seed=seed, width=width, stem_bn=stem_bn, branch_scale=branch_scale,
    )  # fmt: skip
    first.check()
    found = open_data(data, data_root)
    each = [
        _forecast_once(replace(first, seed=seed + number), batch_size, lr, found)
        for number in range(seeds)
    ]
    return each[0] if seeds == 1 else _join(each, lr)


def _forecast_once(asked: Request, batch_size: int, lr: float, data: ImageData) -> Forecast:
    """The forecast of one network on its first batch."""
    images, labels = Augmenter(data, batch_size, asked.seed, augment=True).batch(0)
    classes, normed = len(data.classes), find_variant(asked.variant).norm
    model = build_model(
        asked.variant, asked.depth, width=asked.width, num_classes=classes,
        stem_bn=asked.stem_bn, branch_scale=asked.branch_scale, seed=asked.seed,
    )  # fmt: skip
    seen = _measure(model, images, labels, asked.variant, asked.depth)
    theory = predict(
        asked.variant, asked.depth, width=asked.width, branch_scale=asked.branch_scale,
        s0=seen.value("input_second_moment", 0, 0), m0=seen.value("input_mean", 0, 0),
        width_px=images.shape[-1], variances=stem_variances(model, images),
    )  # fmt: skip
    # the law of the gradient's size is that of the full width
    full = asked.width == 1
    predicted = gradient_norm(theory, images.shape[-1], classes) if full else None
    critical = _critical(model, images, labels, normed, predicted)
    fate, why = _fate(normed, lr, seen.scalar("grad_norm", 0), critical.measured)
    return Forecast(
        growth_per_block=Pair(
            theory=theory.growth_per_block, measured=seen.growth_per_block(0),
            note="factor of E[H^2]",
        ),
        gradient_ratio=Pair(
            theory=theory.gradient_ratio, measured=seen.gradient_ratio(0),
            note="||g_0|| / ||g_L||",
        ),
        critical_lr=critical, fate=fate, why=why, basis=theory.basis,
    )  # fmt: skip


def _join(each: Sequence[Forecast], lr: float) -> Forecast:
    """The forecast over seeds: firm where all of them agree."""
    fates = Counter(one.fate for one in each)
    fate = each[0].fate if len(fates) == 1 else "at_risk"
    rates = [one.critical_lr.measured for one in each]
    words = ", ".join(f"{name} {amount}" for name, amount in fates.most_common())
    why = f"over {len(each)} seeds: {words}; lr {lr:g} against a critical_lr of "
    why += f"{min(rates):.3g} to {max(rates):.3g}."
    pairs = {name: _mean([one.pairs()[name] for one in each]) for name in each[0].pairs()}
    return Forecast(**pairs, fate=fate, why=why, basis=each[0].basis)


def _mean(pairs: Sequence[Pair]) -> Pair:
    """Geometric means over seeds; the note of the first."""
    measured = tuple(pair.measured for pair in pairs)
    return Pair(
        theory=_geometric(pair.theory for pair in pairs), measured=_geometric(measured),
        note=pairs[0].note, seeds=measured,
    )  # fmt: skip


def _geometric(values: Iterable[float]) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.exp(np.mean(np.log(list(values)))))


def _measure(
    model: ResNet, images: torch.Tensor, labels: torch.Tensor, variant: str, depth: int
) -> RunData:
    names = None if find_variant(variant).shortcut else model.unit_names
    with attach(model, blocks=names) as monitor:
        loss = F.cross_entropy(model(images), labels)
        torch.autograd.backward(loss)
        monitor.step()
    config = WatchedConfig(model=variant, kind="probe", variant=variant, depth=depth, steps=1)
    run = as_run(monitor, config=config, curve={"loss": [float(loss.detach())]})
    model.zero_grad()
    return RunData(run)


@torch.no_grad()
def stem_variances(model: ResNet, images: torch.Tensor) -> list[float]:
    """Variance of each of the stem's channels, over batch and positions; the model unchanged."""
    stem = copy.deepcopy(model.stem)  # a pass moves the running statistics of its BatchNorm
    variances: list[float] = stem(images).double().var((0, 2, 3), unbiased=False).tolist()
    return variances


def _critical(
    model: ResNet, images: torch.Tensor, labels: torch.Tensor, normed: bool,
    predicted: float | None,
) -> Pair:  # fmt: skip
    """Without normalisation by trying the first step, with it 2 / lambda_max."""
    if not normed:
        words = (
            f"measured: rate at which the first step multiplies the loss of its batch by {RISE}; "
            f"theory: {CRITICAL} / ||g_0||; both constants were observed on a and b, not derived"
        )
        if predicted is None:
            words += "; no law predicts the parameter gradients of this network"
        theory = math.nan if predicted is None else critical_lr(predicted)
        return Pair(theory=theory, measured=critical_rate(model, images, labels), note=words)
    curve = largest_curvature(
        F.cross_entropy(model(images), labels), list(model.parameters()), steps=_PRODUCTS
    )
    words = (
        "2 / lambda_max on this batch, plain SGD; networks with BatchNorm often survive larger "
        "rates. No prediction: with BatchNorm, the curvature depends on the data"
    )
    return Pair(theory=math.nan, measured=curve.critical_lr, note=curve.reason or words)


def _fate(normed: bool, lr: float, norm: float, critical: float) -> tuple[str, str]:
    """What the first steps at this learning rate do."""
    if not math.isfinite(norm):
        return "non_finite", "loss or gradient is not finite before the first step."
    if normed:
        words = f"lr x ||g_0|| = {lr * norm:.3g}"
        if lr * norm <= CRITICAL:
            return "survives", f"{words}, at most {CRITICAL}."
        return "at_risk", f"{words}, above {CRITICAL}; networks with BatchNorm usually survive."
    words = f"lr is {lr / critical:.3g} times the measured critical_lr"
    if lr <= critical / 2:
        return "survives", f"{words}; up to 0.5 times it, all runs of a and b survived the start."
    if lr < 2 * critical:
        return "at_risk", f"{words}; between 0.5 and 2 times it, some runs of a and b survived."
    return "dies", f"{words}; from 2 times it on, all runs of a and b diverged."
