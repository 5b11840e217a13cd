"""A pass read at the places of a plan has the numbers of a traced one, or says that it has not."""

import copy
import gc
import threading
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import REAL, build, loss_of

from resdiag.models.resnet import build_model
from resdiag.watch.loop.attach import attach
from resdiag.watch.record import hooks

PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # shrinking trains for minutes
WARNING = "ignore::resdiag.watch.base.safety.WatchWarning"


def record(model, passes, *, before=lambda model, step: None, **options):
    """Columns of a few passes, the monitor, and the weights after them."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(9)
    with attach(model, optimizer=optimizer, **options) as monitor:
        for step, loss in enumerate(passes):
            before(model, step)
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
            monitor.step()
    return monitor.drain(), monitor, [p.detach().clone() for p in model.parameters()]


def assert_same(planned, traced):
    """Equal to the last bit, with the same numbers missing."""
    for left, right in zip(planned[0], traced[0], strict=True):
        assert list(left) == list(right)
        for name in left:
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)
    for one, other in zip(planned[2], traced[2], strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def assert_right_or_missing(planned, traced):
    """Every number is the traced pass's, or it is not there; weights and gradients' norms are."""
    always = {"step", "block", "lr", "grad_norm", "grad_param", "momentum", "weight_decay"}
    for left, right in zip(planned[0], traced[0], strict=True):
        for name in left:
            a, b = left[name].astype(float), right[name].astype(float)
            known = np.full(len(a), True) if name in always else ~np.isnan(a)
            np.testing.assert_array_equal(a[known], b[known], err_msg=name)
    for one, other in zip(planned[2], traced[2], strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def both(model, passes, **options):
    planned = record(model, passes, **options)
    assert_same(planned, record(model, passes, trace="always", **options))
    return planned[1]


def square(x):
    return lambda model: model(x).square().mean()


@pytest.mark.filterwarnings(WARNING)
@pytest.mark.parametrize("metrics", ["core", "full"])
@pytest.mark.parametrize("name", REAL)
def test_real_models_have_the_numbers_of_passes_that_are_traced(name, metrics):
    model, inputs = build(name)
    passes = [lambda m: loss_of(m, inputs)] * 3
    monitor = both(model, passes, blocks=REAL[name][3], metrics=metrics)
    assert monitor.passes_read == 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("metrics", ["core", "full"])
@pytest.mark.parametrize(
    "variant", ["original", "elu", "elu_pre", "relu_pre", "elu_after", "plain"]
)
def test_variants_have_the_numbers_of_passes_that_are_traced(variant, metrics, layout):
    model = build_model(variant, 8, seed=0).to(memory_format=layout)
    monitor = both(model, [square(torch.randn(4, 3, 16, 16))] * 3, metrics=metrics)
    assert monitor.passes_read == 2


def test_batches_and_images_of_other_sizes_are_the_same_pass():
    sizes = [(4, 16), (4, 16), (3, 16), (4, 24), (1, 16)]
    passes = [square(torch.randn(n, 3, size, size)) for n, size in sizes]
    assert both(build_model("original", 8, seed=0), passes).passes_read == 4


def test_estimates_from_some_samples_are_the_same():
    passes = [square(torch.randn(6, 3, 16, 16))] * 3
    assert both(build_model("elu_after", 8, seed=0), passes, moment_samples=3).passes_read == 2


# -- passes that are not like the one that was traced --------------------------------------------


class Branch(nn.Sequential):
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

    def forward(self, x, before):
        if self.do == "skip":
            return x
        if self.do == "fail":
            raise ArithmeticError
        source = before if self.do == "other input" else x
        f = self.two if self.do == "other weight" else self.one
        with torch.no_grad() if self.do == "no gradient" else nullcontext():
            f = checkpoint(f, source, use_reentrant=False) if self.do == "checkpoint" else f(source)
        if self.do == "branch scaled":
            f = f * 2
        if self.do == "activated":
            f = F.elu(f)
        if self.do == "detached":
            f = f.detach()
        if self.do == "twice":
            x = x + self.two(x)
        if self.do == "swapped":
            y = f + x
        elif self.do == "in place":
            y = f.clone().add_(x)
        else:
            y = torch.add(x, f, alpha=0.5 if self.do == "scaled" else 1)
        if self.do == "overwritten":
            return F.leaky_relu(y).mul_(2)
        if self.do == "more":
            y = y + 1e-3 * torch.sin(x)
        return y if self.do == "no after" else F.leaky_relu(y, 0.3 if self.do == "steep" else 0.01)


DO = (
    *("plain", "skip", "fail", "other input", "other weight", "no gradient", "checkpoint"),
    *("branch scaled", "activated", "detached", "twice", "swapped", "in place", "scaled"),
    *("overwritten", "more", "no after", "steep", "frozen"),
)


class Net(nn.Module):
    """Units that are told what to do, in an order, with an early exit, on a stem with gradients."""

    def __init__(self, units=3, *, frozen=False):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)
        self.units = nn.ModuleList(Unit() for _ in range(units))
        self.order, self.exit = list(range(units)), units
        if frozen:
            self.enter.requires_grad_(False)
            self.units[0].requires_grad_(False)

    def tell(self, orders):
        for unit, order in zip(self.units, orders, strict=True):
            unit.do = order
            unit.one[1].train(order != "frozen")

    def forward(self, x):
        x = before = self.enter(x)
        for index in self.order[: self.exit]:
            try:
                before, x = x, self.units[index](x, before)
            except ArithmeticError:
                x = x * 2
        return self.leave(x.mean((2, 3)))


def data(n=6, size=6):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 3, size, size, generator=generator)


def classify(model):
    return F.cross_entropy(model(data()), torch.arange(6) % 5)


@pytest.mark.filterwarnings(WARNING)
@pytest.mark.parametrize("metrics", ["core", "full"])
@pytest.mark.parametrize("order", DO[1:])
def test_a_pass_that_differs_is_missed_where_it_does_and_the_next_one_is_traced(order, metrics):
    def turn(model, step):
        model.tell(["plain", order if step >= 3 else "plain", "plain"])

    options = {"before": turn, "metrics": metrics}
    model = Net()
    planned = record(model, [classify] * 6, **options)
    traced = record(model, [classify] * 6, trace="always", **options)
    assert_right_or_missing(planned, traced)
    columns, twin = planned[0][0], traced[0][0]
    for name in columns:  # all but step 3 are whole
        keep = columns["step"] != 3
        np.testing.assert_array_equal(columns[name][keep], twin[name][keep], err_msg=name)
    changed = (columns["step"] == 3) & (columns["block"] == 1)
    harmless = ("other weight", "checkpoint", "in place", "frozen")
    if order in ("swapped", "other weight", "no after", "steep", "scaled", "branch scaled", "more"):
        assert np.isnan(columns["output_mean"][changed]).all()
        assert any("was not like the one" in text for text in planned[1].warnings)
    elif order not in harmless:
        assert planned[1].warnings


SCRIPTS = (
    st.lists(
        st.tuples(
            st.tuples(*[st.sampled_from(DO)] * 3),
            st.permutations(range(3)),
            st.integers(0, 3),
        ),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
    st.sampled_from(["core", "full"]),
)
"""What each unit does in each pass, in which order they run and how many; frozen; metrics."""


def assert_passes_are_right_or_missing(script, frozen, metrics):
    # the first unit's branch has no gradient then, and nothing shows which tensor it was given
    assume(not (frozen and any(orders[0] == "other input" for orders, _, _ in script)))
    torch.manual_seed(2)
    model = Net(frozen=frozen)

    def turn(net, step):
        orders, net.order, net.exit = (
            script[step - 2] if step >= 2 else (("plain",) * 3, [0, 1, 2], 3)
        )
        net.tell(orders)

    options = {"before": turn, "metrics": metrics}
    passes = [classify] * (len(script) + 2)
    assert_right_or_missing(
        record(model, passes, **options), record(model, passes, trace="always", **options)
    )


@pytest.mark.filterwarnings(WARNING)
@settings(max_examples=20, deadline=None, phases=PHASES)
@given(*SCRIPTS)
@example(  # what follows a block's sum became an after-add
    [
        (("plain",) * 3, [0, 1, 2], 0),
        (("plain", "plain", "more"), [2, 0, 1], 1),
        (("plain", "plain", "steep"), [2, 0, 1], 1),
    ],
    False,
    "core",
)
@example(  # in another order, a block that was missed lies before one that was not
    [
        (("plain", "branch scaled", "more"), [2, 1, 0], 3),
        (("plain", "branch scaled", "more"), [2, 1, 0], 3),
        (("plain", "swapped", "plain"), [2, 1, 0], 3),
    ],
    False,
    "full",
)
@example(  # no gradient leads to the tensor that the branch is given
    [(("plain", "other input", "plain"), [0, 1, 2], 3)], True, "full"
)
def test_whatever_passes_do_a_number_is_right_or_missing(script, frozen, metrics):
    assert_passes_are_right_or_missing(script, frozen, metrics)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings(WARNING)
@settings(max_examples=1000, deadline=None, phases=(Phase.generate,))
@given(*SCRIPTS)
def test_whatever_a_thousand_scripts_do_a_number_is_right_or_missing(script, frozen, metrics):
    assert_passes_are_right_or_missing([one for one in script for _ in range(2)], frozen, metrics)


@pytest.mark.filterwarnings(WARNING)
def test_a_model_that_never_repeats_itself_is_soon_traced_always():
    def turn(model, step):
        model.tell(["scaled" if step % 2 else "plain"] * 3)

    model = Net()
    planned = record(model, [classify] * 12, before=turn)
    traced = record(model, [classify] * 12, before=turn, trace="always")
    last = planned[0][0]["step"] >= 8
    for name, values in planned[0][0].items():
        np.testing.assert_array_equal(values[last], traced[0][0][name][last], err_msg=name)


@pytest.mark.parametrize("metrics", ["core", "full"])
def test_a_frozen_prefix_is_read_too(metrics):
    assert both(Net(frozen=True), [classify] * 4, metrics=metrics).passes_read == 3


@pytest.mark.parametrize("metrics", ["core", "full"])
def test_reentrant_checkpointing_is_traced(metrics):
    class Checkpointed(Net):
        def forward(self, x):
            x = self.enter(x)
            for unit in self.units:
                x = checkpoint(unit, x, x, use_reentrant=True)
            return self.leave(x.mean((2, 3)))

    monitor = both(Checkpointed(), [classify] * 4, metrics=metrics)
    assert monitor.trace_reason == "a part runs without gradients, and again with them"


@pytest.mark.parametrize("metrics", ["core", "full"])
def test_what_a_checkpoint_keeps_is_not_asked_for(metrics):
    model = Net()
    for unit in model.units:
        unit.do = "checkpoint"

    def runs(watched):
        net = copy.deepcopy(model)
        with attach(net, metrics=metrics) if watched else nullcontext() as monitor:
            for _ in range(4):
                classify(net).backward()
                if monitor:
                    monitor.step()
        return [unit.one.runs for unit in net.units]

    assert runs(watched=True) == runs(watched=False) == [8, 8, 8]


@pytest.mark.filterwarnings(WARNING)
@pytest.mark.parametrize("size", [1e12, 1e22, 1e36, float("inf"), float("nan")])
def test_activations_that_explode_later_look_as_they_do_when_traced(size):
    def explode(model, step):
        if step == 2:
            model.units[1].one[1].weight.data.fill_(size)

    net = Net()
    planned, traced = (
        record(net, [classify] * 4, before=explode, trace=trace) for trace in ("first", "always")
    )
    assert planned[1].passes_read == 3
    # a branch whose variance overflows may be freed by the time that this is found out
    assert_right_or_missing(planned, traced)


@pytest.mark.filterwarnings(WARNING)
def test_after_a_pass_that_failed_half_way_the_next_one_is_read_whole():
    model = Net()
    frames = []
    for fails in (True, False):
        net = copy.deepcopy(model)
        with attach(net) as monitor:
            for step in range(4):
                net.zero_grad()
                if fails and step == 3:
                    with pytest.raises(RuntimeError):
                        net(data()[:, :, :, None])
                classify(net).backward()
                monitor.step()
            assert monitor.passes_read == 3
        frames.append(monitor.drain()[0])
    for name in frames[0]:
        np.testing.assert_array_equal(frames[0][name], frames[1][name], err_msg=name)


class Joined(nn.Module):
    """One block whose operands come together in some way."""

    def __init__(self, join):
        super().__init__()
        self.branch, self.join = nn.Linear(6, 6), join

    def forward(self, x):
        return self.join(self, x)


def _highway(net, x):
    gate = torch.sigmoid(net.branch(x))
    return gate * torch.tanh(net.branch(x)) + (1 - gate) * x


def _clamped(net, x):
    return torch.clamp(x + net.branch(x), min=x.detach() - 1)


def _stacked(net, x):
    f = net.branch(x).exp()
    return torch.stack([x, f]).sum(0)


ALWAYS_TRACED = {
    "a gate is on the shortcut of block ": _highway,
    "takes another tensor of the pass": _clamped,
    "nothing shows the operands": _stacked,
    "has parallel branches, whose sum": lambda net, x: x + net.branch(x) + net.branch(x.sin()),
}


@pytest.mark.parametrize("reason", ALWAYS_TRACED)
def test_what_no_hook_can_show_again_is_traced_and_why_is_said(reason):
    model = nn.Sequential(nn.Linear(3, 6), Joined(ALWAYS_TRACED[reason]), nn.Linear(6, 5))
    monitor = both(model, [square(torch.randn(4, 3))] * 3)
    assert reason in monitor.trace_reason
    assert monitor.passes_read == 0


@pytest.mark.filterwarnings(WARNING)
def test_passes_without_a_block_or_with_a_failure_are_traced():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.gain * x

    monitor = record(Scaled(), [square(torch.randn(4, 3))] * 2)[1]
    assert monitor.trace_reason == "no block was found"
    net = Net()
    net.tell(["plain", "fail", "plain"])
    assert both(net, [classify] * 3).trace_reason == "an exception ended a module's forward"


@pytest.mark.filterwarnings(WARNING)
def test_the_input_after_a_block_that_was_missed_is_read_with_its_gradient():
    def turn(model, step):
        model.tell(["plain", "branch scaled" if step == 2 else "plain", "plain"])

    model = Net()
    planned = record(model, [classify] * 3, before=turn)[0][0]
    traced = record(model, [classify] * 3, before=turn, trace="always")[0][0]
    missed, after = 7, 8  # rows of step 2
    assert np.isnan(planned["output_mean"][missed])
    for name in ("input_mean", "input_channel_std", "grad_input", "shortcut_share", "grad_output"):
        assert planned[name][after] == traced[name][after], name


def test_no_tensor_of_a_pass_stays_alive():
    model, seen = Net(), []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
    gc.disable()
    try:
        with attach(model) as monitor:
            for _ in range(4):
                classify(model).backward()
                monitor.step()
                assert [reference for reference in seen if reference() is not None] == []
            assert monitor.passes_read == 3
    finally:
        gc.enable()


def test_between_recorded_passes_only_the_root_has_hooks():
    model = Net()
    with attach(model) as monitor:
        for _ in range(3):
            classify(model).backward()
            monitor.step()
            inner = [m for m in model.modules() if m is not model]
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in inner)


@pytest.mark.filterwarnings(WARNING)
def test_a_mistake_in_a_hook_ends_the_watching_and_not_the_training(monkeypatch):
    def fail(*args):
        raise KeyError("mistake")

    model = Net()
    with attach(model) as monitor:
        for step in range(3):
            if step == 1:  # the first pass is traced, the second read by hooks
                monkeypatch.setattr(hooks.PassGraph, "see", fail)
            classify(model).backward()
            monitor.step()
    assert any("watching stopped at step 1" in text for text in monitor.warnings)
    assert monitor.drain()[0]["step"].max() == 1


@pytest.mark.filterwarnings(WARNING)
def test_two_threads_may_run_one_watched_model():
    """The pass of one is followed, the other one's runs as if nobody watched."""
    model = Net().eval()
    failed = []

    def evaluate():
        try:
            for _ in range(20):
                with torch.no_grad():
                    model(data())
        except Exception as error:
            failed.append(error)

    with attach(model, every=1) as monitor:
        model.train()
        for _ in range(3):
            threads = [threading.Thread(target=evaluate) for _ in range(2)]
            for thread in threads:
                thread.start()
            classify(model).backward()
            monitor.step()
            for thread in threads:
                thread.join()
    assert failed == []
