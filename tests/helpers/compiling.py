"""Comparing what compiled and eager passes recorded."""

import numpy as np
import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from resdiag.catalog.table import LOCAL, RECORDED, RECORDED_PER_STEP


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def assert_same(seen, wanted, missing=(), rtol=1e-4):
    # float64 sums on one side, checked float32 sums on the other: 1e-5 each, more through BatchNorm
    # over the few positions of these inputs
    for per, columns in (("block", RECORDED), ("step", RECORDED_PER_STEP)):
        a, b = seen.to_frame(per), wanted.to_frame(per)
        for column in columns:
            if column in LOCAL:  # the batch is not looked at in a graph
                assert a[column].isna().all(), column
                continue
            if column in missing:
                continue
            np.testing.assert_allclose(
                a[column].to_numpy(float), b[column].to_numpy(float),
                rtol=rtol, atol=1e-6, err_msg=column,
            )  # fmt: skip
