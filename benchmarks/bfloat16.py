"""What bfloat16 autocast does to the recorded numbers: the same weights and batch in both.

    python benchmarks/bfloat16.py
    python benchmarks/bfloat16.py --variants original,elu,elu_pre --depth 20 --steps 20 --json

One pass is recorded in float32 and one under autocast, at initialisation and after some float32
steps, on the embedded digits. Printed per metric: the median and the largest relative difference
over blocks, |bfloat16 - float32| / max(|float32|, 1e-3 of the largest of them).
"""

import argparse
import json

import numpy as np
import torch
import torch.nn.functional as F

import resdiag
from resdiag.data.augment import Augmenter
from resdiag.data.dataset import open_data
from resdiag.models.resnet import ResNet, build_model

METRICS = (
    "output_mean", "output_second_moment", "output_channel_mean_sq", "branch_ratio",
    "grad_output", "grad_param", "perturbation", "identity_defect", "skip_gain", "identity_drift",
)  # fmt: skip


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    batches = Augmenter(open_data("digits"), options.batch_size, 0, True, channels_last=True)
    rows = []
    for variant in options.variants.split(","):
        model = build_model(variant, options.depth, seed=0).to(memory_format=torch.channels_last)
        rows += compare(model, batches, variant, 0)
        train(model, batches, options.steps, options.lr)
        rows += compare(model, batches, variant, options.steps)
    if options.json:
        print(json.dumps({"schema": 1, **vars(options), "rows": rows}))
        return
    for row in rows:
        print(
            "{variant:<10} step {step:<4} {metric:<24} {median:9.2e} {largest:9.2e}".format(**row)
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", default="original,elu,elu_pre")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def compare(model: ResNet, batches: Augmenter, variant: str, step: int) -> list[dict[str, object]]:
    """Differences per metric; a metric that is 0 in both differs by 0."""
    wide, narrow = (record(model, batches.batch(step), half=half) for half in (False, True))
    rows: list[dict[str, object]] = []
    for metric in METRICS:
        a, b = (frame[metric].to_numpy(dtype=np.float64) for frame in (wide, narrow))
        scale = np.maximum(np.abs(a), 1e-3 * np.nanmax(np.abs(a), initial=1e-30))
        difference = np.abs(b - a) / scale
        rows.append(
            {
                "variant": variant, "step": step, "metric": metric,
                "median": float(np.nanmedian(difference)),
                "largest": float(np.nanmax(difference)),
            }
        )  # fmt: skip
    return rows


def record(model: ResNet, batch: tuple[torch.Tensor, torch.Tensor], *, half: bool):  # noqa: ANN201
    """One recorded forward and backward pass; weights and running statistics stay."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.zero_grad()
    with resdiag.attach(model) as monitor:
        loss(model, batch, half=half).backward()
        monitor.step()
    model.load_state_dict(before)
    return monitor.to_frame()


def loss(
    model: ResNet, batch: tuple[torch.Tensor, torch.Tensor], *, half: bool = False
) -> torch.Tensor:
    """Cross-entropy, of logits in float32."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = model(batch[0])
    return F.cross_entropy(logits.float(), batch[1])


def train(model: ResNet, batches: Augmenter, steps: int, lr: float) -> None:
    """Some steps in float32."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, batches.batch(step)).backward()
        optimizer.step()


if __name__ == "__main__":
    main()
