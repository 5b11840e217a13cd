"""Stock torchvision networks under watch: in-place operations, projections, transformers."""

import copy
import types

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from watching import assert_reasons_are_complete, assert_watching_changes_nothing, sgd, traces

from resdiag.catalog.table import RECORDED
from resdiag.watch.loop.attach import attach


def batch(n=4, size=64):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(n, 3, size, size, generator=generator)
    return images, torch.randint(10, (n,), generator=generator)


def stock(name):
    torch.manual_seed(2)
    return getattr(models, name)(num_classes=10)


def _basic_forward(self, x):
    out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
    return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def _bottleneck_forward(self, x):
    out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
    out = self.bn3(self.conv3(out))
    return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def without_inplace(model):
    """The same network, but nothing overwrites anything."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
        if isinstance(module, models.resnet.BasicBlock):
            module.forward = types.MethodType(_basic_forward, module)
        elif isinstance(module, models.resnet.Bottleneck):
            module.forward = types.MethodType(_bottleneck_forward, module)
    return model


def watch_one_step(model):
    images, labels = batch()
    optimizer = sgd(model, lr=1e-3)
    with attach(model, optimizer=optimizer, samples=2) as monitor:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        monitor.step()
    return monitor


NETS = ["resnet18", "resnet50"]


@pytest.mark.parametrize("name", NETS)
def test_inplace_operations_change_no_number(name):
    model = stock(name)
    twin = without_inplace(model)
    seen, wanted = watch_one_step(model), watch_one_step(twin)
    expected = {column: wanted.to_frame()[column].to_numpy(np.float64) for column in RECORDED}
    reference.assert_columns_agree(seen.to_frame(), expected, rtol=1e-5)
    assert seen.blocks == wanted.blocks


@pytest.mark.parametrize("name", NETS)
def test_every_column_equals_autograd_on_the_twin_written_by_hand(name):
    model = stock(name)
    twin = copy.deepcopy(model)
    images, labels = batch()
    units, features, logits = reference.walk_torchvision(twin, images)
    F.cross_entropy(logits, labels).backward()
    before = [[p.detach().clone() for p in unit.parameters] for unit in units]
    monitor = watch_one_step(model)
    frame = monitor.to_frame()
    updated = dict(model.named_parameters())
    names = {id(p): key for key, p in twin.named_parameters()}
    stages = [block.stage for block in monitor.blocks]
    for unit in units:
        for parameter in unit.parameters:
            parameter.data = updated[names[id(parameter)]].detach().clone()
    expected = reference.columns(units, 2, stages, before)
    # BatchNorm over few positions amplifies the rounding of the two orders of summation
    reference.assert_columns_agree(frame, expected, rtol=1e-3)
    assert frame.shortcut_share.notna().all()
    projections = [block.index for block in monitor.blocks if block.shortcut == "projection"]
    assert projections == {"resnet18": [2, 4, 6], "resnet50": [0, 3, 7, 13]}[name]
    head = reference.statistics(features)
    curve = monitor.to_frame("step")
    assert curve.head_mean[0] == pytest.approx(head["mean"], rel=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_the_skip_gain_begins_anew_behind_a_projection_at_the_beginning_of_a_stage(name):
    monitor = watch_one_step(stock(name))
    assert_reasons_are_complete(monitor)
    assert monitor.unavailable == []
    frame, first = monitor.to_frame(), {"resnet18": 2, "resnet50": 0}[name]
    behind = frame.block >= first  # in these networks every later stage begins with one
    np.testing.assert_array_equal(frame.skip_gain[behind], frame.skip_gain_stage[behind])
    assert ((frame.skip_gain > 0) & (frame.skip_gain < 1)).all()


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0", "convnext_tiny", "swin_t"])
def test_no_skip_gain_is_claimed_where_something_stands_between_the_blocks(name):
    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=10)
    images, labels = batch(2)
    with attach(model) as monitor:
        F.cross_entropy(model(images), labels).backward()
        monitor.step()
    gain = monitor.to_frame().skip_gain.to_numpy()
    assert gain[0] == 1
    assert np.isnan(gain[-1])
    reasons = [e["reason"] for e in monitor.unavailable if e["metric"] == "skip_gain"]
    assert any("between the blocks" in reason for reason in reasons)


@pytest.mark.parametrize(("name", "steps"), [("resnet18", 4), ("resnet50", 2)])
def test_watched_steps_of_stock_networks_end_in_the_same_bits(name, steps):
    assert_watching_changes_nothing(lambda: stock(name), steps, *batch(2, size=32))


def tiny_vit(dropout=0.1):
    return models.VisionTransformer(
        image_size=16,
        patch_size=8,
        num_layers=3,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        dropout=dropout,
        attention_dropout=dropout,
        num_classes=10,
    )


def test_a_vision_transformer_with_dropout_trains_to_the_same_bits():
    assert_watching_changes_nothing(tiny_vit, 20, *batch(4, size=16))


def test_a_vision_transformer_s_halves_are_blocks_with_their_own_parameters():
    model = tiny_vit(dropout=0.0)
    nn.init.normal_(model.heads.head.weight, std=0.1)  # torchvision's zeros give no gradient
    images, labels = batch(4, size=16)
    with attach(model) as monitor:
        F.cross_entropy(model(images), labels).backward()
        monitor.step()
    frame = monitor.to_frame()
    assert [block.owner for block in monitor.blocks] == [
        f"encoder.layers.encoder_layer_{layer}" for layer in (0, 0, 1, 1, 2, 2)
    ]
    for layer in range(3):
        owner = model.encoder.layers[layer]
        halves = [owner.ln_1, owner.self_attention], [owner.ln_2, owner.mlp]
        for half, modules in enumerate(halves):
            norms = [reference.norm(p.grad) for m in modules for p in m.parameters()]
            got = frame.grad_param[2 * layer + half]
            assert got == pytest.approx(reference.root(norms), rel=1e-5)
    # the GELU stands in the second half
    assert frame.saturated_fraction.isna().to_list() == [True, False] * 3
    assert (frame.skip_gain == 1).all()
    assert (frame.attenuation == 1).all()
    assert frame.shortcut_share.notna().all()


def test_in_place_activations_of_other_kinds_are_watched_without_harm():
    """ReLU6, Hardswish, Hardsigmoid and SiLU in place, squeeze and excitation, depthwise."""
    for name in ("mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"):
        torch.manual_seed(0)
        model = getattr(models, name)(num_classes=10)
        before = traces(model)
        images, labels = batch(2, size=32)
        with attach(model) as monitor:
            F.cross_entropy(model(images), labels).backward()
            monitor.step()
        assert traces(model) == before
        saturated = monitor.to_frame().saturated_fraction
        assert saturated.between(0, 1).all()
        assert monitor.to_frame().grad_output.gt(0).all()
