"""Slow and obvious twins of everything that is recorded.

Plain tensors, `retain_grad` and float64 numpy: no hooks, no buffer, no function mode. A unit of a
network is written out by hand as its five site tensors; every column of `catalog.RECORDED` follows
from them by its formula.
"""

import copy
import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from resdiag.catalog.table import RECORDED, SITES

SLOPES = {
    "relu": lambda z: (z > 0).astype(float),
    "elu": lambda z: np.where(z > 0, 1.0, np.exp(np.minimum(z, 0))),
    "none": np.ones_like,
}
VALUES = {
    "relu": lambda z: np.maximum(z, 0),
    "elu": lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0))),
    "none": lambda z: z,
}
FUNCTIONS = {"relu": F.relu, "elu": F.elu, "none": lambda z: z}


@dataclass
class Unit:
    """One block of one pass: its tensors, all with gradients retained."""

    input: torch.Tensor
    output: torch.Tensor
    parameters: list
    branch: torch.Tensor | None = None
    shortcut: torch.Tensor | None = None
    sum: torch.Tensor | None = None
    through: torch.Tensor | None = None  # the copy of x that only the shortcut reads
    after: str = "none"
    path: str = "identity"  # identity, option_a, projection or none
    stride: int = 1
    gates: list = field(default_factory=list)  # (activation, its input) inside the block


def array(x):
    return x.detach().double().cpu().numpy()


def by_channel(x):
    """(C, everything else), for (N, C), (N, T, C) and (N, C, H, W)."""
    values = array(x)
    return np.moveaxis(values, 1 if values.ndim in (2, 4) else -1, 0).reshape(
        values.shape[1 if values.ndim in (2, 4) else -1], -1
    )


def norm(x):
    """Euclidean norm with the largest magnitude taken out, so that no square overflows."""
    values = np.abs(array(x)).ravel()
    top = values.max(initial=0.0)
    return 0.0 if top == 0 else float(top * math.sqrt(float(((values / top) ** 2).sum())))


def statistics(x):
    """B1, B2's two parts, the quantiles and the non-finite fraction of one site."""
    channels = by_channel(x)
    mu = channels.mean(axis=1)
    return {
        "mean": mu.mean(),
        "channel_mean_rms": math.sqrt((mu**2).mean()),
        "channel_std": math.sqrt(channels.var(axis=1).mean()),
        "mean_q10": np.quantile(mu, 0.1),
        "mean_q50": np.quantile(mu, 0.5),
        "mean_q90": np.quantile(mu, 0.9),
        "nonfinite": 1 - np.isfinite(channels).mean(),
    }


def rms(x):
    return math.sqrt(float((array(x) ** 2).mean()))


def option_a(values, channels, stride):
    """Subsample, then zeros after the real channels, in numpy."""
    small = values[:, :, ::stride, ::stride]
    n, c, h, w = small.shape
    return np.concatenate([small, np.zeros((n, channels - c, h, w))], axis=1)


def columns(units, samples, stages, weights_before=None):
    """Every recorded column, one list per id with one value per unit; call after backward.

    Args:
        units: The pass, block by block.
        samples: Samples at the head of the batch for the per-unit quantities.
        stages: Stage of every unit.
        weights_before: Per unit, its parameters before the update; then update_ratio is known.
    """
    rows = [_row(unit, samples) for unit in units]
    for row, skip in zip(rows, _skip_path(units, samples, stages), strict=True):
        row |= skip
    if weights_before is not None:
        for row, unit, before in zip(rows, units, weights_before, strict=True):
            if unit.parameters:
                moved = [p - b for p, b in zip(unit.parameters, before, strict=True)]
                row["update_ratio"] = root(map(norm, moved)) / root(map(norm, before))
    return {name: [row.get(name, math.nan) for row in rows] for name in RECORDED}


def root(sizes):
    """Square root of the sum of squares: the norm of what has parts of these norms."""
    return math.sqrt(sum(size**2 for size in sizes))


def _row(unit, samples):
    row = {}
    for site in SITES:
        x = getattr(unit, site)
        if x is not None:
            row |= {f"{site}_{name}": value for name, value in statistics(x).items()}
    batch = math.sqrt(unit.output.shape[0])
    row["grad_param"] = root(norm(p.grad) for p in unit.parameters) if unit.parameters else np.nan
    row["grad_output"] = batch * norm(unit.output.grad)
    row["grad_nonfinite"] = 1 - np.isfinite(array(unit.output.grad)).mean()
    sizes = np.sqrt((array(unit.output) ** 2).reshape(unit.output.shape[0], -1).sum(1))
    row["elasticity"] = row["grad_output"] * math.sqrt((sizes**2).mean())
    if unit.input.grad is not None:
        row["grad_input"] = batch * norm(unit.input.grad)
    if unit.sum is not None:
        row["grad_sum"] = batch * norm(unit.sum.grad)
        row["branch_ratio"] = norm(unit.branch) / norm(unit.shortcut)
    if unit.through is not None and unit.through.grad is not None:
        part, whole = array(unit.through.grad)[:samples], array(unit.input.grad)[:samples]
        row["shortcut_share"] = (part * whole).sum() / (whole**2).sum()
    if unit.gates:
        row |= _gates(unit, samples)
    return row


