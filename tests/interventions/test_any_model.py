"""Interventions on any model: against the same change made by hand."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

import resdiag
from resdiag.cli.main import app
from resdiag.errors import UsageError
from resdiag.interventions.additions import find_sites, lesion
from resdiag.interventions.table import models_interventions


class Layer(nn.Module):
    """A post-norm transformer layer without attention's dropout."""

    def __init__(self, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.skip = self.branch = 1.0
        self.normed = True

    def forward(self, x):
        f = self.attention(x, x, x, need_weights=False)[0]
        x = self._sum(f, x, self.norm1)
        return self._sum(self.mlp(x), x, self.norm2)

    def _sum(self, f, x, norm):
        plain = self.skip == self.branch == 1.0 and self.normed
        y = f + x if plain else f * self.branch + x * self.skip
        return norm(y) if self.normed else y


class Small(nn.Module):
    """Three layers and a head."""

    def __init__(self, width=16):
        super().__init__()
        self.layers = nn.ModuleList([Layer(width) for _ in range(3)])
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Small(), torch.randn(4, 6, 16)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return resnet18(num_classes=10), torch.randn(4, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("no_shortcut", {"skip": 0.0}),
        ("drop_block", {"branch": 0.0}),
        ("half_branch", {"branch": 0.5}),
        ("sqrt_depth", {"branch": 6**-0.5}),
        ("skipinit", {"branch": 0.0}),
        ("no_after_add", {"normed": False}),
    ],
)
def test_a_lesion_of_a_transformer_is_the_change_made_by_hand(small, name, change):
    model, x = small
    before = model(x)
    with lesion(model, name, x) as handle:
        assert len(handle.blocks) == 6
        changed = model(x)
        grads = torch.autograd.grad(changed.square().sum(), model.head.weight)[0]
    for layer in model.layers:
        for key, value in change.items():
            setattr(layer, key, value)
    twin = model(x)
    torch.testing.assert_close(changed, twin)
    torch.testing.assert_close(
        grads, torch.autograd.grad(twin.square().sum(), model.head.weight)[0]
    )
    assert not torch.equal(changed, before)


def test_removed_the_model_is_as_it_was_bit_for_bit(resnet):
    model, x = resnet
    model.eval()
    keys, before = list(model.state_dict()), model(x)
    handle = lesion(model, "drop_block", x)
    assert not torch.equal(model(x), before)
    handle.remove()
    handle.remove()
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == keys
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_dropping_every_block_of_resnet18_leaves_stem_downsampling_and_head(resnet):
    model, x = resnet
    model.eval()
    with lesion(model, "drop_block", x):
        changed = model(x)
    h = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    for layer in (model.layer2, model.layer3, model.layer4):
        h = F.relu(layer[0].downsample(h))
    torch.testing.assert_close(changed, model.fc(model.avgpool(h).flatten(1)))


def test_one_block_alone_is_changed_and_its_relu_stays(resnet):
    model, x = resnet
    model.eval()
    outputs = []
    hook = model.layer3[1].register_forward_hook(lambda m, args, out: outputs.append((args, out)))
    with lesion(model, "no_shortcut", x, blocks=["layer3.1"]) as handle:
        assert [block.name for block in handle.blocks] == ["layer3.1"]
        model(x)
    hook.remove()
    (inputs,), output = outputs[-1]
    block = model.layer3[1]
    twin = F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(inputs))))))
    torch.testing.assert_close(output, twin)
    with lesion(model, "no_after_add", x, blocks=[7]):
        assert model(x).isfinite().all()


def test_the_monitor_sees_the_lesion(resnet):
    model, x = resnet
    changes = []
    for name in (None, "no_after_add"):
        with resdiag.attach(model.train()) as monitor:
            handle = lesion(model, name, x) if name else None
            model(x).square().mean().backward()
            monitor.step()
            if handle:
                handle.remove()
        changes.append(monitor.to_frame()["perturbation"])
    assert (changes[0] > 0.1).all()
    assert (changes[1] == 0).all()


