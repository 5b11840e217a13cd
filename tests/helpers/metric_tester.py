"""Every recorded metric against its slow twin, in every way in which a training can run.

After the class of the same name in torchmetrics, which runs each metric plainly, scripted and on
several ranks, and compares with one reference. Here a training is recorded once in each mode, and
every column of it is compared with what `reference.py` makes of the same batches.
"""

import functools

import numpy as np
import reference
import torch
import torch._dynamo
import torch.nn.functional as F
import two_ranks

from resdiag.catalog.table import LOCAL, RECORDED, RECORDED_PER_STEP
from resdiag.models.variants import VARIANTS

NETWORK = "relu_nobn"
"""ReLU after the addition, shortcuts that change shape, no BatchNorm: every column has a number,
and a batch that is spread over ranks gives those of the whole batch."""

MODES = ("eager", "compiled", "ddp", "fsdp")
METRICS = (*RECORDED, *RECORDED_PER_STEP)
REASONS = {
    "eager": None,
    "compiled": "a compiled pass does not show its batch",
    "ddp": "not added up over ranks",
    "fsdp": "not added up over ranks",
}
"""Why a mode has no number for what a batch shows of the data and the labels."""

ELSEWHERE = ("label_copies", "output_loss")
"""Columns of networks that take tokens, or end with an activation; their twins are in
tests/data/test_batch.py."""


class MetricTester:
    """Compares one column of one mode with its twin; what it compares is computed once.

    Args:
        ranks: A function without arguments: what each of two ranks recorded, by case of
            `two_ranks.CASES`.
    """

    def __init__(self, ranks):
        self._ranks = ranks

    @functools.cached_property
    def twins(self):
        """Per step, the columns per block and the columns per step."""
        model = two_ranks.make_model(NETWORK)
        batches = [two_ranks.make_batch(step) for step in range(two_ranks.STEPS)]
        optimizer, after = two_ranks.make_optimizer(model), VARIANTS[NETWORK].after_add
        walked = reference.walk_training(model, optimizer, batches, after, two_ranks.BATCH)
        return list(walked)

    @functools.cached_property
    def eager(self):
        return [two_ranks.one_rank(NETWORK)]

    @functools.cached_property
    def compiled(self):
        torch._dynamo.reset()
        model = two_ranks.make_model(NETWORK)
        call = torch.compile(model, backend="aot_eager", fullgraph=True)

        def loss(step):
            images, labels = two_ranks.make_batch(step)
            F.cross_entropy(call(images), labels).backward()

        return [two_ranks.train(model, loss, example_inputs=(two_ranks.make_batch(0)[0],))]

    @functools.cached_property
    def ddp(self):
        return [rank[NETWORK, "ddp"] for rank in self._ranks()]

    @functools.cached_property
    def fsdp(self):
        return [rank[NETWORK, "fsdp"] for rank in self._ranks()]

    def assert_metric_equals_its_twin(self, metric, mode, *, rtol=1e-6):
        """The column of every rank; where a mode cannot record it, NaN and the reason for it."""
        assert mode in MODES
        for recorded in getattr(self, mode):
            assert recorded["notes"] == []
            reasons = {item["metric"]: item["reason"] for item in recorded["unavailable"]}
            frame = recorded["curve" if metric in RECORDED_PER_STEP else "frame"]
            reason = REASONS[mode] if metric in LOCAL else None
            if reason or metric in ELSEWHERE:
                assert frame[metric].isna().all()
                assert reasons.get(metric) == reason
                continue
            assert metric not in reasons
            assert sorted(set(frame["step"])) == list(range(len(self.twins)))
            for step, (blocks, per_step) in enumerate(self.twins):
                expected = per_step if metric in RECORDED_PER_STEP else blocks
                values = np.asarray(expected.get(metric, np.nan), dtype=float)
                assert np.isfinite(values).all(), f"{metric} has no twin in reference.py"
                rows = frame[frame["step"] == step]
                reference.assert_column_agrees(metric, rows, expected, rtol=rtol)
