"""A pass recognised as a repetition gives the numbers that following it in full gives."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_zoo_runs import REAL, build, loss_of
from torch import nn

from resdiag.models.resnet import build_model
from resdiag.watch.monitor import attach


def record(model, passes, *, repeating, **options):
    """Columns of a few recorded passes, notes, and how many passes were recognised."""
    model = copy.deepcopy(model)
    torch.manual_seed(9)
    with attach(model, **options) as monitor:
        memory = monitor._tracer._memory
        memory.can_learn = memory.can_learn and repeating
        monitor._recorder.lookback = None  # would not listen: see test_hindsight.py
        for loss in passes:
            model.zero_grad()
            loss(model).backward()
            monitor.step()
        columns = monitor.drain()
        return columns, monitor.warnings, monitor.unavailable, memory._repeats


def assert_same(repeated, followed):
    for left, right in zip(repeated[0], followed[0], strict=True):
        assert list(left) == list(right)
        for name in left:
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)
    assert repeated[1:3] == followed[1:3]


@pytest.mark.filterwarnings("ignore::resdiag.watch.monitor.WatchWarning")
@pytest.mark.parametrize("name", REAL)
def test_real_models_have_the_numbers_of_passes_that_are_followed(name):
    model, inputs = build(name)
    passes = [lambda m: loss_of(m, inputs)] * 4
    repeated = record(model, passes, repeating=True, blocks=REAL[name][3])
    assert_same(repeated, record(model, passes, repeating=False, blocks=REAL[name][3]))
    # stochastic depth draws a scale, but its calls are the same; followed in full are named units,
    # and swin, which assigns to parts of its masks
    assert repeated[3] == (0 if REAL[name][3] or name == "swin" else 3)


@pytest.mark.parametrize("metrics", ["core", "full"])
@pytest.mark.parametrize("variant", ["original", "elu", "elu_pre", "relu_pre", "elu_after"])
def test_variants_have_the_numbers_of_passes_that_are_followed(variant, metrics):
    model, x = build_model(variant, 8, seed=0), torch.randn(4, 3, 16, 16)
    passes = [lambda m: m(x).square().mean()] * 3
    repeated = record(model, passes, repeating=True, metrics=metrics)
    assert_same(repeated, record(model, passes, repeating=False, metrics=metrics))
    assert repeated[3] == 2


class Unit(nn.Module):
    """A residual unit whose forward pass is told what to do."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.do = "plain"

    def forward(self, x, before):
        if self.do == "skip":
            return x
        if self.do == "fail":
            raise ArithmeticError
        source = before if self.do == "other input" else x
        f = (self.two if self.do == "other weight" else self.one)(source)
        f = torch.cat([p * 2 for p in f.split(2 if self.do == "thirds" else 3, 1)], 1)
        if self.do == "twice":
            x = x + self.two(x)
        if self.do == "in place":
            y = f.clone().add_(x)
        elif self.do == "swapped":
            y = f + x
        else:
            y = torch.add(x, f, alpha=0.5 if self.do == "scaled" else 1.0)
        if self.do == "normalised":
            return self.norm(y)
        if self.do == "sum out":
            y.relu()
            return y
        return y if self.do == "no after" else F.relu(y, inplace=self.do == "in-place relu")


DO = (
    "plain",
    "skip",
    "fail",
    "other input",
    "other weight",
    "thirds",
    "twice",
    "in place",
    "swapped",
    "scaled",
    "normalised",
    "sum out",
    "no after",
    "in-place relu",
)


class Told(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 6), nn.Linear(6, 2)
        self.units = nn.ModuleList(Unit() for _ in range(3))

    def forward(self, x):
        x = before = self.enter(x)
        for unit in self.units:
            try:
                before, x = x, unit(x, before)
            except ArithmeticError:
                x = x * 2
        return self.leave(x)


def told(orders, rows):
    """A pass in which each unit does what it is told."""

    def loss(model):
        for unit, order in zip(model.units, orders, strict=True):
            unit.do = order
        return model(torch.linspace(-1, 2, rows * 5).view(rows, 5)).square().mean()

    return loss


def compare(passes):
    torch.manual_seed(3)
    model = Told()
    repeated = record(model, passes, repeating=True)
    assert_same(repeated, record(model, passes, repeating=False))
    return repeated[3]


@pytest.mark.filterwarnings("ignore::resdiag.watch.monitor.WatchWarning")
@pytest.mark.parametrize("unit", [1, 2])
@pytest.mark.parametrize("order", DO[1:])
def test_a_pass_that_differs_is_followed_from_where_it_differs(order, unit):
    usual = ["plain"] * 3
    other = [order if i == unit else "plain" for i in range(3)]
    passes = [told(usual, 4), told(usual, 4), told(other, 4), told(other, 4), told(usual, 4)]
    assert compare(passes) == 1  # pass 2 repeats pass 1; then 3 differs, 4 is learned, 5 differs


@pytest.mark.filterwarnings("ignore::resdiag.watch.monitor.WatchWarning")
@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from(DO)] * 3, st.integers(1, 4)), min_size=2, max_size=5))
def test_whatever_passes_do_the_numbers_are_those_of_passes_that_are_followed(script):
    compare([told(("plain", "plain", "plain"), 3), *(told(s[:3], s[3]) for s in script)])


def test_a_model_that_never_repeats_itself_is_soon_followed_without_learning():
    alternating = [told([DO[3 + i % 2 * 5], "plain", "plain"], 4) for i in range(12)]
    torch.manual_seed(3)
    with attach(model := Told()) as monitor:
        for loss in alternating:
            loss(model).backward()
            monitor.step()
        assert not monitor._tracer._memory.can_learn


def test_what_is_learned_of_a_pass_keeps_none_of_its_tensors_alive():
    model, seen = build_model("original", 8, seed=0), []

    def keep(module, args, output):
        seen.append(weakref.ref(output))

    for module in model.modules():
        module.register_forward_hook(keep)
    with attach(model) as monitor:
        for _ in range(2):
            model(torch.randn(2, 3, 16, 16)).square().mean().backward()
            monitor.step()
            gc.collect()
            assert monitor._tracer._memory.routine is not None
            assert [reference for reference in seen if reference() is not None] == []
