"""A small residual network, its data, and comparing what was recorded of it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

WIDTH, CLASSES = 6, 4


class Net(nn.Module):
    """Two residual blocks x + elu(W x) between two linear layers."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + F.elu(self.layer(x))


def data(n=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator)
    return x, torch.randint(CLASSES, (n,), generator=generator)


def at(monitor, column, step=0):
    frame = monitor.to_frame()
    return frame[frame.step == step][column].to_list()


close = partial(pytest.approx, rel=1e-5)


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
