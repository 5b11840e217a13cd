"""Moments of optimizers, and how far numbers, channels and logits stick out, against slow twins."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_nets import Net, close, data
from torch import nn

from resdiag.catalog.set_metrics import EXTREME_SITES
from resdiag.watch.loop.attach import attach
from resdiag.watch.measure.extremes import extremes

OPTIMIZER = {"core": 1, "optimizer": 1}


def train(model, optimizer, steps=3, metrics=OPTIMIZER, **options):
    """Train, watched; the monitor, and per step the gradients and the weights before the update."""
    x, y = data()
    seen = []
    with attach(model, optimizer=optimizer, metrics=metrics, **options) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            seen.append([(p.grad.clone(), p.detach().clone()) for p in members(model)])
            optimizer.step()
            monitor.step()
    return monitor, seen


def members(model):
    """The parameters of the first block."""
    return [*model.blocks[0].parameters()]


def last(monitor):
    frame = monitor.to_frame()
    return frame[frame.block == 0].iloc[-1]


def rms(tensors):
    numbers = [value for x in tensors for value in x.flatten().tolist()]
    return math.sqrt(math.fsum(value**2 for value in numbers) / len(numbers))


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_has_the_moments_of_its_definition(make):
    model = Net()
    optimizer = make(model.parameters(), 0.01, betas=(0.8, 0.9))
    monitor, seen = train(model, optimizer)
    moved, first, second, mismatch = [], [], [], []
    for i, p in enumerate(members(model)):
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        for step in seen:
            g = step[i][0]
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        first.append(m)
        second.append(v.sqrt())
        mismatch.append(g / (v / (1 - 0.9**3)).sqrt().clamp_min(1e-8))
        moved.append(p - seen[-1][i][1])
    found = last(monitor)
    assert found["moment_first"] == close(rms(first))
    assert found["moment_second"] == close(rms(second))
    assert found["moment_mismatch"] == close(rms(mismatch))
    assert found["update_size"] == pytest.approx(rms(moved), rel=1e-4)


def test_of_gradients_that_stay_the_same_the_mismatch_is_1():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(nn.Linear(3, 3), layer)
    optimizer = torch.optim.AdamW(model.parameters(), 0.0, betas=(0.9, 0.99))
    x = data()[0]
    with attach(model, optimizer, blocks=["1"], metrics=OPTIMIZER) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
            monitor.step()
    assert monitor.to_frame()["moment_mismatch"].tolist() == pytest.approx([1.0] * 4, rel=1e-5)


def test_sgd_has_its_momentum_and_says_that_it_has_no_second_moment():
    model = Net()
    monitor, seen = train(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.5))
    buffers = []
    for i, _ in enumerate(members(model)):
        buffer = seen[0][i][0]
        for step in seen[1:]:
            buffer = 0.5 * buffer + step[i][0]
        buffers.append(buffer)
    assert last(monitor)["moment_first"] == close(rms(buffers))
    assert "moment_second" not in monitor.to_frame()
    reasons = {one["metric"]: one["reason"] for one in monitor.unavailable}
    for column in ("moment_second", "moment_mismatch"):
        assert reasons[column] == "the optimizer keeps no such moment of the block's parameters"


def test_a_set_beside_the_core_does_not_make_the_core_wider():
    model = Net()
    monitor, _ = train(model, torch.optim.SGD(model.parameters(), 0.1))
    assert monitor.to_frame()["update_ratio"].isna().all()
    assert monitor.to_frame()["update_size"].notna().all()


def slow_extremes(x):
    """Of a tensor (..., C), by loops."""
    rows = x.reshape(-1, x.shape[-1]).tolist()
    sizes = [
        math.sqrt(math.fsum(value**2 for value in column) / len(rows))
        for column in zip(*rows, strict=True)
    ]
    fourth, second = (sum(s**power for s in sizes) / len(sizes) for power in (4, 2))
    middle = sorted(sizes)[(len(sizes) - 1) // 2]
    return {
        "largest": max(abs(value) for row in rows for value in row),
        "kurtosis": fourth / second**2,
        "outliers": sum(s > 6 * middle for s in sizes),
    }


def test_extremes_are_those_of_the_first_samples():
    torch.manual_seed(0)
    model, (x, y) = Net(), data(6)
    with torch.no_grad():
        model.blocks[1].layer.bias[2] = 40.0
    kept = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, i, o: kept.append((o - i[0], i[0], o)))
    with attach(model, metrics={"extremes": 1}, samples=4) as monitor:
        F.cross_entropy(model(x), y).backward()
        monitor.step()
    frame = monitor.to_frame()
    for block, tensors in enumerate(kept):
        for site, tensor in zip(EXTREME_SITES, tensors, strict=True):
            for name, value in slow_extremes(tensor[:4]).items():
                found = frame[f"{site}_{name}"][block]
                assert found == pytest.approx(value, rel=1e-3, abs=1e-5), (site, name)
    assert frame["output_outliers"].tolist() == [0, 1]


def test_kurtosis_is_1_of_equal_channels_and_their_number_where_one_has_everything():
    x = torch.ones(5, 8)
    assert extremes(x, 1)["kurtosis"].item() == pytest.approx(1)
    x[:, 1:] = 0
    assert extremes(x, 1)["kurtosis"].item() == pytest.approx(8)


def test_channels_of_images_lie_in_dimension_1():
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    twin = slow_extremes(x.movedim(1, -1))
    found = {name: value.item() for name, value in extremes(x, 1).items()}
    assert found == pytest.approx(twin, rel=1e-6)


def test_the_head_has_the_z_of_its_logits():
    model, (x, y) = Net(), data()
    z = model(x)
    with attach(model, metrics={"extremes": 1}) as monitor:
        F.cross_entropy(model(x), y).backward()
        monitor.step()
    sums = [math.log(math.fsum(map(math.exp, row))) ** 2 for row in z.tolist()]
    curve = monitor.to_frame("step")
    assert curve["head_z"][0] == close(math.sqrt(sum(sums) / len(sums)))
    assert curve["head_logit"][0] == close(z.abs().max().item())


def test_a_later_step_read_by_hooks_has_the_numbers_of_a_traced_one():
    frames = []
    for trace in ("first", "always"):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        monitor, _ = train(model, optimizer, 3, {"extremes": 1}, trace=trace)
        names = [f"{site}_{n}" for site in EXTREME_SITES for n in ("largest", "outliers")]
        frames.append(monitor.to_frame()[names])
    assert frames[0].equals(frames[1])
    assert frames[0].notna().all(axis=None)
