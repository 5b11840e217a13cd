"""Memory that runs out in resdiag ends the recording, never the training; it is said once."""

import inspect
import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import resdiag
from resdiag.models.resnet import build_model
from resdiag.watch.base.safety import is_shortage

STEPS, PLACES = 3, 24
FORWARDS = ("resdiag.watch.find.tracer", "resdiag.watch.record.follow")
"""Modules through which the model's own operations pass while they are traced."""


class ShortOfMemory(TorchDispatchMode):
    """The `fail_at`-th operation that resdiag itself asks for finds no memory."""

    def __init__(self, fail_at):
        super().__init__()
        self.fail_at, self.count, self.failed = fail_at, 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if asked_by_resdiag():
            self.count += 1
            if self.count == self.fail_at:
                self.failed = True
                raise torch.OutOfMemoryError("no memory for resdiag")
        return func(*args, **(kwargs or {}))


def asked_by_resdiag():
    frame = inspect.currentframe().f_back.f_back
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith("resdiag.watch"):
            return name not in FORWARDS
        frame = frame.f_back
    return False


def train(fail_at, **options):
    """Weights after three steps, the monitor, and what was injected."""
    torch.manual_seed(0)
    model = build_model("elu", 8, width=0.25, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monitor = resdiag.attach(model, optimizer, **options)
        with ShortOfMemory(fail_at) as memory:
            for _ in range(STEPS):
                images, labels = torch.randn(4, 3, 16, 16), torch.randint(0, 10, (4,))
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                monitor.step(loss)
        frame = monitor.to_frame()
        monitor.close()
    return model.state_dict(), monitor, memory, frame


@pytest.mark.parametrize("metrics", ["full", "core"])
def test_no_operation_of_resdiag_that_finds_no_memory_ends_the_training(metrics):
    expected, _, memory, _ = train(0, metrics=metrics)
    total = memory.count
    assert total > PLACES
    said = 0
    for place in range(1, total + 1, total // PLACES):
        weights, monitor, memory, frame = train(place, metrics=metrics)
        assert memory.failed
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert monitor.metadata["steps"] == STEPS
        found = [text for text in monitor.warnings if text.startswith("watching stopped")]
        assert len(found) <= 1  # what looks at the model once notes its own errors
        said += len(found)
        assert not found or "no memory for resdiag" in found[0]
        assert set(frame["step"]) <= {*range(STEPS)}
    assert said > PLACES / 2


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate "
                      "memory: you tried to allocate 8 bytes. Error code 12"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (KeyError("out of memory"), False),
    ],
)  # fmt: skip
def test_what_a_shortage_of_memory_is(error, is_one):
    assert is_shortage(error) == is_one