def test_a_learned_factor_learns(small):
    model, x = small
    with lesion(model, "skipinit", x) as handle:
        assert len(handle.parameters) == 6
        model(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs() > 0 for p in handle.parameters)
    model.zero_grad()


def test_what_cannot_be_changed_is_refused_in_one_line(small):
    model, x = small
    with pytest.raises(UsageError, match="did you mean 'drop_block'"):
        lesion(model, "drop_blok", x)
    with pytest.raises(UsageError, match="unknown block '17'"):
        lesion(model, "drop_block", x, blocks=[17])
    with pytest.raises(UsageError, match="no residual addition"):
        lesion(nn.Linear(16, 2), "drop_block", x)
    pre = resdiag.build_model("d", 8, width=0.25, seed=0)
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(UsageError, match="nothing to change"):
        lesion(pre, "no_after_add", images)
    with pytest.raises(UsageError, match="nothing after its addition"):
        lesion(pre, "no_after_add", images, blocks=[0])


def test_another_way_through_the_model_is_refused(small):
    model, x = small
    with lesion(model, "drop_block", x):
        del model.layers[0]
        with pytest.raises(UsageError, match="4 of 6 additions"):
            model(x)


def test_every_addition_of_a_variant_can_be_changed():
    model = resdiag.build_model("c", 8, width=0.25, seed=0)
    blocks, sites = find_sites(model, torch.randn(2, 3, 32, 32))
    assert (
        [site.block for site in sites]
        == blocks
        == resdiag.find_blocks(model, torch.randn(2, 3, 32, 32))
    )
    assert all(site.branch_first for site in sites)  # F(x) + h(x)
    assert set(models_interventions()) >= {"no_shortcut", "drop_block", "no_after_add"}


@pytest.mark.parametrize(
    "words",
    [
        "torchvision:resnet18 no_after_add --input-shape 3,32,32 --arg num_classes=10",
        "transformers:gpt2 drop_block --arg n_layer=2 --arg n_embd=32 --arg n_head=2 "
        "--arg vocab_size=50 --block 0 --input-shape 8",
    ],
)
def test_the_command_compares_both_arms_on_the_same_batches(words, capsys):
    options = ["--seeds", "2", "--steps", "2", "--batch-size", "4", "--lr", "0.01", "--json"]
    assert app.run(["lesion", *words.split(), *options]) == 0
    document = json.loads(capsys.readouterr().out)
    (effect,) = document["lesions"]
    assert len(effect["control"]) == len(effect["changed"]) == 2
    assert effect["control"][0]["steps"] == 2
    assert effect["control"][0]["growth_per_block"] != effect["changed"][0]["growth_per_block"]
    assert isinstance(effect["confirmed"], bool)


def test_the_command_names_its_lesions(capsys):
    assert app.run(["lesion", "torchvision:resnet18", "drop_blok"]) == 2
    assert "drop_block" in capsys.readouterr().err


def test_without_names_the_command_tries_what_the_model_can_have(capsys):
    """The additions of torchvision's ResNets write in place: no factor can be learned there."""
    words = ["torchvision:resnet18", "--input-shape", "3,32,32", "--batch-size", "2", "--json"]
    assert app.run(["lesion", *words, "--seeds", "1", "--steps", "1"]) == 0
    tried = {effect["name"] for effect in json.loads(capsys.readouterr().out)["lesions"]}
    assert tried == set(models_interventions()) - {"skipinit"}


def test_a_learned_factor_is_refused_where_the_addition_writes_in_place(resnet):
    model, x = resnet
    with pytest.raises(UsageError, match=r"block layer1\.0 adds in place"):
        lesion(model, "skipinit", x, blocks=[0])
    with pytest.raises(UsageError, match="'skipinit' has nothing to change in ResNet"):
        lesion(model, "skipinit", x)
