"""How often `resdiag predict` is right: random settings by a seed, forecast, then trained.

    python benchmarks/predictions.py --settings 200 --seed 20261201

A line of JSON per setting goes to `results/predictions.jsonl` as soon as it is known; the same
command continues. The page is written by `make pages`. About ten seconds a setting on one core.
"""

import argparse
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.optim import SGD
from tqdm import tqdm

from resdiag.data.augment import Augmenter
from resdiag.data.dataset import open_data
from resdiag.models.resnet import build_model
from resdiag.probe.forecast import forecast

FILE = Path(__file__).resolve().parent / "results" / "predictions.jsonl"
STEPS = 50
VARIANTS = ("elu_nobn", "elu_pre", "relu_nobn", "original", "elu_after", "elu", "no_relu")


def draw(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Settings drawn evenly from what a user might try; learning rates are log-uniform."""
    chance = random.Random(seed)
    for number in range(count):
        variant = chance.choice(VARIANTS)
        yield {
            "number": number,
            "variant": variant,
            "depth": chance.choice((8, 14, 20, 32)),
            "width": chance.choice((0.25, 0.5, 1.0)),
            "stem_bn": chance.random() < 0.25,
            "branch_scale": chance.choice((1.0, 1.0, 0.5, 0.2)),
            "batch_size": chance.choice((8, 16, 32)),
            "lr": 10 ** chance.uniform(-4, 0.5),
            "seed": chance.randrange(10**6),
        }


def train(setting: dict[str, Any]) -> bool:
    """Whether 50 steps of SGD with Nesterov's momentum stay finite."""
    data = open_data("digits", None)
    model = build_model(
        setting["variant"], setting["depth"], width=setting["width"],
        num_classes=len(data.classes), stem_bn=setting["stem_bn"],
        branch_scale=setting["branch_scale"], seed=setting["seed"],
    )  # fmt: skip
    rule = SGD(model.parameters(), lr=setting["lr"], momentum=0.9, nesterov=True, weight_decay=1e-4)
    batches = Augmenter(data, setting["batch_size"], setting["seed"], augment=True)
    for step in range(STEPS):
        images, labels = batches.batch(step)
        loss = F.cross_entropy(model(images), labels)
        if not math.isfinite(float(loss.detach())):
            return False
        rule.zero_grad()
        loss.backward()
        rule.step()
    return all(bool(p.isfinite().all()) for p in model.parameters())


def main() -> None:
    """Forecast and train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", type=int, default=200)
    parser.add_argument("--seed", type=int, default=20261201)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    known = [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []
    done = {(row["drawn"], row["number"]) for row in known}
    for setting in tqdm(list(draw(asked.settings, asked.seed))):
        if (asked.seed, setting["number"]) in done:
            continue
        options = {k: v for k, v in setting.items() if k not in ("number", "variant", "depth")}
        found = forecast(setting["variant"], setting["depth"], data="digits", **options)
        row = {
            "drawn": asked.seed, **setting, "fate": found.fate,
            "critical_lr": found.critical_lr.measured, "lived": train(setting),
        }  # fmt: skip
        with FILE.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