def _gates(unit, samples):
    closed = [(kind, SLOPES[kind](array(z)[:samples]) < 0.05) for kind, z in unit.gates]
    dead = [np.moveaxis(gate, 1, 0).reshape(gate.shape[1], -1).all(1) for _, gate in closed]
    return {
        "saturated_fraction": np.concatenate([gate.ravel() for _, gate in closed]).mean(),
        "dead_fraction": np.concatenate(dead).mean(),
    }


def _skip_path(units, samples, stages):
    """P1-P4 and the slopes, with one number per unit carried from block to block."""
    whole, alive, known = None, None, True
    for index, unit in enumerate(units):
        if unit.sum is None:
            yield {}
            continue
        u, h = array(unit.sum)[:samples], array(unit.shortcut)[:samples]
        f, slope = VALUES[unit.after], SLOPES[unit.after](u)
        if index == 0 or stages[index] != stages[index - 1]:
            in_stage, base, iterate = np.ones_like(u), h, h
        if whole is None:
            whole = alive = np.ones_like(array(unit.input)[:samples])
        begins = index == 0 or stages[index] != stages[index - 1]
        if unit.path == "projection":  # a product begins anew with the stage, or is lost
            whole, alive, known = np.ones_like(u), np.ones_like(u), begins
        if known and unit.path == "option_a":
            whole = option_a(whole, u.shape[1], unit.stride)
            alive = option_a(alive, u.shape[1], unit.stride)
        in_stage, iterate = in_stage * slope, f(iterate)
        whole = whole * slope if known else whole
        yield {
            "perturbation": _change(f(u), u),
            "identity_defect": _change(f(h), h),
            "skip_gain_stage": in_stage.mean(),
            "skip_gain": whole.sum() / alive.sum() if known else math.nan,
            "identity_drift": _change(iterate, base),
            "negative_fraction": (u < 0).mean(),
            "slope_mean": slope.mean(),
            "slope_mean_sq": (slope**2).mean(),
        }


def _change(changed, reference):
    difference = math.sqrt(((changed - reference) ** 2).sum())
    return 0.0 if difference == 0 else difference / math.sqrt((reference**2).sum())


def between(samples):
    """RMS deviation of samples from their mean."""
    return math.sqrt(((samples - samples.mean(0)) ** 2).mean())


def step_columns(model, optimizer, images, labels, features, logits):
    """Every column that is recorded once per step; call after backward, before the step."""
    group, head = optimizer.param_groups[0], statistics(features)
    p = torch.softmax(logits.detach().double(), 1).cpu().numpy()
    y = np.eye(p.shape[1])[labels.cpu().numpy()]
    kick = group["lr"] * (1 + group["momentum"])
    kick *= (array(features).mean(0) ** 2).sum() + 1
    pixels = array(images)
    return {
        "lr": group["lr"],
        "grad_norm": root(norm(p.grad) for p in model.parameters()),
        "head_mean": head["mean"],
        "head_bias": head["channel_mean_rms"] / head["channel_std"],
        "head_kick": kick * np.abs((p - y).mean(0)).max(),
        "head_loss": -np.log((p * y).sum(1)).mean(),
        "label_share": y.mean(0).max(),
        "head_factor": 1.0,  # the loss is a mean over the batch
        "rows_ignored": 0.0,
        "softmax_twice": 0.0,
        "grad_kept": 0.0,
        "data_between": between(pixels[:8]) / pixels.std(ddof=1),
        "data_mean": pixels.mean(),
        "data_std": pixels.std(ddof=1),
        "data_nonfinite": 1 - np.isfinite(pixels).mean(),
        "momentum": group["momentum"],
        "weight_decay": group["weight_decay"],
    }


def walk_training(model, optimizer, batches, after, samples):
    """Train a ResNet of ours unwatched; per step, its columns per block and per step.

    Before each step a copy with the same weights is walked through by hand.

    Args:
        model: The network; it is trained.
        optimizer: Its optimizer.
        batches: Images and labels of each step.
        after: What stands after the additions: "relu", "elu" or "none".
        samples: Samples at the head of the batch for the per-unit quantities.
    """
    stages = [int(name.split(".")[1]) for name in model.unit_names]
    for images, labels in batches:
        twin = copy.deepcopy(model)
        units, features, logits = walk_resnet(twin, images, after)
        F.cross_entropy(logits, labels).backward()
        per_step = step_columns(twin, optimizer, images, labels, features, logits)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        before = [[p.detach().clone() for p in unit.parameters] for unit in units]
        for name in model.unit_names:
            new = dict(model.get_submodule(name).named_parameters())
            for key, parameter in twin.get_submodule(name).named_parameters():
                parameter.data = new[key].detach().clone()
        yield columns(units, samples, stages, before), per_step


# -- networks written out -----------------------------------------------------------------------


