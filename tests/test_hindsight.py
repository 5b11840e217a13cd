"""A pass read from its autograd graph has the numbers of one that was listened to."""

import copy
import gc
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18

from resdiag.models.resnet import build_model
from resdiag.watch.lookback import _agree
from resdiag.watch.measure.batchnorm import Gone, kept
from resdiag.watch.monitor import attach
from resdiag.watch.skeleton import walk
from resdiag.watch.sources import Kept, Sources, edge_of

WARNING = "ignore::resdiag.watch.monitor.WatchWarning"


class Branch(nn.Sequential):
    """Ends in a BatchNorm, whose input and statistics stay in the graph."""

    def __init__(self, channels=4):
        convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(channels))
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return super().forward(x)


class Unit(nn.Module):
    """A residual unit whose forward pass is told what to do."""

    def __init__(self):
        super().__init__()
        self.one, self.two = Branch(), Branch()
        self.do = "plain"

    def forward(self, x):
        if self.do == "skip":
            return x
        f = self.two if self.do == "other weight" else self.one
        y = checkpoint(f, x, use_reentrant=False) if self.do == "checkpoint" else f(x)
        if self.do == "swapped":
            y = y + x
        elif self.do == "in place":
            y += x
        else:
            y = torch.add(x, y, alpha=0.5 if self.do == "scaled" else 1)
        if self.do == "overwritten":
            return F.leaky_relu(y).mul_(2)
        return y if self.do == "no after" else F.leaky_relu(y, 0.3 if self.do == "steep" else 0.01)


DO = ("plain", "skip", "other weight", "checkpoint", "swapped", "in place", "scaled")
DO = (*DO, "overwritten", "no after", "steep", "frozen")


class Net(nn.Module):
    def __init__(self, units=3):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)
        self.units = nn.ModuleList(Unit() for _ in range(units))

    def tell(self, orders):
        for unit, order in zip(self.units, orders, strict=True):
            unit.do = order
            unit.one[1].train(order != "frozen")

    def forward(self, x):
        x = self.enter(x)
        for unit in self.units:
            x = unit(x)
        return self.leave(x.mean((2, 3)))


def data(n=8, size=6):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 3, size, size, generator=generator)
    return x, torch.arange(n) % 5


def record(model, steps, *, hindsight=True, before=lambda model, step: None, **options):
    """Frames per block and step, notes, steps read in hindsight, and the trained weights."""
    model, (x, labels) = copy.deepcopy(model), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    looked = []
    with attach(model, optimizer=optimizer, metrics="core", **options) as monitor:
        recorder = monitor._recorder
        recorder.lookback = recorder.lookback if hindsight else None
        for step in range(steps):
            before(model, step)
            optimizer.zero_grad()
            ready = recorder.looks_back and monitor.is_due
            F.cross_entropy(model(x), labels).backward()
            looked += [step] if ready and not recorder.missed else []
            optimizer.step()
            monitor.step()
    weights = [p.detach().clone() for p in model.parameters()]
    return monitor.to_frame(), monitor.to_frame("step"), monitor.warnings, looked, weights


def assert_close(left, right, rtol=2e-5):
    """Frames with the same NaNs, and the same numbers but for float32 sums."""
    assert list(left) == list(right)
    for name in left.columns.drop("point"):
        a, b = left[name].to_numpy(float), right[name].to_numpy(float)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7, err_msg=name)


def both(model, steps=5, **options):
    seen = record(model, steps, **options)
    heard = record(model, steps, hindsight=False, **options)
    for left, right in zip(seen[:2], heard[:2], strict=True):
        assert_close(left, right)
    assert all(map(torch.equal, seen[4], heard[4]))
    return seen


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("variant", ["original", "elu", "elu_after", "no_relu"])
def test_the_third_pass_is_read_from_its_graph(variant, layout):
    model = build_model(variant, 8, width=0.25, seed=1, num_classes=5)
    seen = both(model.to(memory_format=layout))
    assert seen[3] == [2, 3, 4]
    assert seen[2] == []


def test_projections_and_activations_in_place_are_read_too():
    assert both(resnet18(num_classes=5), 3)[3] == [2]


def test_moments_of_some_samples_only_are_the_same_estimate():
    assert both(Net(), moment_samples=3)[3] == [2, 3, 4]


@pytest.mark.parametrize("variant", ["elu_nobn", "elu_pre", "relu_pre", "relu_nobn"])
def test_a_branch_that_ends_in_what_nobody_keeps_is_listened_to(variant):
    seen = both(build_model(variant, 8, width=0.25, seed=1, num_classes=5), 3)
    assert seen[3] == []
    assert seen[0].branch_mean.notna().all()


