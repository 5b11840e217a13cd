"""Runs in memory with the physics of real ones: theory at step 0, a drift, perhaps an explosion."""

import numpy as np
import pandas as pd

from resdiag.catalog.table import RECORDED, SITES
from resdiag.models.variants import find_variant
from resdiag.runs.config import RunConfig
from resdiag.runs.folder import Run
from resdiag.theory.prediction import predict

DENSE = (*range(11), *range(20, 151, 10))


def make_blocks(depth, after_add):
    n = (depth - 2) // 6
    return [
        {
            "index": i,
            "name": f"stages.{i // n}.{i % n}",
            "owner": f"stages.{i // n}.{i % n}",
            "stage": i // n,
            "transition": i % n == 0 and i > 0,
            "shortcut": "identity",
            "after_add": after_add,
            "shape": [16 * 2 ** (i // n), 32 >> (i // n), 32 >> (i // n)],
        }
        for i in range(3 * n)
    ]


def make_config(variant, depth, seed=0, lr=0.1, steps=150):
    return RunConfig(
        variant=variant, depth=depth, data="digits", recipe="short", steps=steps, batch_size=64,
        lr=lr, milestones=(steps // 2,), augment=False, seed=seed, record_first=10, every=10,
        eval_every=50, commit_every=50,
    )  # fmt: skip


def make_run(
    variant="elu", depth=20, *, seed=0, lr=0.1, steps=DENSE, explode=None, unavailable=(),
    metrics=None, curve=None,
):  # fmt: skip
    """`explode`: step from which everything is NaN, after growing without bound."""
    rng = np.random.default_rng((seed, depth, len(variant)))
    steps = [s for s in steps if explode is None or s <= explode + 1]
    theory = predict(variant, depth)
    rows = [_rows(theory, step, explode, rng) for step in steps]
    frame = pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=["step", "block"])
    return Run(
        config=make_config(variant, depth, seed, lr),
        blocks=make_blocks(depth, find_variant(variant).after_add),
        data={"name": "digits", "classes": 10},
        status="done" if explode is None else "diverged",
        steps=steps[-1] + 1 if steps else 0,
        unavailable=list(unavailable),
        metrics_frame=frame if metrics is None else metrics(frame),
        curve_frame=_curve(steps, lr, explode, theory, rng),
    )


def _rows(theory, step, explode, rng):
    n = len(theory.second_moment)
    noise = lambda size=0.03: np.exp(rng.normal(0, size, n))  # noqa: E731
    late = 1 - np.exp(-step / 40)
    columns = {name: np.full(n, np.nan) for name in RECORDED}
    s = np.nan_to_num(theory.second_moment, nan=1.0) * noise() * (1 + late)
    m = np.where(np.isfinite(theory.mean), theory.mean, 0.0) * (1 + late) - 2.0 * late
    x, mx = np.append(theory.s0, s[:-1]), np.append(theory.m0, m[:-1])
    branch = np.maximum(s - x, 0.1 * s)
    for site, second, mean in zip(
        SITES, (x, branch, x, s, s), (mx, 0 * m + 0.2 * late, mx, m, m), strict=True
    ):
        mean = np.sign(mean) * np.minimum(np.abs(mean), np.sqrt(0.8 * second))
        columns[f"{site}_mean"] = mean
        columns[f"{site}_channel_mean_rms"] = np.sqrt(mean**2 + 0.05 * second)
        columns[f"{site}_channel_std"] = np.sqrt(second - mean**2)
        for q, shift in ((10, -1.28), (50, 0), (90, 1.28)):
            columns[f"{site}_mean_q{q}"] = mean + shift * np.sqrt(0.05 * second)
        columns[f"{site}_nonfinite"] = np.zeros(n)
    growth = np.where(np.isfinite(theory.grad_growth), theory.grad_growth, 1.1) * noise()
    back = np.exp(np.cumsum(np.log(growth)[::-1])[::-1] / 2)
    columns["grad_output"] = np.append(back[1:], 1.0) * 0.9 * np.exp(-late)
    columns["grad_input"] = back * 0.9 * np.exp(-late)
    columns["grad_sum"] = columns["grad_output"] * np.nan_to_num(theory.attenuation, nan=1.0)
    columns["grad_nonfinite"] = np.zeros(n)
    columns["grad_param"] = np.sqrt(x) * columns["grad_output"] * noise(0.3)
    columns["elasticity"] = columns["grad_output"] * np.sqrt(s)
    columns["shortcut_share"] = np.full(n, 0.8)
    columns["update_ratio"] = 3e-3 * noise(0.4) * np.exp(-late)
    neutral = find_variant(theory.variant).after_add == "none"
    for name in ("perturbation", "identity_defect", "identity_drift", "branch_ratio"):
        base = getattr(theory, name)
        columns[name] = base if neutral and name != "branch_ratio" else base * noise() * (1 + late)
    for name in ("skip_gain", "skip_gain_stage"):
        columns[name] = getattr(theory, name) ** (1 if neutral else 1 + 2 * late)
    for name in ("negative_fraction", "slope_mean", "slope_mean_sq"):
        columns[name] = getattr(theory, name)
    columns["saturated_fraction"], columns["dead_fraction"] = np.full(n, 0.4), np.zeros(n)
    if explode is not None:
        _explode(columns, step - explode, n)
    columns = {k: v.astype(np.float32) for k, v in columns.items()}
    return pd.DataFrame({"step": np.int32(step), "block": np.arange(n, dtype=np.int16), **columns})


def _explode(columns, ahead, n):
    """Growing before, the forward pass broken from the middle at the step, everything after."""
    with np.errstate(all="ignore"):
        if ahead < 0:
            for name in ("grad_output", "grad_input", "grad_sum", "grad_param", "update_ratio"):
                columns[name] = columns[name] * 10.0 ** (4 * (ahead == -1))
            return
        first = n // 2 if ahead == 0 else 0
        for name, values in columns.items():
            if name.startswith(("grad_", "update", "elasticity", "shortcut_share")):
                values[:] = np.nan
            elif not name.endswith("_nonfinite"):
                values[first:] = np.nan
        for site in SITES:
            columns[f"{site}_nonfinite"][first:] = 1.0
        columns["grad_nonfinite"][:] = 1.0


def _curve(steps, lr, explode, theory, rng):
    every = np.arange(steps[-1] + 1 if steps else 0)
    recorded = np.isin(every, steps)
    scale = 0.5 + 0.5 * np.exp(-every / 40)
    start = 2.3 if theory.growth_per_block < 1.4 else 2.3 + np.sqrt(theory.second_moment[-1])
    loss = (1 + (start - 1) * np.exp(-every / 25)) * np.exp(rng.normal(0, 0.05, len(every)))
    norm = scale * 3.0 * start
    if explode is not None:
        loss = np.where(every >= explode, np.nan, loss * 10.0 ** (3 * (every == explode - 1)))
        norm = np.where(every >= explode, np.inf, norm)
    test = (every % 50 == 49) | (every == every[-1:].sum())
    gap = np.nan
    return pd.DataFrame(
        {
            "step": every.astype(np.int32),
            "epoch": (every / 23).astype(np.float32),
            "loss": loss,
            "error": np.where(np.isfinite(loss), 0.2 + 0.7 * scale**2, 0.9),
            "lr": np.where(every < 75, lr, lr / 10),
            "images_per_s": 500.0,
            "train_loss": np.where(test, loss, gap),
            "train_error": np.where(test, 0.25 + 0.6 * scale**2, gap),
            "test_loss": np.where(test, loss * 1.1, gap),
            "test_error": np.where(test, 0.3 + 0.6 * scale**2, gap),
            "grad_norm": np.where(recorded, norm, gap),
            "head_mean": np.where(recorded, 0.3 - 2 * (1 - scale), gap),
            "head_bias": np.where(recorded, 0.5 + (1 - scale), gap),
            "head_kick": np.where(recorded, 0.4, gap),
        }
    )
