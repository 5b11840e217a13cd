"""Networks without residual additions: their units, against closed forms and plain hooks."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from watching import traces

import resdiag
from resdiag.diagnose.rundata import RunData
from resdiag.runs.watched import load_run
from resdiag.watch.base.safety import WatchWarning
from resdiag.watch.find.blocks import find_blocks, find_units
from resdiag.watch.loop.attach import attach

pytestmark = pytest.mark.filterwarnings("ignore::resdiag.watch.base.safety.WatchWarning")


def mlp(depth, width, variance, act=nn.ReLU, classes=10):
    """Linear layers with weights of variance `variance / width` and no biases."""
    layers = []
    for _ in range(depth):
        layer = nn.Linear(width, width, bias=False)
        nn.init.normal_(layer.weight, std=math.sqrt(variance / width))
        layers += [layer, act()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def watch(model, *inputs, loss=lambda out: out.square().mean(), steps=1, **options):
    with attach(model, samples=None, **options) as monitor:
        for _ in range(steps):
            model.zero_grad()
            loss(model(*inputs)).backward()
            monitor.step()
    return monitor


# -- closed forms --------------------------------------------------------------------------------


def test_an_orthogonal_linear_network_keeps_every_norm():
    torch.manual_seed(0)
    model = mlp(12, 16, 1.0, nn.Identity)
    for layer in list(model)[:-1:2]:
        nn.init.orthogonal_(layer.weight)
    frame = watch(model, torch.randn(8, 16)).to_frame()
    assert len(frame) == 12  # the last linear map is the head
    assert frame.forward_growth.to_numpy() == pytest.approx(1, rel=1e-5)
    assert frame.grad_growth.to_numpy()[1:] == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(("variance", "growth"), [(2.0, 1.0), (1.0, 0.5), (4.0, 2.0)])
def test_the_growth_of_a_relu_network_is_half_its_weights_variance(variance, growth):
    """E[x_l^2] = n s^2 / 2 E[x_{l-1}^2], back as forward (He et al. 2015, arXiv:1502.01852)."""
    torch.manual_seed(0)
    model, x = mlp(30, 512, variance), torch.randn(64, 512)
    frame = watch(model, x).to_frame()
    per_layer = 30 * math.log(growth)
    assert len(frame) == 30
    assert frame.forward_growth.map(math.log).sum() == pytest.approx(per_layer, abs=1.5)
    assert frame.grad_growth[1:].map(math.log).sum() == pytest.approx(per_layer, abs=1.5)
    assert frame.forward_growth.mean() == pytest.approx(growth, rel=0.05)
    assert frame.saturated_fraction.mean() == pytest.approx(0.5, abs=0.02)


class Unrolled(nn.Module):
    """One matrix applied again and again: h_t = W h_{t-1}."""

    def __init__(self, scale, steps=6):
        super().__init__()
        self.step, self.out, self.steps = nn.Linear(8, 8, bias=False), nn.Linear(8, 2), steps
        nn.init.orthogonal_(self.step.weight, gain=scale)

    def forward(self, h):
        for _ in range(self.steps):
            h = self.step(h)
        return self.out(h)


def test_a_recurrence_has_a_unit_per_step_and_grows_as_the_square_of_its_gain():
    torch.manual_seed(0)
    monitor = watch(Unrolled(0.5), torch.randn(4, 8))
    frame = monitor.to_frame()
    names = [block.name for block in monitor.blocks]
    assert names == ["step", *(f"step#{i}" for i in range(1, 6))]
    assert frame.forward_growth.to_numpy() == pytest.approx(0.25, rel=1e-5)
    assert frame.grad_growth.to_numpy()[1:] == pytest.approx(0.25, rel=1e-5)


# -- which units ---------------------------------------------------------------------------------


class DoubleConv(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.both = nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x):
        return self.both(x)


class UNet(nn.Module):
    """Ronneberger et al. 2015: the ways down and up are joined by concatenation."""

    def __init__(self):
        super().__init__()
        self.enter, self.down1, self.down2 = DoubleConv(3, 4), DoubleConv(4, 8), DoubleConv(8, 16)
        self.lift2, self.lift1 = nn.ConvTranspose2d(16, 8, 2, 2), nn.ConvTranspose2d(8, 4, 2, 2)
        self.up2, self.up1 = DoubleConv(16, 8), DoubleConv(8, 4)
        self.leave = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        one = self.enter(x)
        two = self.down1(F.max_pool2d(one, 2))
        y = self.lift2(self.down2(F.max_pool2d(two, 2)))
        y = self.lift1(self.up2(torch.cat([y, two], 1)))
        return self.leave(self.up1(torch.cat([y, one], 1)))


class Functional(nn.Module):
    """Activations without modules, as in the tutorials."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3)
        self.norm, self.fc1, self.fc2 = nn.BatchNorm2d(8), nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu_(self.conv1(x)), 2)
        x = torch.relu(self.norm(self.conv2(x)))
        return self.fc2(F.gelu(self.fc1(F.dropout(torch.flatten(F.avg_pool2d(x, 3), 1), 0.1))))


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.first = nn.Embedding(20, 6), nn.LSTM(6, 8, batch_first=True)
        self.second, self.out = nn.GRU(8, 10, batch_first=True), nn.Linear(10, 20)

    def forward(self, ids):
        return self.out(self.second(self.first(self.embed(ids))[0])[0])


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
        self.right = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())

    def forward(self, x):
        return self.left(x) * self.right(x)


