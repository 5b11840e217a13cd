"""Made-up runs that verdicts are tried on: healthy ones, until `change` makes them ill."""

import numpy as np
import pandas as pd

from resdiag.catalog.table import SITES
from resdiag.runs.config import RunConfig
from resdiag.runs.folder import Run
from resdiag.runs.watched_config import WatchedConfig
from resdiag.theory.prediction import predict

BLOCKS, STEPS = 6, 20


def inventory_of(count=BLOCKS, steps=STEPS, **parts):
    """What a monitor says of model, optimizer and loop of a healthy run; `parts` replace some."""
    norms = [
        {
            "name": f"b{i}.norm", "block": i, "kind": "batch_norm", "count": 64, "eps": 1e-5,
            "variance": 1.0, "gain": 1.0,
        }
        for i in range(count)
    ]  # fmt: skip
    healthy = {
        "trainable": [None] * count,  # not known: tests freeze blocks by what they record
        "parameters": {
            "known": True, "trainable": 4 * count, "unheld": 0, "names": [], "blocks": [],
            "outside": 0, "foreign": 0, "copies": False,
        },
        "groups": [
            {
                "optimizer": "SGD", "lr": 0.1, "highest": 0.1, "parameters": 4 * count,
                "size": 1000, "names": ["b0.weight"], "blocks": list(range(count)),
            }
        ],
        "events": {"update": {"count": steps, "first": 0, "last": steps - 1}},
        "evaluating": [], "recurrent": [], "stuck": [], "activation": "",
        "normalisations": norms, "attentions": [], "matrices": 2 * count, "constant": [],
        "lacking": [], "later_attentions": [], "later_lacking": [], "later_step": 8,
    }  # fmt: skip
    return healthy | parts


def run_of(change=None, *, steps=STEPS, count=BLOCKS, blocks=None, **fields):
    """A healthy foreign run of `count` blocks; `change(cell, curve)` makes it ill."""
    grid = pd.MultiIndex.from_product([range(steps), range(count)], names=["step", "block"])
    metrics = pd.DataFrame(index=grid)
    for site in SITES:
        metrics[f"{site}_channel_mean_rms"], metrics[f"{site}_channel_std"] = 0.1, 1.0
        metrics[f"{site}_mean"] = 0.05
        for q, value in ((10, -0.1), (50, 0.02), (90, 0.15)):
            metrics[f"{site}_mean_q{q}"] = value
        metrics[f"{site}_nonfinite"] = 0.0
    ordinary = {
        "branch_ratio": 0.5, "grad_param": 0.1, "grad_input": 1.0, "grad_output": 1.0,
        "grad_nonfinite": 0.0, "shortcut_share": 0.8, "update_ratio": 1e-3,
        "saturated_fraction": 0.5, "dead_fraction": 0.0, "skip_gain": 1.0,
    }  # fmt: skip
    for name, value in ordinary.items():
        metrics[name] = value
    curve = pd.DataFrame({"step": range(steps)})
    curve["loss"] = 2.3 * 0.97 ** curve["step"]
    curve = curve.assign(
        lr=0.1, grad_norm=1.0, momentum=0.9, weight_decay=1e-4, label_share=0.2,
        data_mean=0.0, data_std=1.0, data_nonfinite=0.0, data_between=0.9,
        head_factor=1.0, rows_ignored=0.0, softmax_twice=0.0, grad_kept=0.0,
    )  # fmt: skip
    if change:

        def cell(metric, value, *, step=slice(None), block=slice(None)):
            metrics.loc[(step, block), metric] = value

        change(cell, curve)
    if "head_loss" not in curve:
        curve["head_loss"] = curve["loss"].where(curve["loss"] > 0)  # a cross-entropy
    rows = blocks or [
        {
            "index": i, "name": f"b{i}", "stage": 0, "transition": False, "shortcut": "identity",
            "after_add": "none", "branch": ["conv2d", "batch_norm", "relu", "conv2d"],
            "shortcut_path": [],
        }
        for i in range(count)
    ]  # fmt: skip
    return Run(
        config=WatchedConfig(model="net", optimizer="SGD", lr=0.1),
        blocks=rows,
        steps=steps,
        metrics_frame=metrics.reset_index(),
        curve_frame=curve,
        **{"data": {"classes": 10}, "inventory": inventory_of(count, steps), **fields},
    )


def blocks_of(depth, shortcut="identity"):
    n = (depth - 2) // 6
    return [
        {"index": i, "name": f"stages.{i // n}.{i % n}", "stage": i // n, "shortcut": shortcut}
        | {"transition": i > 0 and i % n == 0}
        for i in range(3 * n)
    ]


def plant(variant="elu", depth=20, *, steps=30, lr=0.01, change=None, **options):
    """A run whose step 0 is theory's, and whose loss falls; `change(metrics, curve)` plants."""
    theory = predict(variant, depth)
    count = len(theory.second_moment)
    moments = np.append(theory.s0, theory.second_moment)
    back = np.exp(np.cumsum(np.log(theory.grad_growth)[::-1])[::-1] / 2)
    one_step = {
        "block": np.arange(count),
        "input_channel_mean_rms": np.zeros(count),
        "input_channel_std": np.sqrt(moments[:-1]),
        "output_channel_mean_rms": np.zeros(count),
        "output_channel_std": np.sqrt(moments[1:]),
        "input_mean": np.append(theory.m0, theory.mean[:-1]),
        "output_mean": theory.mean,
        "skip_gain": theory.skip_gain,
        "grad_param": np.ones(count),
        "grad_input": back,
        "grad_output": np.append(back[1:], 1.0),
        "grad_nonfinite": np.zeros(count),
        **{f"{site}_nonfinite": np.zeros(count) for site in SITES},
        "branch_ratio": np.full(count, 0.5),
        "shortcut_share": np.full(count, 0.8),
        "update_ratio": np.full(count, 1e-3),
    }
    metrics = pd.concat([pd.DataFrame({"step": s, **one_step}) for s in range(steps)])
    metrics = metrics.reset_index(drop=True).astype(dict.fromkeys(one_step, float))
    step = np.arange(steps)
    curve = pd.DataFrame(
        {"step": step, "epoch": step / 100, "loss": 2.4 * 0.97**step, "lr": lr, "grad_norm": 2.0}
    )
    if change:
        change(metrics, curve)
    config = RunConfig(
        variant=variant, depth=depth, data="digits", recipe="short", steps=steps, batch_size=64,
        lr=lr, milestones=(), augment=False, record_first=10, every=1, eval_every=0,
        commit_every=10,
    )  # fmt: skip
    fields = {"data": {"classes": 10}, "steps": steps, "blocks": blocks_of(depth)}
    return Run(config=config, metrics_frame=metrics, curve_frame=curve, **(fields | options))
