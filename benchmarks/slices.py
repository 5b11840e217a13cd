"""How far the numbers of a slice of the batch are from those of the whole: `moment_samples`.

Of the same weights and batch, at initialisation and after some steps, on the embedded digits: the
difference of each number from that of all samples, over blocks, batches and networks. What is made
of means is compared with the output's standard deviation, as many means are near zero; the others
with themselves.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from resdiag.data.augment import Augmenter
from resdiag.data.dataset import open_data
from resdiag.models.resnet import build_model
from resdiag.watch.loop.attach import attach

COUNTS = (4, 8, 16, 32, 64)
VARIANTS, DEPTH, BATCH = ("original", "elu"), 20, 128
METRICS = (
    "output_mean", "output_channel_mean_rms", "output_channel_std", "branch_ratio", "grad_output",
)  # fmt: skip


def measure(batches: int = 6, steps: int = 20) -> dict[str, Any]:
    """Rows of {"samples", "metric", "median", "q95"}, and what they were measured on."""
    stream = iter(_batches())
    errors: dict[tuple[int, str], list[float]] = defaultdict(list)
    for variant in VARIANTS:
        model = build_model(variant, DEPTH, seed=0)
        for begun in (0, steps):
            _train(model, stream, begun)
            for _ in range(batches):
                for key, values in errors_of(model, *next(stream)).items():
                    errors[key].extend(values)
    rows = [
        {
            "samples": samples,
            "metric": metric,
            "median": float(np.median(values)),
            "q95": float(np.quantile(values, 0.95)),
            "n": len(values),
        }
        for (samples, metric), values in errors.items()
    ]
    return {"rows": rows, "batch_size": BATCH, "depth": DEPTH, "variants": list(VARIANTS)}


def _batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches without end."""
    batches = Augmenter(open_data("digits"), BATCH, 0, True, channels_last=False)
    number = 0
    while True:
        yield batches.batch(number)
        number += 1


def _train(
    model: torch.nn.Module, stream: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        images, labels = next(stream)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def errors_of(
    model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> dict[tuple[int, str], list[float]]:
    """The distances of one batch's slices from the whole."""
    frames = {k: _record(model, images, labels, k) for k in (None, *COUNTS)}
    whole = frames.pop(None)
    found = {}
    for samples, frame in frames.items():
        assert samples is not None
        for metric in METRICS:
            scale = whole["output_channel_std" if "_mean" in metric else metric]
            distance = (frame[metric] - whole[metric]).abs() / scale.abs()
            found[samples, metric] = distance.tolist()
    return found


def _record(
    model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, samples: int | None
) -> Any:  # noqa: ANN401
    """One recorded pass of a copy of the model."""
    twin = copy.deepcopy(model)
    with attach(twin, metrics="core", moment_samples=samples) as monitor:
        F.cross_entropy(twin(images), labels).backward()
        monitor.step()
    return monitor.to_frame()
