"""Activation checkpointing, both kinds: the numbers of the same training without it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_nets import Block, Net, data, sgd
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from resdiag.watch.loop.attach import attach
from resdiag.watch.record.backward import NO_BACKWARD


class Checkpointed(Net):
    """Each block by itself."""

    reentrant = True

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


class Segments(Net):
    """Both blocks in one checkpoint: the second block's input is no tensor of the outer graph."""

    def forward(self, x):
        blocks = list(self.blocks)
        return self.head(checkpoint_sequential(blocks, 1, self.stem(x), use_reentrant=True))


class Nested(Net):
    """A module of two blocks in a checkpoint, and the second one in a checkpoint of its own."""

    def __init__(self):
        super().__init__()
        self.pair = Pair(self.blocks)

    def forward(self, x):
        return self.head(checkpoint(self.pair, self.stem(x), use_reentrant=True))


class Pair(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        return checkpoint(self.blocks[1], self.blocks[0](x), use_reentrant=True)


class PairNet(Nested):
    def forward(self, x):
        return self.head(self.pair.blocks[1](self.pair.blocks[0](self.stem(x))))


class Rectified(nn.Module):
    """relu(W x + f(x)) with in-place activations and a projection."""

    def __init__(self, *, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(3, 6), nn.Linear(6, 4)
        self.blocks = nn.ModuleList(Projected() for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True) if self.reentrant else block(x)
        return self.head(x)


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6))
        self.shortcut = nn.Linear(6, 6)

    def forward(self, x):
        out = self.branch(x)
        out += self.shortcut(x)
        return F.relu_(out)


def train(model, steps=3, **options):
    optimizer = sgd(model)
    with attach(model, optimizer=optimizer, **options) as monitor:
        for step in range(steps):
            x, y = data(seed=step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            monitor.step()
    return monitor


def assert_same(seen, wanted):
    for per in ("block", "step"):
        a, b = (monitor.to_frame(per).drop(columns="point") for monitor in (seen, wanted))
        # gradients are added up in another order where a tensor is used in two graphs
        np.testing.assert_allclose(a.to_numpy(float), b.to_numpy(float), rtol=1e-5, atol=1e-9)
    assert seen.blocks == wanted.blocks
    assert seen.unavailable == wanted.unavailable
    assert seen.warnings == wanted.warnings == []


@pytest.mark.parametrize("metrics", ["full", "core"])
def test_a_block_that_runs_again_is_counted_once(metrics):
    assert_same(train(Checkpointed(), metrics=metrics), train(Net(), metrics=metrics))


def test_several_blocks_in_one_checkpoint():
    assert_same(train(Segments()), train(Net()))


def test_a_checkpoint_inside_a_checkpoint():
    assert_same(train(Nested()), train(PairNet()))


def test_projections_and_in_place_operations_that_run_again():
    assert_same(train(Rectified(reentrant=True)), train(Rectified(reentrant=False)))


def test_checkpointing_is_watched_without_a_trace_in_the_training():
    ends = []
    for watched in (False, True):
        model = Checkpointed()
        optimizer = sgd(model)
        monitor = attach(model, optimizer=optimizer) if watched else None
        for step in range(3):
            x, y = data(seed=step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if monitor is not None:
                monitor.step()
        ends.append(list(model.parameters()))
    assert all(map(torch.equal, *ends))


def test_a_checkpointed_whole_model_is_recorded_where_it_runs_again():
    model, twin = Net(), Net()
    optimizer = sgd(model)
    with attach(model, optimizer=optimizer) as monitor:
        for step in range(3):
            x, y = data(seed=step)
            optimizer.zero_grad()
            x.requires_grad_()
            F.cross_entropy(checkpoint(model, x, use_reentrant=True), y).backward()
            optimizer.step()
            monitor.step()
    assert_same(monitor, train(twin))


class Shared(Net):
    """One block called twice, each call in a checkpoint."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def forward(self, x):
        x = self.stem(x)
        for _ in range(2):
            x = checkpoint(self.blocks[0], x, use_reentrant=True)
        return self.head(x)


class Anonymous(Net):
    """What is in the checkpoint is no module."""

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(lambda x, block=block: x + F.elu(block.layer(x)), x, use_reentrant=True)
        return self.head(x)


@pytest.mark.filterwarnings("ignore::resdiag.watch.base.safety.WatchWarning")
@pytest.mark.parametrize("kind", [Shared, Anonymous])
def test_what_cannot_be_told_when_it_runs_again_is_nan_with_the_reason(kind):
    monitor = train(kind())
    frame = monitor.to_frame()
    assert len(monitor.blocks) == 2
    assert frame.grad_sum.isna().all()
    assert frame[["sum_mean", "branch_mean", "grad_param"]].notna().all(axis=None)
    entry = next(entry for entry in monitor.unavailable if entry["metric"] == "grad_sum")
    assert entry == {"metric": "grad_sum", "blocks": [0, 1], "reason": NO_BACKWARD}