def _split(x):
    """x itself with its gradient retained, and two copies: for the shortcut and for the branch."""
    if not x.requires_grad:
        return x, x, x
    x.retain_grad()
    through = x.view_as(x)
    through.retain_grad()
    return x, through, x.view_as(x)


def _keep(*tensors):
    for tensor in tensors:
        tensor.retain_grad()


def normalise(bn, x):
    """Training-mode batch normalisation without touching the running statistics."""
    return F.batch_norm(x, None, None, bn.weight, bn.bias, training=True, eps=bn.eps)


def walk_layers(layers, x, gates):
    """A sequence of convolutions, normalisations and activations, one functional call each."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            x = F.conv2d(x, layer.weight, None, layer.stride, layer.padding, 1, layer.groups)
        elif isinstance(layer, nn.BatchNorm2d):
            x = normalise(layer, x)
        else:
            kind = {nn.ReLU: "relu", nn.ELU: "elu"}[type(layer)]
            gates.append((kind, x))
            x = FUNCTIONS[kind](x)
    return x


def walk_resnet(model, images, after):
    """Our ResNet by hand: the units of one pass, the classifier's input and its output."""
    units, x = [], walk_layers(model.stem, images, [])
    for stage in model.stages:
        for block in stage:
            x, unit = _walk_block(block, x, after)
            units.append(unit)
    head = model.head if isinstance(model.head, nn.Sequential) else []
    features = walk_layers(head, x, []).mean((2, 3))
    return units, features, F.linear(features, model.classifier.weight, model.classifier.bias)


def _walk_block(block, x, after):
    parameters, gates = list(block.parameters()), []
    x, through, inner = _split(x)
    branch = walk_layers(block.branch, inner, gates)
    if block.shortcut is None:
        gates += [] if after == "none" else [(after, branch)]
        output = FUNCTIONS[after](branch)
        _keep(output)
        return output, Unit(x, output, parameters, path="none", gates=gates)
    same = isinstance(block.shortcut, nn.Identity)
    h = through
    if not same:
        stride, extra = block.shortcut.stride, block.shortcut.channels - x.shape[1]
        n, _, height, width = (small := through[:, :, ::stride, ::stride]).shape
        h = torch.cat([small, small.new_zeros(n, extra, height, width)], dim=1)
    u = branch + h
    gates += [] if after == "none" else [(after, u)]
    output = FUNCTIONS[after](u)
    _keep(u, output)
    unit = Unit(x, output, parameters, branch, h, u, through, after, gates=gates)
    if not same:
        unit.path, unit.stride = "option_a", block.shortcut.stride
    return output, unit


def walk_torchvision(model, images):
    """torchvision's BasicBlock and Bottleneck networks by hand, without anything in place."""
    x = F.relu(normalise(model.bn1, model.conv1(images)))
    x, units = F.max_pool2d(x, 3, 2, 1), []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            x, unit = _walk_torchvision_block(block, x)
            units.append(unit)
    features = x.mean((2, 3))
    return units, features, F.linear(features, model.fc.weight, model.fc.bias)


def _walk_torchvision_block(block, x):
    gates = []
    x, through, branch = _split(x)
    count = 3 if hasattr(block, "conv3") else 2
    for number in range(1, count + 1):
        conv, bn = getattr(block, f"conv{number}"), getattr(block, f"bn{number}")
        branch = normalise(bn, conv(branch))
        if number < count:
            gates.append(("relu", branch))
            branch = F.relu(branch)
    h = through
    if block.downsample is not None:
        h = normalise(block.downsample[1], block.downsample[0](through))
    u = branch + h
    gates.append(("relu", u))
    output = F.relu(u)
    _keep(u, output)
    unit = Unit(x, output, list(block.parameters()), branch, h, u, through, "relu", gates=gates)
    unit.path = "identity" if block.downsample is None else "projection"
    return output, unit


# -- comparing ------------------------------------------------------------------------------------


def assert_columns_agree(frame, expected, *, rtol=1e-4, skip=()):
    """Every recorded column of one step's frame against the twin's, with NaN at the same places."""
    for name in RECORDED:
        if name not in skip:
            assert_column_agrees(name, frame, expected, rtol=rtol)


def assert_column_agrees(name, frame, expected, *, rtol=1e-4):
    """One column of one step's frame against the twin's.

    Means are sums of terms of both signs: their error is measured against the site's RMS, not
    against the mean, which BatchNorm makes exactly 0.
    """
    got = frame[name].to_numpy(np.float64)
    want = np.atleast_1d(np.asarray(expected[name], np.float64))
    slack = np.zeros_like(want)
    site = name.split("_")[0]
    if site in SITES and "mean" in name:
        rms_, std = expected[f"{site}_channel_mean_rms"], expected[f"{site}_channel_std"]
        slack = 3e-6 * np.nan_to_num(np.hypot(rms_, std))
    if name == "shortcut_share":
        slack = slack + 1e-5
    assert np.array_equal(np.isnan(got), np.isnan(want)), (name, got, want)
    wrong = np.abs(got - want) > rtol * np.abs(want) + slack
    assert not wrong.any(), (name, np.flatnonzero(wrong), got[wrong], want[wrong])