class Wrapped(nn.Module):
    """A dictionary in, a dictionary out, a submodule that does all the work."""

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 2)})

    def forward(self, batch):
        x = torch.tanh(self.net["a"](batch["x"]))
        return {"scores": self.net["c"](torch.tanh(self.net["b"](x)))}


def densenet():
    return models.DenseNet(4, (2, 2), 8, bn_size=2, num_classes=10)


_DENSE = ["conv0", "denseblock1.denselayer1", "denseblock1.denselayer2", "transition1",
          "denseblock2.denselayer1", "denseblock2.denselayer2"]  # fmt: skip

UNITS = {
    "vgg16_bn": (models.vgg16_bn, [f"features.{i}" for i in (0, 3, 7, 10, 14, 17, 20, 24, 27, 30,
                 34, 37, 40)] + ["classifier.0", "classifier.3"], "batch_norm-relu"),
    "alexnet": (models.alexnet, [f"features.{i}" for i in (0, 3, 6, 8, 10)]
                + ["classifier.1", "classifier.4"], "relu"),
    "squeezenet": (models.squeezenet1_1, [f"features.{i}" for i in (0, 3, 4, 6, 7, 9, 10, 11, 12)]
                   + ["classifier"], "relu"),
    "googlenet": (lambda: models.googlenet(init_weights=False), ["conv1", "conv2", "conv3"]
                  + [f"inception{i}" for i in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a",
                                               "5b")], "none"),
    "densenet": (densenet, [f"features.{name}" for name in _DENSE], "batch_norm-relu"),
    "unet": (UNet, ["enter", "down1", "down2", "lift2", "up2", "lift1", "up1", "leave"], "none"),
    "functional": (Functional, ["conv1", "conv2", "fc1"], "relu"),
    "text": (Text, ["first", "second"], "none"),
    "towers": (TwoTowers, ["left.0", "left.2", "right.0", "right.2"], "relu"),
    "wrapped": (Wrapped, ["net.a", "net.b"], "tanh"),
    "one layer": (lambda: nn.Linear(4, 2), [""], "none"),
}  # fmt: skip


def inputs_of(name):
    if name in ("towers", "one layer"):
        return torch.randn(4, 4)
    if name == "wrapped":
        return {"x": torch.randn(4, 4)}
    if name == "text":
        return torch.randint(20, (4, 7))
    size = {"functional": 16, "unet": 16, "densenet": 32, "googlenet": 64}.get(name, 64)
    return torch.randn(4, 3, size, size)


def output_of(out):
    out = getattr(out, "logits", out)
    return (out["scores"] if isinstance(out, dict) else out).float()


@pytest.mark.parametrize("name", UNITS)
def test_the_units_of_a_plain_network(name):
    make, names, after = UNITS[name]
    with torch.device("meta"):
        found = find_units(make(), inputs_of(name))
        assert find_blocks(make(), inputs_of(name)) == []
    assert [block.owner for block in found] == names
    assert {block.shortcut for block in found} == {"none"}
    assert [block.index for block in found] == list(range(len(names)))
    assert found[0].after_add == after
    if name == "densenet":
        assert [block.order for block in found][:2] == ["post", "pre"]


def test_a_network_without_weights_has_no_units():
    assert find_units(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.randn(2, 3)) == []


def test_a_residual_network_has_blocks_and_no_units():
    model, x = models.resnet18(), torch.randn(1, 3, 64, 64)
    found = find_blocks(model, x)
    assert find_units(model, x) == []
    assert all(block.shortcut != "none" for block in found)
    assert len(found) == 8


# -- numbers and harmlessness --------------------------------------------------------------------

SMALL = ["densenet", "unet", "functional", "text", "towers", "wrapped"]


def _without_inplace(model):
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return twin


