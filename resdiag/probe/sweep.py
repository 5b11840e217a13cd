"""The sweep: a model at several depths or widths, and by which law its signal follows them."""

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resdiag.diagnose.finding import plain
from resdiag.errors import UsageError
from resdiag.models.source import Built, build_source
from resdiag.probe.batch import Batch, main_output, open_batch
from resdiag.runs.watched import load_run
from resdiag.theory.scaling import Trend, fit_trend
from resdiag.watch.base.safety import WatchWarning
from resdiag.watch.loop.attach import attach

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS, RATE = 3, 1e-3
"""Steps of Adam, and their learning rate, by which the change of the output is measured."""

MEASURES: Mapping[str, str] = {
    "signal": "RMS of the last block's output over that of the first block's input",
    "gradient": "gradient norm at the first block's output over that at the last block's",
    "output": "RMS of the model's output at initialisation",
    "change": f"RMS of the change of the output by {STEPS} steps of Adam at rate {RATE:g}",
}
"""What is measured at each size, and what it is."""

BY_DEPTH, BY_WIDTH = ("signal", "gradient", "change"), ("output", "change")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model of a sweep.

    Attributes:
        value: Of the argument that is swept.
        seed: Of weights and batch.
        blocks: Residual blocks that were found.
        numbers: By the name of the measure; NaN where there is none.
    """

    value: float
    seed: int
    blocks: int
    numbers: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep found.

    Attributes:
        model: Name of the model.
        argument: What was swept.
        is_depth: Whether the number of blocks changes with it; else it is taken for a width.
        points: A model per value and seed.
        trends: The law of each measure, by the number of blocks or by the value.
    """

    model: str
    argument: str
    is_depth: bool
    points: Sequence[Point]
    trends: Mapping[str, Trend]

    def size(self, point: Point) -> float:
        """What a measure is held against: the number of blocks, or the value."""
        return point.blocks if self.is_depth else point.value

    def findings(self) -> list[str]:
        """One sentence per measure: its law, and what undoes it."""
        return [_sentence(name, trend, self) for name, trend in self.trends.items()]

    def draw(self) -> "Figure":
        """Each measure against depth or width, with its law."""
        from resdiag.plots.sweep import draw_sweep

        return draw_sweep(
            {name: [(self.size(p), p.numbers[name]) for p in self.points] for name in self.trends},
            self.trends,
            titles=[words.partition(":")[0].rstrip(".") for words in self.findings()],
            about=[MEASURES[name] for name in self.trends],
            xlabel="number of blocks" if self.is_depth else self.argument,
            title=f"{self.model} at {len({p.value for p in self.points})} values of "
            f"{self.argument}, {len({p.seed for p in self.points})} seeds",
        )

    def to_dict(self) -> dict[str, Any]:
        """The document of `resdiag probe --sweep --json`, see `plain`."""
        document = {
            "schema": 1,
            "model": self.model,
            "argument": self.argument,
            "by": "depth" if self.is_depth else "width",
            "points": [
                {"value": p.value, "seed": p.seed, "blocks": p.blocks, **p.numbers}
                for p in self.points
            ],
            "trends": {
                name: {"kind": t.kind, "reason": t.reason, "exponent": t.slope}
                | {"low": t.low, "high": t.high}
                for name, t in self.trends.items()
            },
            "findings": self.findings(),
        }
        plainly = plain(document)
        assert isinstance(plainly, dict)
        return plainly


def sweep_model(
    name: str,
    argument: str,
    values: Sequence[float],
    *,
    arguments: Mapping[str, Any] | None = None,
    seeds: int = 2,
    batch_size: int = 8,
    shape: Sequence[int] | None = None,
    data: str = "",
    data_root: Path | None = None,
    loss: str = "auto",
    tell: Callable[[float, int], None] = lambda value, seed: None,
) -> Sweep:
    """Measure a model at several values of one argument of its factory.

    Each model is built, run forward and backward once, and trained for three steps on the same
    batch; all start from the same seeds.

    Args:
        name: See `resdiag.models.source`.
        argument: Of its factory or configuration, such as "depth", "n_layer" or "width".
        values: Two or more different ones.
        arguments: The others.
        seeds: Weights and batches per value.
        batch_size: Samples.
        shape: Of one sample of the generated batch.
        data: As for `probe_model`.
        data_root: Folder of downloaded data sets.
        loss: One of `resdiag.probe.batch.LOSSES`.
        tell: Told value and seed before each model is built.

    Raises:
        UsageError: Fewer than two values, or a model that cannot be built or run.
    """
    if len(set(values)) < 2:
        raise UsageError(f"--sweep {argument} needs two different values or more", "n_layer=2,4,8")
    points = []
    for value in values:
        for seed in range(seeds):
            tell(value, seed)
            built = build_source(name, {**(arguments or {}), argument: value}, seed=seed)
            batch = open_batch(built, data, data_root, batch_size, shape, seed)
            points.append(_measure(built, batch, loss, value, seed))
    is_depth = len({point.blocks for point in points}) > 1
    trends = {}
    for measure in BY_DEPTH if is_depth else BY_WIDTH:
        sizes = [float(p.blocks if is_depth else p.value) for p in points]
        numbers = [p.numbers[measure] for p in points]
        trends[measure] = fit_trend(sizes, numbers, exponential=is_depth)
    return Sweep(
        model=name, argument=argument, is_depth=is_depth, points=tuple(points), trends=trends
    )


