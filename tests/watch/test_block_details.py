"""What a block says of itself; gates, streams, and what is a part of a layer."""

import pytest
import torch
import torch.nn.functional as F
from hand_written import Net
from torch import nn
from torchvision import models
from watching import assert_parameters_of_block

from resdiag.models.resnet import build_model
from resdiag.watch.find.blocks import find_blocks
from resdiag.watch.loop.attach import attach
from resdiag.watch.measure import skip_path

# -- what a block says of itself -------------------------------------------------------------------


def test_pre_and_post_activation_are_told_apart():
    orders = {
        variant: {b.order for b in find_blocks(build_model(variant, 8), torch.zeros(2, 3, 32, 32))}
        for variant in ("original", "elu", "elu_pre", "relu_pre", "elu_after", "no_relu")
    }
    assert orders == {
        "original": {"post"},
        "elu": {"none"},
        "elu_pre": {"pre"},
        "relu_pre": {"pre"},
        "elu_after": {"post"},
        "no_relu": {"none"},
    }
    found = find_blocks(models.resnet18(), torch.zeros(1, 3, 64, 64))
    assert {block.order for block in found} == {"post"}


def test_branch_and_shortcut_name_the_modules_that_return_them():
    blocks = find_blocks(models.resnet18(), torch.zeros(1, 3, 64, 64))
    assert [b.branch_module for b in blocks[:3]] == ["layer1.0.bn2", "layer1.1.bn2", "layer2.0.bn2"]
    assert blocks[2].shortcut_module == "layer2.0.downsample"
    assert blocks[0].branch == ("conv2d", "batch_norm", "relu", "conv2d", "batch_norm")


class Channelled(torch.nn.Module):
    """One block on (N, H, W, C), as ConvNeXt and Swin have them."""

    def __init__(self):
        super().__init__()
        self.norm, self.up = torch.nn.LayerNorm(5), torch.nn.Linear(5, 20)
        self.down = torch.nn.Linear(20, 5)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def test_channels_are_where_the_operations_have_them():
    torch.manual_seed(0)
    model, x = Channelled(), torch.randn(3, 7, 6, 5)
    with attach(model, samples=None) as monitor:
        out = model(x)
        out.square().mean().backward()
        monitor.step()
    (block,) = monitor.blocks
    assert (block.features, block.channels, block.order) == (3, 5, "pre")
    row = monitor.to_frame().iloc[0]
    mu = out.detach().double().mean((0, 1, 2))
    spread = out.detach().double().var((0, 1, 2), unbiased=False)
    assert row.output_channel_mean_rms == pytest.approx(mu.square().mean().sqrt().item(), rel=1e-5)
    assert row.output_channel_std == pytest.approx(spread.mean().sqrt().item(), rel=1e-5)


class Flattening(torch.nn.Module):
    """Two blocks of one width, the second on a view that merges batch and positions, as in OPT."""

    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x):
        x = x + self.one(x)
        flat = x.reshape(-1, 4)
        return (flat + self.two(flat)).view(x.shape)


def test_a_view_of_the_same_channels_begins_no_stage():
    blocks = find_blocks(Flattening(), torch.randn(2, 3, 4))
    assert [(b.stage, b.transition, b.channels) for b in blocks] == [(0, False, 4), (0, False, 4)]


class _Joined(nn.Module):
    """Gets x and a projection of x that its caller made, as a tree of DLA and MobileBERT do."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(6, 6)

    def forward(self, x, shortcut):
        return self.f(F.relu(self.f(x))) + shortcut


class _Awkward(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.f, self.g, self.h = (nn.Linear(6, 6) for _ in range(3))
        self.norm, self.joined = nn.LayerNorm(6), _Joined()
        self.gamma = nn.Parameter(torch.full((6,), 0.1))

    def forward(self, x):
        return self.function(self, x)


def _experts(m, x):
    """Every sample goes to one of two experts."""
    out, first = torch.zeros_like(x), x[:, 0] > 0
    for expert, chosen in ((m.f, first), (m.g, ~first)):
        out[chosen] = expert(x[chosen])
    return x + out


def _biased(m, x):
    """One learned bias of the first layer's kind added in every layer: no stream of its own."""
    bias = m.h(torch.ones_like(x).cumsum(1))
    for f in (m.f, m.g):
        x = x + F.relu(f(x) + bias)
    return x