def test_the_model_trains_as_if_nobody_watched():
    model, (x, labels) = Net(), data()
    alone = copy.deepcopy(model)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(alone(x), labels).backward()
        optimizer.step()
    assert all(map(torch.equal, record(model, 5)[4], alone.parameters()))


# -- passes that are not like the others -------------------------------------------------------


@pytest.mark.filterwarnings(WARNING)
@pytest.mark.parametrize("order", DO[1:])
def test_a_pass_that_differs_is_missed_once_and_the_next_one_is_recorded_instead(order):
    def turn(model, step):
        model.tell(["plain", order if step >= 4 else "plain", "plain"])

    options = {"every": 2, "record_first": 3, "before": turn}
    model = Net()
    per_block, _, notes, looked, weights = record(model, 8, **options)
    heard = record(model, 8, hindsight=False, **options)
    assert all(map(torch.equal, weights, heard[4]))
    assert looked == [2]
    steps = per_block.groupby("step")
    assert list(steps.groups) == [0, 1, 2, 4, 5, 6]
    # the step itself has what the optimizer shows, and says why not more
    assert steps.grad_param.apply(lambda column: column.notna().any()).all()
    missed = per_block[per_block.step == 4]
    assert missed.output_mean.isna().all()
    assert missed.grad_output.isna().all()
    assert [note for note in notes if "step 4" in note and "followed call by call" in note]
    # and later ones have all that they would have had
    again = per_block[per_block.step == 6].reset_index(drop=True)
    assert_same_numbers(again, heard[0][heard[0].step == 6].reset_index(drop=True))
    assert per_block[per_block.step == 5].output_mean.notna().any()


def assert_same_numbers(left, right):
    for name in left.columns.drop("point"):
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.mark.filterwarnings(WARNING)
@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from(DO)] * 2), min_size=1, max_size=5))
def test_whatever_passes_do_a_number_is_right_or_missing(script):
    orders = [("plain", "plain")] * 3 + script
    model = Net(2)
    seen, heard = (
        record(model, len(orders), hindsight=h, before=lambda m, i: m.tell(orders[i]))
        for h in (True, False)
    )
    missed = [int(note.split("step ")[1].split()[0]) for note in seen[2] if "call by call" in note]
    assert len(missed) <= 1
    keep = ~seen[0].step.isin(missed)
    assert_close(seen[0][keep], heard[0][keep])
    assert all(map(torch.equal, seen[4], heard[4]))


@pytest.mark.parametrize("metrics", ["core", "full"])
def test_what_a_checkpoint_keeps_is_not_asked_for(metrics):
    model, (x, labels) = Net(), data()

    def runs(watched):
        net = copy.deepcopy(model)
        with attach(net, metrics=metrics) if watched else nullcontext() as monitor:
            for step in range(5):
                net.tell(["plain", "checkpoint" if step > 2 else "plain", "plain"])
                F.cross_entropy(net(x), labels).backward()
                if monitor:
                    monitor.step()
        return [unit.one.runs for unit in net.units]

    told = pytest.warns(match="call by call") if metrics == "core" else nullcontext()
    with told:
        assert runs(watched=True) == runs(watched=False) == [5, 7, 5]


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_gradients_whose_squares_are_no_float32_are_read_in_full(scale):
    model, (x, labels) = Net(), data()
    frames = []
    for hindsight in (True, False):
        with attach(model, metrics="core") as monitor:
            recorder = monitor._recorder
            recorder.lookback = recorder.lookback if hindsight else None
            for step in range(4):
                model.zero_grad()
                loss = F.cross_entropy(model(x), labels)
                (loss * (scale if step == 3 else 1)).backward()
                monitor.step()
        frames.append(monitor.to_frame())
    assert_close(*frames)
    ratio = frames[0].grad_output[frames[0].step == 3] / scale
    before = frames[0].grad_output[frames[0].step == 2]
    np.testing.assert_allclose(ratio, before, rtol=1e-4)


@pytest.mark.filterwarnings(WARNING)
@pytest.mark.parametrize("size", [1e12, 1e22, 1e36, float("inf"), float("nan")])
def test_activations_that_explode_after_learning_look_as_they_do_when_heard(size):
    def explode(model, step):
        if step == 3:
            model.units[1].one[1].weight.data.fill_(size)

    model = Net()
    seen, heard = (record(model, 5, hindsight=h, before=explode) for h in (True, False))
    assert seen[3] == [2, 3, 4]
    for name in seen[0].columns.drop("point"):
        a, b = (frame[name].to_numpy(float) for frame in (seen[0], heard[0]))
        # a branch whose variance overflows was freed by the time that a listener finds out
        known = ~np.isnan(b) if name.startswith("branch") else np.full(len(b), True)
        np.testing.assert_allclose(a[known], b[known], rtol=2e-5, atol=1e-7, err_msg=name)