@pytest.mark.parametrize("name", ["densenet", "unet", "towers"])
def test_the_numbers_are_those_of_plain_hooks_on_a_twin_that_overwrites_nothing(name):
    torch.manual_seed(0)
    model, x = UNITS[name][0](), inputs_of(name)
    twin = _without_inplace(model)
    blocks, kept = find_units(model, x), {}

    def keep(name):
        def hook(module, args, out):
            out.retain_grad()
            kept[name] = args[0], out

        return hook

    for block in blocks:
        at, last = f".{block.owner}".rsplit(".", 1)
        # of a layer and its activation in a Sequential, the activation ends the unit
        end = f"{at}.{int(last) + 1}"[1:] if block.after_add == "relu" else block.owner
        twin.get_submodule(end).register_forward_hook(keep(block.owner))
    blocks = [block for block in blocks if block.after_add in ("none", "relu")]
    output_of(twin(x)).square().mean().backward()
    monitor = watch(model, x, loss=lambda out: output_of(out).square().mean(), steps=2)
    frame = monitor.to_frame()
    for step in (0, 1):
        rows = frame[frame.step == step].set_index("block")
        for block in blocks:
            row, (before, out) = rows.loc[block.index], kept[block.owner]
            batch = math.sqrt(len(x))
            assert row.output_second_moment == pytest.approx(out.square().mean().item(), rel=1e-4)
            assert row.grad_output == pytest.approx(batch * out.grad.norm().item(), rel=1e-4)
            if block.after_add == "none" and torch.is_tensor(before):
                expected = before.square().mean().item()
                assert row.input_second_moment == pytest.approx(expected, rel=1e-4)
            members = [p.grad.norm() for p in twin.get_submodule(block.owner).parameters()]
            assert row.grad_param == pytest.approx(torch.stack(members).norm().item(), rel=1e-4)
    assert monitor.warnings == [n for n in monitor.warnings if "no residual addition" in n]


@pytest.mark.parametrize("name", SMALL)
def test_training_is_bit_identical_and_nothing_is_left(name):
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        model, x = UNITS[name][0](), inputs_of(name)
        before = traces(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        monitor = attach(model, optimizer=optimizer) if watched else None
        for _ in range(3):
            optimizer.zero_grad()
            output_of(model(x)).square().mean().backward()
            optimizer.step()
            if monitor is not None:
                monitor.step()
        if monitor is not None:
            assert not any("watching stopped" in note for note in monitor.warnings)
            assert len(monitor.to_frame()) == 3 * len(UNITS[name][1])
            monitor.close()
            assert traces(model) == before
        ends.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(a, ends[1][key]) for key, a in ends[0].items())


def test_attach_says_in_one_line_that_there_is_no_addition_and_why_skip_metrics_are_missing():
    model = mlp(3, 8, 2.0)
    with pytest.warns(WatchWarning, match=r"no residual addition: 3 modules are .*: 0 \.\. 4; "):
        monitor = watch(model, torch.randn(4, 8))
    assert len(monitor.warnings) == 1
    missing = {row["metric"]: row["reason"] for row in monitor.unavailable}
    assert missing["skip_gain"] == missing["grad_sum"] == "the block has no residual addition"
    frame = monitor.to_frame()
    assert frame.skip_gain.isna().all()
    assert frame.output_second_moment.notna().all()


def test_steps_that_skip_or_repeat_a_unit_say_so():
    model = Unrolled(1.0, steps=3)
    with attach(model) as monitor:
        for steps in (3, 2, 5):
            model.steps = steps
            model(torch.randn(2, 8)).sum().backward()
            monitor.step()
    frame = monitor.to_frame()
    counts = frame.output_second_moment.notna().groupby(frame.step).sum().tolist()
    assert counts == [3, 2, 3]
    assert any("did not run in a later one" in note for note in monitor.warnings)
    assert any("the first pass did not have" in note for note in monitor.warnings)


def test_the_verdict_names_a_plain_network_that_explodes():
    torch.manual_seed(0)
    exploding = watch(mlp(20, 64, 4.0), torch.randn(16, 64))
    assert resdiag.judge(exploding).name == "grows_at_init"
    kept = watch(mlp(20, 64, 2.0), torch.randn(16, 64))
    assert not resdiag.judge(kept).findings


def test_the_gradient_of_a_plain_network_is_compared_between_its_outer_units():
    torch.manual_seed(0)
    monitor = watch(mlp(20, 256, 1.0), torch.randn(32, 256))
    frame = monitor.to_frame()
    expected = frame.grad_output.iloc[0] / frame.grad_output.iloc[-1]
    # Glorot's weights: its square is halved by each of 19 layers, up to their finite width
    assert math.log(expected) == pytest.approx(-19 / 2 * math.log(2), abs=0.7)
    assert RunData(load_run(monitor)).gradient_ratio(0) == pytest.approx(expected, rel=1e-6)


def test_a_compiled_plain_network_records_what_an_eager_one_does():
    torch.manual_seed(0)
    eager = mlp(3, 8, 2.0, classes=2)
    compiled, x = copy.deepcopy(eager), torch.randn(4, 8)
    expected = watch(eager, x).to_frame()
    with attach(compiled, samples=None, example_inputs=(x,)) as monitor:
        run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
        run(x).square().mean().backward()
        monitor.step()
    frame = monitor.to_frame()
    for column in ("output_second_moment", "grad_output", "grad_param", "saturated_fraction"):
        assert frame[column].to_numpy() == pytest.approx(expected[column].to_numpy(), rel=1e-5)