AWKWARD = {
    "in place": (lambda m, x: m.f(x).add_(x), ["identity"]),
    "alpha": (lambda m, x: torch.add(x, m.f(x), alpha=0.5), ["identity"]),
    "+= of the shortcut": (lambda m, x: _add_in_place(x, m.f(x)), ["identity"]),
    "layer scale": (lambda m, x: x + m.gamma * m.f(x), ["identity"]),
    "drop path": (lambda m, x: x + m.f(x) * torch.bernoulli(torch.full((4, 1), 0.5)), ["identity"]),
    "parallel": (lambda m, x: x + m.f(m.norm(x)) + m.g(m.norm(x)), ["identity"]),
    "parallel maps, then the identity": (lambda m, x: m.norm(m.f(x)) + m.g(x) + x, ["identity"]),
    "parallel maps that differ in a norm": (lambda m, x: m.norm(m.f(x)) + m.g(x), []),
    "nested": (lambda m, x: x + m.h(_inner(m, x)), ["identity", "identity"]),
    "projection made by the caller": (lambda m, x: m.joined(x, m.g(x)), ["projection"]),
    "projection of an activation": (lambda m, x: m.g(F.relu(x)) + m.h(F.relu(m.f(x))),
                                    ["projection"]),
    "experts": (_experts, ["identity"]),
    "a bias in every layer": (_biased, ["identity", "identity"]),
    "gated unit": (lambda m, x: torch.sigmoid(m.f(x)) * x + m.g(x) * m.h(x), []),
    "two towers": (lambda m, x: F.relu(m.f(x)) + F.relu(m.g(x)), []),
}  # fmt: skip


def _add_in_place(x, f):
    x = x.clone()
    x += f
    return x


def _inner(m, x):
    y = m.f(x)
    return y + F.relu(m.g(y))


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_networks(name):
    function, shortcuts = AWKWARD[name]
    found = find_blocks(_Awkward(function), torch.randn(4, 6))
    assert [block.shortcut for block in found] == shortcuts


# -- a gate on the shortcut ------------------------------------------------------------------------


class _Highway(nn.Module):
    """x' = t * H(x) + (1 - t) * x, three times (Srivastava et al. 2015, arXiv:1505.00387)."""

    def __init__(self, mix):
        super().__init__()
        self.mix = mix
        self.h, self.t = (nn.ModuleList(nn.Linear(6, 6) for _ in range(3)) for _ in "ht")

    def forward(self, x):
        for h, t in zip(self.h, self.t, strict=True):
            x = self.mix(x, F.relu(h(x)), torch.sigmoid(t(x)))
        return x


GATED = {
    "t h + (1 - t) x": lambda x, h, t: t * h + (1 - t) * x,
    "h t + x (1 - t)": lambda x, h, t: h * t + x * (1 - t),
    "(1 - t) h + t x": lambda x, h, t: (1 - t) * h + t * x,
    "the rest first": lambda x, h, t: torch.mul(x, torch.ones_like(t) - t) + t * h,
    "a negative": lambda x, h, t: (-t + 1) * x + t * h,
    "dropout": lambda x, h, t: F.dropout(t * h, 0.5, training=False) + (1 - t) * x,
    "x + t (h - x)": lambda x, h, t: x + t * (h - x),
    "x - (-t) (h - x)": lambda x, h, t: torch.sub(x, (h - x) * t, alpha=-1),
    "in place": lambda x, h, t: x.clone().mul_(1 - t).add_(h * t),
    "lerp": torch.lerp,
    "lerp by keyword": lambda x, h, t: x.lerp(end=h, weight=t),
    "addcmul": lambda x, h, t: torch.addcmul(t * h, x, 1 - t),
    "addcmul of a step": lambda x, h, t: torch.addcmul(x, t, h - x),
}

