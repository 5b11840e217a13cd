"""Measures what the four stories tell: one JSON file per question, beside this one.

    python studies/stories/measure.py --data folder:cifar10-jpeg.tar.gz [QUESTION]...

Initialisation and first steps only, on a CPU; about ten minutes on one idle core.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.optim import SGD

from resdiag.data.augment import Augmenter
from resdiag.data.dataset import ImageData, open_data
from resdiag.diagnose.finding import plain
from resdiag.diagnose.rundata import RunData
from resdiag.interventions.compare import run_lesions
from resdiag.models.resnet import build_model
from resdiag.models.variants import VARIANTS, find_variant
from resdiag.probe.forecast import stem_variances
from resdiag.runs.environment import environment
from resdiag.runs.watched import as_run
from resdiag.runs.watched_config import WatchedConfig
from resdiag.theory.prediction import predict
from resdiag.training.recipe import Request, resolve
from resdiag.watch.loop.attach import attach

HERE = Path(__file__).resolve().parent
BATCH = 32
ORDER = tuple(VARIANTS)
DEPTHS = (20, 56, 110)
LAST = (
    "output_second_moment", "output_mean", "output_bias", "perturbation", "identity_defect",
    "identity_drift", "skip_gain", "grad_param",
)  # fmt: skip


def last_of(seen: RunData, step: int) -> dict[str, float]:
    """Metrics of the last block, and P4 at the end of the first stage."""
    first_stage = [row["index"] for row in seen.run.blocks if row["stage"] == 0]
    numbers = {name: seen.value(name, step, seen.indices[-1]) for name in LAST}
    numbers["identity_drift_stage_1"] = seen.value("identity_drift", step, first_stage[-1])
    numbers["identity_defect_stage_1"] = seen.value("identity_defect", step, first_stage[-1])
    return numbers


def train(
    variant: str, depth: int, seed: int, data: ImageData, steps: int, lr: float, every: int
) -> list[dict[str, Any]]:
    """One training of the first `steps` steps; a row per recorded step."""
    model = build_model(variant, depth, num_classes=len(data.classes), seed=seed)
    rule = SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    batches = Augmenter(data, BATCH, seed, augment=True)
    losses = list[float]()
    variances = stem_variances(model, batches.batch(0)[0])
    units = None if VARIANTS[variant].shortcut else model.unit_names
    with attach(model, blocks=units, every=every, record_first=1) as monitor:
        for step in range(steps):
            images, labels = batches.batch(step)
            rule.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            torch.autograd.backward(loss)
            losses.append(float(loss.detach()))
            rule.step()
            monitor.step()
            if not math.isfinite(losses[-1]):
                break
    config = WatchedConfig(model=variant, variant=variant, depth=depth, lr=lr, steps=steps)
    seen = RunData(as_run(monitor, config=config, curve={"loss": losses}))
    s0, m0 = seen.value("input_second_moment", 0, 0), seen.value("input_mean", 0, 0)
    theory = predict(variant, depth, s0=s0, m0=m0, variances=variances)
    rows = []
    for step in seen.steps:
        rows.append({
            "variant": variant, "depth": depth, "seed": seed, "step": step, "lr": lr,
            "loss": losses[step], "worst_loss": max(losses[: step + 1]),
            "grad_norm": seen.scalar("grad_norm", step),
            "growth_per_block": seen.growth_per_block(step),
            "gradient_ratio": seen.gradient_ratio(step),
            **last_of(seen, step),
        })  # fmt: skip
    rows[0]["theory"] = {
        "growth_per_block": theory.growth_per_block, "gradient_ratio": theory.gradient_ratio,
        "output_mean": theory.mean[-1], "skip_gain": theory.skip_gain[-1],
        "perturbation": theory.perturbation[-1],
        "identity_defect_stage_1": theory.identity_defect[depth // 6 - 1],
        "identity_drift_stage_1": theory.identity_drift[depth // 6 - 1],
    }  # fmt: skip
    return rows


def seeds_at_start(variant: str, depth: int) -> int:
    """More where seeds scatter: without normalisation at 110 by about 1 in the logarithm."""
    if depth < 110:
        return 3
    return 2 if VARIANTS[variant].norm else 8


def initialisation(data: ImageData) -> list[dict[str, Any]]:
    """Every variant of the stories at every depth, before the first update."""
    return [
        train(variant, depth, seed, data, 1, 0.1, 1)[0]
        for variant in ORDER
        for depth in DEPTHS
        for seed in range(seeds_at_start(variant, depth))
    ]


def steps(data: ImageData) -> list[dict[str, Any]]:
    """c, d and the original at the paper's rate, without warm-up."""
    return [
        row
        for variant in ("elu_after", "original", "elu")
        for depth, seeds, count in ((20, 2, 31), (56, 2, 31))
        for seed in range(seeds)
        for row in train(variant, depth, seed, data, count, 0.1, 10)
    ]


REMEDIES = ("bn_before_add", "skipinit", "swap_activation", "lower_lr")
LESIONS = (
    ("elu_nobn", 20, "grows_at_init", REMEDIES, 3, 8),
    ("elu_pre", 20, "grows_at_init", REMEDIES, 3, 8),
    ("elu_nobn", 56, "grows_at_init", ("bn_before_add",), 2, 4),
    ("elu_pre", 56, "grows_at_init", ("bn_before_add",), 2, 4),
    ("elu_after", 20, "", ("no_after_add",), 3, 12),
    ("elu_after", 56, "", ("no_after_add",), 2, 12),
    ("original", 20, "", ("no_after_add",), 3, 12),
    ("original", 56, "", ("no_after_add",), 2, 12),
    ("elu", 56, "", ("after_add_elu",), 2, 12),
)  # fmt: skip


def lesions(data: ImageData) -> list[dict[str, Any]]:
    """Each lesion against its control, at learning rate 0.1."""
    found = []
    for variant, depth, claim, names, seeds, count in LESIONS:
        asked = Request(variant=find_variant(variant).id, depth=depth, lr=0.1, steps=count,
                        batch_size=BATCH)  # fmt: skip
        config = resolve(asked, data_name=data.name, train_size=len(data.train_labels))
        effects = run_lesions(config, data, names, claim=claim, seeds=seeds, steps=count)
        found += [{"variant": variant, "depth": depth, **effect.to_dict()} for effect in effects]
    return found


def main() -> None:
    """Measure what is asked for, or all of it, and write it beside this file."""
    questions = {"initialisation": initialisation, "steps": steps, "lesions": lesions}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", nargs="*", choices=[*questions, []], default=[])
    parser.add_argument("--data", default="auto")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data = open_data(asked.data)
    for name in asked.questions or questions:
        document = {
            "data": dict(data.identity),
            "environment": environment("cpu", "float32"),
            "batch_size": BATCH,
            "rows": questions[name](data),
        }
        text = json.dumps(plain(document), indent=1, sort_keys=True)
        (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