def _measure(built: Built, batch: Batch, loss: str, value: float, seed: int) -> Point:
    """One forward and backward pass under a monitor, then three steps of Adam."""
    model = built.model
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", WatchWarning)
        with attach(model) as monitor:
            torch.manual_seed(seed)
            batch.loss(model, loss, seed).value.backward()
            monitor.step()
            run = load_run(monitor)
        before = _output(model, batch, seed)
        torch.manual_seed(seed)
        _train(model, batch, loss, seed)
        after = _output(model, batch, seed)
    frame = run.metrics()
    numbers = {"output": _rms(before), "change": _rms(after - before)}
    if len(frame) and {"output_second_moment", "input_second_moment"} <= {*frame}:
        moments = frame["output_second_moment"].iloc[-1] / frame["input_second_moment"].iloc[0]
        numbers["signal"] = math.sqrt(moments) if moments > 0 else math.nan
        numbers["gradient"] = float(frame["grad_output"].iloc[0] / frame["grad_output"].iloc[-1])
    return Point(
        value=value, seed=seed, blocks=len(run.blocks),
        numbers={measure: numbers.get(measure, math.nan) for measure in MEASURES},
    )  # fmt: skip


def _train(model: nn.Module, batch: Batch, loss: str, seed: int) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        batch.loss(model, loss, seed).value.backward()
        optimizer.step()


@torch.no_grad()
def _output(model: nn.Module, batch: Batch, seed: int) -> Tensor:
    """The model's output in training mode, without moving its running statistics."""
    buffers = copy.deepcopy(dict(model.named_buffers()))
    torch.manual_seed(seed)  # the same dropout before and after
    found = main_output(model(*batch.example.args, **batch.example.kwargs))
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    if found is None:
        raise UsageError("the model returned no floating-point tensor")
    return found.float().clone()


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


# -- words -----------------------------------------------------------------------------------------

_NOUNS = {
    "signal": "The signal",
    "gradient": "The gradient on its way back",
    "output": "The output at initialisation",
    "change": "The change of the output by the first steps",
}
_NORMALISE = "normalise the branches, or start them at 0 (SkipInit, Fixup)"
_REMEDIES = {
    ("signal", "exponential"): _NORMALISE,
    ("signal", "power"): "scale each branch by 1/sqrt(number of blocks)",
    ("gradient", "exponential"): _NORMALISE,
    ("change by depth", "exponential"): _NORMALISE,
    ("change by depth", "power"): "scale the branches, or lower the learning rate with the depth",
    ("change by width", "power"): "lower the learning rate as 1/width (muP)",
    ("output by width", "power"): "scale the last layer's initial weights by 1/width (muP)",
}
"""What undoes a growth, by the measure and its law."""
_NOTABLE = 0.3
"""Exponent from which a remedy is named: 2.3 times over a factor of 16 in size."""


def _sentence(name: str, trend: Trend, sweep: Sweep) -> str:
    noun, by = _NOUNS[name], "depth" if sweep.is_depth else sweep.argument
    if trend.kind == "unknown":
        return f"{noun}: no law, {trend.reason}."
    if trend.kind == "flat":
        return f"{noun} does not depend on {by}."
    verb = "grows" if trend.slope > 0 else "falls"
    if trend.kind == "exponential":
        law = f"{math.exp(trend.slope):.3g} times per block{_interval(trend, math.exp)}"
    else:
        law = f"with {by} to the power {trend.slope:.2f}{_interval(trend, float)}"
    way = "depth" if sweep.is_depth else "width"
    remedy = _REMEDIES.get((name, trend.kind)) or _REMEDIES.get((f"{name} by {way}", trend.kind))
    needed = trend.slope > (0 if trend.kind == "exponential" else _NOTABLE)
    return f"{noun} {verb} {law}{f': {remedy}' if remedy and needed else ''}."


def _interval(trend: Trend, scale: Callable[[float], float]) -> str:
    if math.isnan(trend.low):
        return ""
    return f" [{scale(trend.low):.3g}, {scale(trend.high):.3g}]"