TANGLED = "what comes through the shortcut cannot be told from what comes through the branch"

_MASK = torch.tensor([[0.0, 1.0] * 3])

NOT_GATED = {
    "a linear unit": (lambda x, h, t: h * t, []),
    "two gates": (lambda x, h, t: t * h + torch.tanh(t) * x, []),
    "the same gate twice": (lambda x, h, t: t * h + t * x, []),
    "a mixture of two maps": (lambda x, h, t: t * h + (1 - t) * F.gelu(t.log()), []),
    "squeeze and excitation": (lambda x, h, t: x + t * h, ["identity"] * 3),
    "a mask": (lambda x, h, t: _MASK * h + (1 - _MASK) * x, ["identity"] * 3),
    "a number": (lambda x, h, t: torch.lerp(x, h, 0.3), ["identity"] * 3),
    "a constant": (lambda x, h, t: torch.lerp(x, h, torch.tensor(0.3)), ["identity"] * 3),
}


@pytest.mark.parametrize("spelling", GATED)
def test_a_gate_on_the_shortcut_is_a_kind_of_its_own(spelling):
    torch.manual_seed(0)
    model, x = _Highway(GATED[spelling]), torch.randn(5, 6)
    with attach(model, samples=None) as monitor:
        model(x).square().sum().backward()
        monitor.step()
    assert [block.shortcut for block in monitor.blocks] == ["gated"] * 3
    frame = monitor.to_frame()
    with torch.no_grad():
        for row in range(3):
            h, t = F.relu(model.h[row](x)), torch.sigmoid(model.t[row](x))
            if spelling == "(1 - t) h + t x":
                t = 1 - t
            at, kept = frame.iloc[row], (1 - t) * x
            assert at.shortcut_second_moment == pytest.approx(kept.square().mean().item(), rel=1e-4)
            ratio = ((t * h).norm() / kept.norm()).item()
            assert at.branch_ratio == pytest.approx(ratio, rel=1e-4)
            x = t * h + kept
    assert_parameters_of_block(monitor, 0, [*model.h[0].parameters(), *model.t[0].parameters()])
    assert frame.skip_gain.isna().all()
    assert frame.shortcut_share.isna().all()
    reasons = {entry["reason"] for entry in monitor.unavailable}
    assert {skip_path.MIXED, TANGLED} <= reasons


@pytest.mark.parametrize("name", NOT_GATED)
def test_a_product_is_not_yet_a_gate(name):
    function, shortcuts = NOT_GATED[name]
    found = find_blocks(_Highway(function), torch.randn(4, 6))
    assert [block.shortcut for block in found] == shortcuts


