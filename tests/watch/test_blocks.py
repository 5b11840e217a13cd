"""Finding blocks: counts on published networks, and anatomies stated by hand."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hand_written import Net
from torch import nn
from torchvision import models
from watching import assert_parameters_of_block, traces

from resdiag.models.resnet import build_model
from resdiag.models.variants import VARIANTS
from resdiag.watch.find.blocks import find_blocks
from resdiag.watch.loop.attach import attach

COUNTS = {
    "resnet18": 8,
    "resnet34": 16,
    "resnet50": 16,
    "resnext50_32x4d": 16,
    "wide_resnet50_2": 16,
    "regnet_y_400mf": 16,
    "efficientnet_b0": 9,
    "mobilenet_v2": 10,
    "mnasnet0_5": 10,
    "mobilenet_v3_small": 6,
    "convnext_tiny": 18,
    "swin_t": 24,
    "densenet121": 0,
    "vgg11": 0,
    "googlenet": 0,
    "shufflenet_v2_x0_5": 0,
    "inception_v3": 0,
}


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_the_number_of_residual_additions_of_published_networks(name, count):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name in ("regnet_y_400mf", "swin_t"):  # they compute sizes and indices from tensors
        model = getattr(models, name)()
    else:
        with torch.device("meta"):  # weights do not matter: drawing millions would take seconds
            model = getattr(models, name)(**options)
        model = model.to_empty(device="cpu")
    size = 75 if name == "inception_v3" else 64
    assert len(find_blocks(model, torch.zeros(1, 3, size, size))) == count


def test_a_vision_transformer_has_two_blocks_per_layer():
    model = models.VisionTransformer(32, 16, 3, 2, 16, 32)
    found = find_blocks(model, torch.zeros(1, 3, 32, 32))
    assert len(found) == 6
    assert {block.shortcut for block in found} == {"identity"}
    assert {block.after_add for block in found} == {"none"}


def test_stock_resnet18_block_by_block():
    found = find_blocks(models.resnet18(), torch.zeros(1, 3, 64, 64))
    assert [b.name for b in found] == [f"layer{s}.{b}" for s in (1, 2, 3, 4) for b in (0, 1)]
    assert [b.stage for b in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [b.transition for b in found] == [False, False, True, False, True, False, True, False]
    assert [b.shortcut for b in found] == ["identity"] * 2 + ["projection", "identity"] * 3
    assert {b.after_add for b in found} == {"relu"}
    assert [b.shape for b in found][::2] == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
    assert [b.index for b in found] == list(range(8))
    assert found[2].channels == 128
    assert found[2].to_dict()["shape"] == [128, 8, 8]


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_our_own_networks_block_by_block(variant):
    model = build_model(variant, 14, width=0.5, seed=0)
    units = None if VARIANTS[variant].shortcut else model.unit_names
    found = find_blocks(model, torch.zeros(1, 3, 16, 16), blocks=units)
    assert [b.name for b in found] == model.unit_names
    assert [b.stage for b in found] == [0, 0, 1, 1, 2, 2]
    assert [b.transition for b in found] == [False, False, True, False, True, False]
    kind = "identity" if VARIANTS[variant].shortcut else "none"
    assert {b.shortcut for b in found} == {kind}
    after = VARIANTS[variant].after_add if VARIANTS[variant].shortcut else "none"
    assert {b.after_add for b in found} == {after}


@pytest.mark.parametrize(("first", "after"), [(True, "none"), (False, "layer_norm")])
def test_transformer_encoders_pre_norm_and_post_norm(first, after):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    found = find_blocks(model, torch.randn(2, 5, 16))
    assert [b.name for b in found] == ["layers.0", "layers.0#1", "layers.1", "layers.1#1"]
    assert {(b.shortcut, b.after_add, b.shape) for b in found} == {("identity", after, (5, 16))}


# -- written by hand -------------------------------------------------------------------------------


def iadd(out, identity):
    out += identity
    return out


def twice(net, x, a, b, c, d):
    x = torch.relu(x + a(x))
    return F.elu(x + b(x))


def staged(net, x, a, b, c, d):
    """A stem, a block, a layer between blocks, another block, a head: all in one forward."""
    x = a(x)
    x = torch.relu(x + b(x))
    x = c(x)
    return d(x + b(x))


def pooled(net, x, a, b, c, d):
    """A parameter-free operation between the activated sum and the next block."""
    x = torch.relu(x + a(x))
    x = 2 * x.flip(0)
    return x + b(x)


def nested(net, x, a, b, c, d):
    inner = a(x)
    inner = inner + b(inner)
    return x + c(inner)


def pre_norm(net, x, a, b, c, d):
    x = x + a(F.layer_norm(x, (6,)))
    return x + b(F.layer_norm(x, (6,)))


def parallel(net, x, a, b, c, d):
    """GPT-J: two branches of one input, added one after the other."""
    n = F.layer_norm(x, (6,))
    return x + a(n) + b(n)


ANATOMIES = {
    # name: (forward, [(shortcut, after_add, layers whose weights belong to the block)])
    "x + f(x)": (lambda n, x, a, *_: x + a(x), [("identity", "none", "a")]),
    "f(x) + x": (lambda n, x, a, *_: a(x) + x, [("identity", "none", "a")]),
    "torch.add with alpha": (
        lambda n, x, a, *_: torch.add(a(x), x, alpha=0.5),
        [("identity", "none", "a")],
    ),
    "add by keyword": (
        lambda n, x, a, *_: torch.add(input=a(x), other=x),
        [("identity", "none", "a")],
    ),
    "x.add_(f)": (lambda n, x, a, *_: (x * 1).add_(a(x)), [("identity", "none", "a")]),
    "f.add_(x)": (lambda n, x, a, *_: a(x).add_(x), [("identity", "none", "a")]),
    "out += identity": (lambda n, x, a, *_: iadd(a(x), x), [("identity", "none", "a")]),
    "layer scale": (lambda n, x, a, *_: x + n.scale * a(x), [("identity", "none", "as")]),
    "scaled shortcut": (lambda n, x, a, *_: 0.5 * x + a(x), [("identity", "none", "a")]),
    "projection": (lambda n, x, a, b, *_: b(x) + a(a(x)), [("projection", "none", "ab")]),
    "after-add": (lambda n, x, a, *_: F.elu(x + a(x)), [("identity", "elu", "a")]),
    "in-place after-add": (lambda n, x, a, *_: (x + a(x)).relu_(), [("identity", "relu", "a")]),
    "norm then activation": (
        lambda n, x, a, *_: F.relu(F.layer_norm(x + a(x), (6,))),
        [("identity", "layer_norm-relu", "a")],
    ),
    "dropout on the branch": (
        lambda n, x, a, *_: x + F.dropout(a(x), 0.5, n.training),
        [("identity", "none", "a")],
    ),
    "two in one forward": (twice, [("identity", "relu", "a"), ("identity", "elu", "b")]),
    "stem, layer between, head": (
        staged,
        [("identity", "relu", "b"), ("identity", "none", "b")],
    ),
    "no parameters between": (pooled, [("identity", "relu", "a"), ("identity", "none", "b")]),
    "nested": (nested, [("identity", "none", "b"), ("identity", "none", "abc")]),
    "pre-norm": (pre_norm, [("identity", "none", "a"), ("identity", "none", "b")]),
    "parallel branches": (parallel, [("identity", "none", "ab")]),
}

LOOK_ALIKES = {
    "positional embedding": lambda n, x, a, *_: a(x + n.place),
    "embedding after a layer": lambda n, x, a, *_: a(x) + n.place,
    "mask": lambda n, x, a, *_: (a(x) + torch.zeros(6).masked_fill(torch.eye(6)[0] > 0, -9)).exp(),
    "bias by hand": lambda n, x, a, *_: x @ a.weight + a.bias,
    "number": lambda n, x, a, *_: a(x) + 1.0,
    "itself": lambda n, x, a, *_: a(x) + a(x).detach() * 0 + x.sum(),
    "equal depth": lambda n, x, a, b, *_: a(x) + b(x),
    "broadcast": lambda n, x, a, *_: a(x) + x.mean(0, keepdim=True),
    "tanh GELU": lambda n, x, a, b, *_: b(gelu_tanh(a(x))),
    "rotary": lambda n, x, a, *_: rotate(a(x)),
    "moving average": lambda n, x, a, *_: (
        0.9 * a(x) + 0.1 * a(x).mean(0, keepdim=True).expand(2, 6)
    ),
}


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rotate(x):
    turned = torch.cat([-x[:, 3:], x[:, :3]], dim=1)
    return x * 0.6 + turned * 0.8


@pytest.mark.parametrize("name", list(ANATOMIES))
def test_the_anatomy_of_networks_written_by_hand(name):
    function, expected = ANATOMIES[name]
    found = find_blocks(Net(function), torch.randn(2, 6))
    assert [(b.shortcut, b.after_add) for b in found] == [(s, f) for s, f, _ in expected]
    assert {b.owner for b in found} == {""}
    assert [b.name for b in found] == [f"#{index}" for index in range(len(found))]


@pytest.mark.parametrize("name", list(ANATOMIES))
def test_a_block_s_parameters_are_those_on_the_way_of_its_operands(name):
    function, expected = ANATOMIES[name]
    model = Net(function)
    with attach(model) as monitor:
        model(torch.randn(2, 6)).square().sum().backward()
        monitor.step()
    members = dict(zip("abcd", model.layers, strict=True))
    for row, (_, _, letters) in enumerate(expected):
        wanted = [p for key in letters for p in _parameters(model, members, key)]
        assert_parameters_of_block(monitor, row, wanted)


def _parameters(model, members, key):
    return [model.scale] if key == "s" else members[key].parameters()


@pytest.mark.parametrize("name", list(LOOK_ALIKES))
def test_additions_that_only_look_residual_are_not_blocks(name):
    assert find_blocks(Net(LOOK_ALIKES[name]), torch.randn(2, 6)) == []


def test_nested_modules_give_the_inner_and_the_outer_block():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return x + self.layer(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(Inner(), Inner())

        def forward(self, x):
            return F.relu(x + self.inner(x))

    found = find_blocks(nn.Sequential(Outer(), Outer()), torch.randn(2, 6))
    assert [b.owner for b in found] == [
        "0.inner.0",
        "0.inner.1",
        "0",
        "1.inner.0",
        "1.inner.1",
        "1",
    ]
    assert [b.after_add for b in found] == ["none", "none", "relu"] * 2


def test_an_addition_scaled_inside_torch_add_is_measured_as_it_enters_the_sum():
    model = Net(lambda n, x, a, *_: torch.add(a(x), x, alpha=0.5))
    x = torch.randn(5, 6, requires_grad=True)
    with attach(model, samples=None) as monitor:
        model(x).square().sum().backward()
        monitor.step()
    row = monitor.to_frame().iloc[0]
    h, branch = 0.5 * x.detach(), model.layers[0](x).detach()
    assert row.branch_ratio == pytest.approx((branch.norm() / h.norm()).item(), rel=1e-5)
    assert row.shortcut_second_moment == pytest.approx(h.square().mean().item(), rel=1e-5)
    assert row.skip_gain == row.skip_gain_stage == 0.5
    g = 2 * (h + branch)
    share = (0.5 * g * x.grad).sum() / x.grad.square().sum()
    assert row.shortcut_share == pytest.approx(share.item(), rel=1e-5)


def test_a_shortcut_scaled_before_the_sum_shrinks_the_skip_gain_block_by_block():
    def thrice(net, x, a, b, c, d):
        for layer in (a, b, c):
            x = 0.5 * x + layer(x)
        return x

    model = Net(thrice)
    with attach(model) as monitor:
        model(torch.randn(5, 6)).square().sum().backward()
        monitor.step()
    assert monitor.to_frame().skip_gain.to_list() == [0.5, 0.25, 0.125]


def test_named_blocks_are_taken_and_additions_elsewhere_are_not():
    model = models.resnet18()
    found = find_blocks(model, torch.zeros(1, 3, 32, 32), blocks=["layer2.*", "layer1"])
    assert [(b.name, b.shortcut) for b in found] == [
        ("layer1", "none"),
        ("layer2.0", "projection"),
        ("layer2.1", "identity"),
    ]
    with pytest.raises(ValueError, match=r"blocks: 'layer9' matches no module of ResNet"):
        find_blocks(model, torch.zeros(1, 3, 32, 32), blocks=["layer9"])


def test_finding_blocks_leaves_modes_buffers_and_random_states_alone():
    model = build_model("original", 8, width=0.25, seed=0)
    model.stages[1].eval()
    modes = [module.training for module in model.modules()]
    before, state = traces(model), {k: v.clone() for k, v in model.state_dict().items()}
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert len(find_blocks(model, torch.randn(2, 3, 16, 16, generator=torch.Generator()))) == 3
    assert [module.training for module in model.modules()] == modes
    assert traces(model) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == numbers[1:]  # noqa: NPY002


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_finding_blocks_cleans_up_after_an_error(error):
    def broken(net, x, a, *_):
        raise error("stop")

    model = Net(broken)
    before = traces(model)
    with pytest.raises(error, match="stop"):
        find_blocks(model, torch.randn(2, 6))
    assert traces(model) == before
    assert model.training


def test_inputs_may_come_by_keyword_and_outputs_in_a_dict():
    class Dicts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, *, hidden):
            return {"hidden": hidden + self.layer(hidden)}

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Dicts()

        def forward(self, x):
            return self.inner(hidden=x)

    (block,) = find_blocks(Wrapper(), x=torch.randn(2, 6))
    assert block.owner == "inner"


def test_a_branch_that_begins_outside_of_the_adding_module_belongs_to_the_block():
    """A module gets x and what was made of x: both ways begin at x."""

    class Fusion(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x, memory):
            return x + self.layer(memory)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.main, self.side = (nn.Linear(6, 6) for _ in range(3))
            self.fusion = Fusion()

        def forward(self, x):
            x = self.stem(x)
            x = self.main(x)
            return self.fusion(x, self.side(x))

    model = Outer()
    x = torch.randn(2, 6)
    with attach(model) as monitor:
        model(x).square().sum().backward()
        monitor.step()
    (block,) = monitor.blocks
    assert (block.owner, block.shortcut) == ("fusion", "identity")
    members = [*model.fusion.parameters(), *model.side.parameters()]
    assert_parameters_of_block(monitor, 0, members)
    row = monitor.to_frame().iloc[0]
    assert row.skip_gain == 1
    with torch.no_grad():  # y = x + W V x: dL/dx = g + g W V, of which g came by the shortcut
        g = 2 * model(x)
        total = g + g @ model.fusion.layer.weight @ model.side.weight
    share = (g * total).sum() / total.square().sum()
    assert row.shortcut_share == pytest.approx(share.item(), rel=1e-5)