@pytest.mark.filterwarnings(WARNING)
def test_a_second_backward_pass_replaces_the_first_and_is_told():
    model, (x, labels) = Net(), data()
    with attach(model, metrics="core") as monitor:
        for step in range(4):
            loss = F.cross_entropy(model(x), labels)
            if step == 3:
                loss.backward(retain_graph=True)
            (loss * (3 if step == 3 else 1)).backward()
            monitor.step()
    frame = monitor.to_frame()
    once, thrice = (frame.grad_output[frame.step == step].to_numpy() for step in (2, 3))
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-4)
    assert any("several backward passes" in note for note in monitor.warnings)


def test_a_backward_pass_of_an_earlier_step_is_not_taken_for_one_of_this():
    model, (x, labels) = Net(), data()
    with attach(model, metrics="core") as monitor:
        for _ in range(3):
            loss = F.cross_entropy(model(x), labels)
            loss.backward(retain_graph=True)
            monitor.step()
        model(x)
        (loss * 100).backward()  # of step 2
        monitor.step()
    frame = monitor.to_frame()
    assert frame.grad_output[frame.step == 3].isna().all()
    assert frame.output_mean[frame.step == 3].notna().all()


def test_after_a_pass_that_failed_half_way_the_next_one_is_read_whole():
    model, (x, labels) = Net(), data()
    twin = copy.deepcopy(model)
    frames = []
    for net, fails in ((model, True), (twin, False)):
        with attach(net, metrics="core") as monitor:
            for step in range(4):
                net.zero_grad()
                if fails and step == 3:
                    with pytest.raises(RuntimeError):
                        net(x[:, :, :, None])
                F.cross_entropy(net(x), labels).backward()
                monitor.step()
            assert monitor._recorder.looks_back
        frames.append(monitor.to_frame())
    assert_close(*frames)


def test_no_tensor_and_no_node_of_a_pass_stays_alive():
    model, (x, labels) = Net(), data()
    seen = []
    for unit in model.units:
        unit.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
    gc.disable()
    try:
        with attach(model, metrics="core") as monitor:
            for _ in range(4):
                F.cross_entropy(model(x), labels).backward()
                monitor.step()
                assert [reference for reference in seen if reference() is not None] == []
            assert monitor._recorder.looks_back
    finally:
        gc.enable()


# -- sources -----------------------------------------------------------------------------------


def test_every_source_gives_the_tensor_that_was_there():
    torch.manual_seed(0)
    x, layer, branch = torch.randn(6, 4, 5, 5), nn.Conv2d(4, 4, 1), Branch()
    h = layer(x)
    f = branch(F.relu(h))
    u = h + f
    y = F.elu(u)
    out = y.square().sum() + (f * 3).sum()
    nodes, _ = walk([out])
    sources = Sources(nodes)
    for tensor in (f, u, y, F.relu(h)):
        source = sources.find(edge_of(tensor))
        if tensor.grad_fn in nodes:
            assert torch.allclose(source.tensor(nodes), tensor, rtol=1e-5, atol=1e-6)
            assert torch.equal(source.tensor(nodes, 2), source.tensor(nodes)[:2])
        else:
            assert source is None
    assert sources.find(edge_of(x)) is None


def test_what_was_overwritten_is_gone():
    x = torch.ones(3, requires_grad=True)
    y = (x * 2).relu()
    assert torch.equal(kept(y.grad_fn, "result"), y)
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(Gone, match="version"):
        kept(y.grad_fn, "result")
    with pytest.raises(Gone):
        kept(y.grad_fn, "no_such_thing")


def test_a_graph_that_shows_other_numbers_than_were_heard_is_not_believed(monkeypatch):
    right = Kept.tensor
    monkeypatch.setattr(Kept, "tensor", lambda *args: right(*args) * 1.01)
    seen = record(Net(), 4)
    assert seen[3] == []
    assert seen[2] == []


def test_two_readings_agree_where_only_their_sums_round_apart():
    heard = np.array([[1.0, -2e-7, np.nan], [np.inf, 1e8, 3.0]])

    def agrees(*change):
        return _agree(heard, np.add(heard, np.reshape(change, (2, 3))))

    assert agrees(1e-6, 1e-7, 0, 0, 1.0, 1.0)
    assert not agrees(0, 1e-3, 0, 0, 0, 0)
    assert not agrees(0, 0, 0, 0, 1e7, 0)
    assert not _agree(heard, np.where(np.isnan(heard), 0.0, heard))
