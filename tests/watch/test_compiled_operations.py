"""Additions and activations that are no modules, under torch.compile: measured, or NaN and why."""

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from compiling import _fresh_compiler, assert_same, sgd  # noqa: F401
from torch import nn
from torch._dynamo.utils import counters

from resdiag.catalog.table import RECORDED
from resdiag.watch.loop.attach import attach
from resdiag.watch.record.collect import CHANGED, INSIDE, UNREACHED
from resdiag.watch.record.graph_placement import HIDDEN

WIDTH = 16


class Functional(nn.Module):
    """Three residual additions, three spellings and all activations in one forward."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(12, WIDTH), nn.Linear(WIDTH, 10)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        x = x + F.elu(self.layers[0](x))
        x = F.relu(x + self.layers[1](F.relu(x)))
        x = torch.add(x, F.gelu(self.layers[2](x)), alpha=0.5)
        return self.head(x if x.dim() == 2 else x.mean((1, 2)))


class CifarBlock(nn.Module):
    """The block of most CIFAR ResNets in the wild: `out += shortcut(x)`, then F.relu."""

    def __init__(self, width, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1:
            conv = nn.Conv2d(width, out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class CifarNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(16, 10)
        self.layers = nn.Sequential(
            CifarBlock(8, 8, 1), CifarBlock(8, 16, 2), CifarBlock(16, 16, 1)
        )

    def forward(self, x):
        x = self.layers(F.relu(self.stem(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Statement(nn.Module):
    """`y.add_(f)` as a statement; `twice` uses y again, beside the normalisation."""

    def __init__(self, *, twice=False):
        super().__init__()
        self.stem, self.layer = nn.Linear(12, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head, self.twice = nn.Linear(WIDTH, 10), twice

    def forward(self, x):
        x = self.stem(x)
        y = x.clone()
        y.add_(F.elu(self.layer(x)))
        z = F.layer_norm(y, (WIDTH,))
        return self.head(z * y if self.twice else z)


class Moody(nn.Module):
    """Adds to its input before the residual addition, unless gradients are off or in evaluation."""

    def __init__(self):
        super().__init__()
        self.steady = False
        self.stem, self.layer, self.head = (
            nn.Linear(12, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 10),
        )

    def forward(self, x):
        x = self.stem(x)
        if self.training and (self.steady or torch.is_grad_enabled()):
            x = x + 0.1
        x = F.relu(x + self.layer(x))
        return self.head(x)


MODELS = {
    "functional": Functional,
    "cifar": CifarNet,
    "statement": Statement,
    "twice": lambda: Statement(twice=True),
    "moody": Moody,
}


def build(name):
    torch.manual_seed(0)
    return MODELS[name]()


def batch(name):
    generator = torch.Generator().manual_seed(3)
    shape = {"cifar": (4, 3, 16, 16), "nhwc": (4, 5, 5, 12)}.get(name, (4, 12))
    return torch.randn(shape, generator=generator), torch.arange(4)


def run(model, x, y, how="eager", steps=2):
    """Train with a monitor; the model is compiled by `how`."""
    optimizer = sgd(model)
    inputs = {} if how == "eager" else {"example_inputs": (x,)}
    with attach(model, optimizer=optimizer, samples=2, **inputs) as monitor:
        call = model
        if how == "blocks":
            for owner in dict.fromkeys(block.owner for block in monitor.blocks):
                model.get_submodule(owner).compile(backend="aot_eager", fullgraph=True)
        elif how == "inside":
            call = torch.compile(lambda x: model(x), backend="aot_eager", fullgraph=True)
        elif callable(how):
            call = how(model)
        elif how != "eager":
            call = torch.compile(model, backend=how, fullgraph=True)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(call(x), y).backward()
            optimizer.step()
            monitor.step()
    return monitor


def missing(monitor, reason):
    return {entry["metric"] for entry in monitor.unavailable if entry["reason"] == reason}


def same_weights(a, b):
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("shape", ["functional", "nhwc", "cifar", "statement"])
def test_operations_are_tapped_in_one_graph_with_the_numbers_of_eager(shape):
    name, (x, y) = "functional" if shape == "nhwc" else shape, batch(shape)
    model, twin = build(name), build(name)
    seen, wanted = run(model, x, y, "aot_eager"), run(twin, x, y)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert seen.warnings == []
    assert seen.blocks == wanted.blocks
    hidden = missing(seen, HIDDEN)
    # the way of a gradient through x.clone() is no single operation of interest
    assert hidden == ({"shortcut_share"} if name == "statement" else set())
    assert_same(seen, wanted, missing=hidden)
    # equal to eager training up to the compiler's own rounding
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_tapped_operations_leave_the_bits_of_compiled_training():
    x, y = batch("cifar")
    watched, plain = build("cifar"), build("cifar")
    run(watched, x, y, "aot_eager")
    torch._dynamo.reset()
    optimizer, call = sgd(plain), torch.compile(plain, backend="aot_eager")
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(call(x), y).backward()
        optimizer.step()
    assert same_weights(watched, plain)


def test_tapped_operations_of_blocks_compiled_one_by_one():
    x, y = batch("cifar")
    seen = run(build("cifar"), x, y, "blocks")
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 3
    assert_same(seen, run(build("cifar"), x, y))


def test_inside_somebodys_function_operations_are_hidden_and_say_so():
    x, y = batch("cifar")
    seen, wanted = run(build("cifar"), x, y, "inside"), run(build("cifar"), x, y)
    hidden = missing(seen, INSIDE)
    assert {"sum_mean", "perturbation", "saturated_fraction"} <= hidden
    frame = seen.to_frame()
    assert frame.sum_mean.isna().all()
    gone = {column for column in RECORDED if frame[column].isna().any()}
    assert gone - {"skip_gain"} <= hidden
    assert_same(seen, wanted, missing=hidden)
    assert not {"grad_sum", "branch_mean", "output_mean"} & hidden


def test_other_operations_than_in_the_example_pass_are_never_mistaken():
    x, y = batch("moody")
    seen = run(build("moody"), x, y, "aot_eager")
    assert {"sum_mean", "branch_mean"} & missing(seen, CHANGED)
    assert seen.to_frame().sum_mean.isna().all()


def test_what_a_model_does_in_training_only_is_in_the_plan():
    x, y = batch("moody")
    models = [build("moody"), build("moody")]
    for model in models:
        model.steady = True
    seen, wanted = (
        run(m, x, y, how) for m, how in zip(models, ("aot_eager", "eager"), strict=True)
    )
    assert_same(seen, wanted)


def test_looking_for_the_plan_leaves_buffers_and_random_numbers_as_they_were():
    model = nn.Sequential(nn.Linear(12, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(), Moody().layer)
    before = [buffer.clone() for buffer in model.buffers()]
    torch.manual_seed(3)
    attach(model, example_inputs=(torch.randn(4, 12),)).close()
    drawn = torch.rand(1)
    torch.manual_seed(3)
    torch.randn(4, 12)
    assert torch.equal(drawn, torch.rand(1))
    assert all(map(torch.equal, before, model.buffers()))
    assert model.training


def test_a_gradient_that_comes_to_no_tap_is_nan_with_a_reason():
    x, y = batch("twice")
    seen, wanted = run(build("twice"), x, y, "aot_eager"), run(build("twice"), x, y)
    lost = missing(seen, UNREACHED)
    assert "grad_sum" in lost
    assert seen.to_frame().grad_sum.isna().all()
    assert_same(seen, wanted, missing=lost | missing(seen, HIDDEN))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}], ids=["default", "overhead"])
def test_inductor_gives_the_numbers_of_eager(options):
    # on the CPU reduce-overhead captures no graph: it must make no difference
    x, y = batch("functional")
    seen = run(build("functional"), x, y, lambda m: torch.compile(m, fullgraph=True, **options))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert_same(seen, run(build("functional"), x, y))


def test_reduce_overhead_records_inside_cuda_graphs():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x, y = (part.cuda() for part in batch("functional"))
    call = lambda model: torch.compile(model, fullgraph=True, mode="reduce-overhead")  # noqa: E731
    seen = run(build("functional").cuda(), x, y, call, steps=4)
    wanted = run(build("functional").cuda(), x, y, steps=4)
    assert_same(seen, wanted, rtol=1e-3)  # TF32 and other kernels
