"""Why `plain` at depth 110 is not predicted: the samples' energies do not stay equal.

    python studies/stories/energies.py --data folder:cifar10-jpeg.tar.gz

Writes energies.json beside this file: ||g_0|| / ||g_L|| measured over predicted, and the relative
variance over samples of the energy mean(y^2) behind the first, the middle and the last BatchNorm.
In the arm "reset" every BatchNorm's output is rescaled to the same energy in every sample, by
factors without gradient; nothing else is changed. A minute on one idle core.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resdiag.data.augment import Augmenter
from resdiag.data.dataset import open_data
from resdiag.diagnose.finding import plain
from resdiag.models.resnet import build_model
from resdiag.runs.environment import environment
from resdiag.theory.prediction import predict

HERE = Path(__file__).resolve().parent
BATCH = 32


def measure(
    images: Tensor, labels: Tensor, depth: int, seed: int, *, reset: bool
) -> dict[str, Any]:
    """One forward and backward pass of one `plain` network."""
    model = build_model("plain", depth, num_classes=10, seed=seed)
    spread, rectified = list[float](), list[Tensor]()

    def behind_norm(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        energy = output.detach().square().mean((1, 2, 3), keepdim=True)
        spread.append(float(energy.var(correction=0) / energy.mean() ** 2))
        return output / energy.sqrt() if reset else output

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(behind_norm)
    blocks = [model.get_submodule(name) for name in model.unit_names]
    blocks[0].register_forward_pre_hook(lambda _module, inputs: rectified.append(inputs[0]))
    blocks[-1].register_forward_hook(lambda _module, _inputs, output: rectified.append(output))
    loss = F.cross_entropy(model(images), labels)
    first, end = torch.autograd.grad(loss, [rectified[0], rectified[-1]])
    ratio = float(first.double().norm() / end.double().norm())
    return {
        "depth": depth, "seed": seed, "reset": reset, "gradient_ratio": ratio,
        "over_theory": ratio / predict("plain", depth).gradient_ratio,
        "spread": [spread[0], spread[len(spread) // 2], spread[-1]],
    }  # fmt: skip


def main() -> None:
    """Photographs and white noise, with and without the reset, several initialisations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="auto")
    torch.set_num_threads(1)
    data = open_data(parser.parse_args().data)
    rows = list[dict[str, Any]]()
    for depth in (56, 110):
        for seed in range(4):
            images, labels = Augmenter(data, BATCH, seed, augment=True).batch(0)
            noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
            for name, x in (("photographs", images), ("noise", noise)):
                for reset in (False, True):
                    rows.append({"input": name, **measure(x, labels, depth, seed, reset=reset)})
    document = {
        "data": dict(data.identity), "environment": environment("cpu", "float32"),
        "batch_size": BATCH, "rows": rows,
    }  # fmt: skip
    text = json.dumps(plain(document), indent=1, sort_keys=True)
    (HERE / "energies.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