@pytest.mark.parametrize(
    "step", [lambda h, q, z: (1 - z) * h + z * q, lambda h, q, z: h + z * (q - h)]
)
def test_a_recurrent_cell_s_gate_is_none(step):
    """It holds a state against what comes in, as in a GRU: not one input against its branch."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.z, self.q = nn.Linear(12, 6), nn.Linear(12, 6)

        def forward(self, x):
            h = torch.tanh(x[:, 0])
            for at in (1, 2, 3):
                both = torch.cat([h, x[:, at]], 1)
                h = step(h, torch.tanh(self.q(both)), torch.sigmoid(self.z(both)))
            return h

    assert find_blocks(Recurrent(), torch.randn(2, 4, 6)) == []


# -- two streams -----------------------------------------------------------------------------------

STREAMS = {
    "halves": lambda m, x: m.stem(x).chunk(2, 1),
    "slices": lambda m, x: ((y := m.stem(x))[:, :6], y[:, 6:]),
    "the same twice": lambda m, x: (m.one(x),) * 2,
    "copies": lambda m, x: torch.cat([m.one(x)] * 2, 1).chunk(2, 1),
    "two maps": lambda m, x: (m.one(x), m.other(x)),
}


class _Coupled(nn.Module):
    """a = a + f(b), b = b + g(a), three times (RevNet: Gomez et al. 2017, arXiv:1707.04585)."""

    def __init__(self, begin, joins=False):
        super().__init__()
        self.begin, self.joins = begin, joins
        self.stem, self.one, self.other = nn.Linear(12, 12), nn.Linear(12, 6), nn.Linear(12, 6)
        self.f, self.g = (nn.ModuleList(nn.Linear(6, 6) for _ in range(3)) for _ in "fg")

    def forward(self, x):
        a, b = self.begin(self, x)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + F.relu(f(b))
            b = b + F.relu(g(a))
            if self.joins:
                a, b = torch.cat([a, b], 1).chunk(2, 1)
        return torch.cat([a, b], 1)


@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("begin", STREAMS)
def test_every_addition_of_two_streams_is_a_block(begin, joins):
    model = _Coupled(STREAMS[begin], joins)
    x = torch.randn(4, 12)
    with attach(model, samples=None) as monitor:
        model(x).square().sum().backward()
        monitor.step()
    assert len(monitor.blocks) == 6
    assert monitor.warnings == []
    if begin == "two maps":
        return
    at = monitor.to_frame().iloc[0]
    with torch.no_grad():
        a, b = STREAMS[begin](model, x)
        ratio = (F.relu(model.f[0](b)).norm() / a.norm()).item()
    assert at.branch_ratio == pytest.approx(ratio, rel=1e-5)
    # the backward pass of a split hands on the gradients of its pieces as one
    tangled = {row for entry in monitor.unavailable if entry["reason"] == TANGLED
               for row in entry["blocks"]}  # fmt: skip
    assert (0 in tangled) == (begin in ("halves", "copies"))


def test_a_bias_added_in_every_layer_is_no_stream_although_the_stream_comes_from_it():
    def biased(net, x, a, b, c, d):
        bias = F.embedding((x[:, 0] > 0).long(), d.weight)
        h = c(x)
        for layer in (a, b, a):
            h = h + F.relu(layer(h) + bias)
        return h

    found = find_blocks(Net(biased), torch.randn(4, 6))
    assert [block.branch for block in found] == [("linear", "add", "relu")] * 3


def test_pieces_of_three_are_a_hierarchy():
    class Hierarchy(nn.Module):
        """Res2Net, with every piece used."""

        def __init__(self):
            super().__init__()
            self.stem, self.maps = nn.Linear(6, 6), nn.ModuleList(nn.Linear(2, 2) for _ in "abc")

        def forward(self, x):
            h, out = 0, []
            for piece, f in zip(self.stem(x).chunk(3, 1), self.maps, strict=True):
                h = f(piece + h)
                out.append(h)
            return torch.cat(out, 1)

    assert find_blocks(Hierarchy(), torch.randn(4, 6)) == []


# -- what is a part of a layer ---------------------------------------------------------------------


class _StateSpace(nn.Module):
    """C h + D x on what it is handed, as S4 has it, or on a part of a map of it, as Mamba does."""

    def __init__(self, expands):
        super().__init__()
        self.expands, width = expands, 12 if expands else 6
        self.up, self.down = nn.Linear(6, 24), nn.Linear(width, 6)
        self.scan, self.d = nn.Linear(width, width), nn.Parameter(torch.ones(width))

    def forward(self, x):
        gate = x
        if self.expands:
            x, gate = self.up(x).chunk(2, 2)
            x = F.silu(x)
        y = self.scan(x).cumsum(1) + x * self.d
        return self.down(y * F.silu(gate))


class _PreNorm(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(6), layer

    def forward(self, x):
        return x + self.layer(self.norm(x))


class _Scaled(nn.Module):
    """A shortcut with a learned scale, as in PoolFormer v2, pre-norm or post-norm."""

    def __init__(self, before):
        super().__init__()
        self.before, self.norm, self.layer = before, nn.LayerNorm(6), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        if self.before:
            return x * self.scale + self.layer(self.norm(x))
        x = self.norm(torch.addcmul(self.layer(x), x, self.scale))
        return self.norm(torch.addcmul(self.layer(x), x, self.scale))


@pytest.mark.parametrize("expands", [True, False])
def test_the_skip_of_a_state_space_is_a_part_of_the_mixer(expands):
    model = nn.Sequential(*(_PreNorm(_StateSpace(expands)) for _ in range(3)))
    assert [b.name for b in find_blocks(model, torch.randn(2, 4, 6))] == ["0", "1", "2"]


@pytest.mark.parametrize(("before", "count"), [(True, 3), (False, 6)])
def test_a_learned_scale_on_a_stream_is_none(before, count):
    stem = [nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU()]
    model = nn.Sequential(nn.Sequential(*stem), *(_Scaled(before) for _ in range(3)))
    assert len(find_blocks(model, torch.randn(2, 6))) == count


def test_a_position_made_of_a_detached_prediction_is_no_branch():
    """As RT-DETR embeds the boxes that it predicted; a branch detached as a whole is a block."""

    def refined(net, x, a, b, c, d):
        place = b(torch.sigmoid(a(x)).detach())
        return x + c((x + place).relu())

    assert [block.branch[-1] for block in find_blocks(Net(refined), torch.randn(2, 6))] == [
        "linear"
    ]
    whole = [lambda n, x, a, b, *_: x + a(x).detach(), lambda n, x, a, b, *_: x + a(x.detach())]
    for function in whole:
        assert len(find_blocks(Net(function), torch.randn(2, 6))) == 1


PARAMETRIZED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
}


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_a_weight_that_is_computed_from_parameters_is_a_weight(name):
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            layers = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
            self.f, self.g, self.h = map(PARAMETRIZED[name], layers)

        def forward(self, x):
            return F.relu(self.g(F.relu(self.f(x))) + self.h(x))

    model = nn.Sequential(*(Projected() for _ in range(3)))
    with attach(model, samples=None) as monitor:
        model(torch.randn(2, 4, 5, 5)).square().sum().backward()
        monitor.step()
    assert [block.shortcut for block in monitor.blocks] == ["projection"] * 3
    assert {block.branch for block in monitor.blocks} == {("conv2d", "relu", "conv2d")}
    for row, block in enumerate(model):
        assert_parameters_of_block(monitor, row, block.parameters())


class _Gate(nn.Module):
    """x and what a sublayer made of it, as in GTrXL (Parisotto et al. 2019, arXiv:1910.06764)."""

    def __init__(self):
        super().__init__()
        self.z, self.q = nn.Linear(12, 6), nn.Linear(12, 6)

    def forward(self, x, y):
        z = torch.sigmoid(self.z(torch.cat([x, y], -1)))
        return (1 - z) * x + z * torch.tanh(self.q(torch.cat([x, y], -1)))


def _one_map(net, x, a, b, c, d):
    """The branch and its gate are halves of one map, as AllenNLP has it."""
    h, t = F.linear(x, torch.cat([a.weight, b.weight])).chunk(2, 1)
    t = torch.sigmoid(t)
    return t * x + (1 - t) * torch.relu(h)


def _composed(net, x, a, b, c, d):
    """What a mask lets through of the network's own result."""
    mask = (x.cumsum(1) > 0).float()
    return mask * b(torch.relu(a(x))) + (1 - mask) * x


def test_gates_of_other_forms():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.f, self.gate = nn.LayerNorm(6), nn.Linear(6, 6), _Gate()

        def forward(self, x):
            return self.gate(x, self.f(self.norm(x)))

    found = find_blocks(nn.Sequential(Layer(), Layer()), torch.randn(4, 6))
    assert [(b.name, b.shortcut) for b in found] == [("0.gate", "gated"), ("1.gate", "gated")]
    (block,) = find_blocks(Net(_one_map), torch.randn(4, 6))
    assert block.shortcut == "gated"
    assert find_blocks(Net(_composed), torch.randn(4, 6)) == []
