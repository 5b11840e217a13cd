"""Small networks of every family, really run: numbers against plain hooks, and nothing changed."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from watching import traces
from zoo import REAL, build, encoder, loss_of

from resdiag.watch.find.blocks import find_blocks
from resdiag.watch.loop.attach import attach


def catch(model, sites):
    """What passes at some sites, with its gradient kept, by hooks of torch's own."""
    caught = {}

    def keep(site, x):
        x = x[0] if isinstance(x, tuple) else x
        x.retain_grad()
        caught[site] = (x.detach().clone(), x)

    for site in sites:
        name, _, before = site.partition(" ")
        module = model.get_submodule(name)
        if before:
            module.register_forward_pre_hook(lambda m, args, s=site: keep(s, args))
        else:
            module.register_forward_hook(lambda m, args, out, s=site: keep(s, out))
    return caught


@pytest.mark.parametrize("name", REAL)
def test_outputs_and_gradients_equal_those_of_plain_hooks(name):
    (model, inputs), (_, _, sites, units) = build(name), REAL[name]
    twin = copy.deepcopy(model)
    caught = catch(twin, sites)
    torch.manual_seed(6)
    loss_of(twin, inputs).backward()
    with attach(model, blocks=units) as monitor:
        torch.manual_seed(6)
        loss_of(model, inputs).backward()
        monitor.step()
    frame = monitor.to_frame()
    assert len(frame) == len(sites)
    for row, site in zip(frame.itertuples(), sites, strict=True):
        value, tensor = caught[site]
        scale = value.abs().mean().item()
        assert row.output_mean == pytest.approx(value.mean().item(), rel=1e-5, abs=1e-5 * scale)
        assert tensor.grad.norm() > 0
        gradient = len(value) ** 0.5 * tensor.grad.norm().item()
        assert row.grad_output == pytest.approx(gradient, rel=1e-5)


def train_three_steps(name, watched):
    model, inputs = build(name)
    before = traces(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    monitor = attach(model, optimizer=optimizer, blocks=REAL[name][3]) if watched else None
    torch.manual_seed(6)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        optimizer.step()
        if monitor is not None:
            monitor.step()
    if monitor is not None:
        monitor.close()
        assert len(monitor.to_frame()) == 3 * len(REAL[name][2])
    assert traces(model) == before
    return model.state_dict(), torch.get_rng_state()


@pytest.mark.parametrize("name", REAL)
def test_three_watched_steps_end_in_the_same_bits_and_leave_nothing(name):
    plain, plain_state = train_three_steps(name, watched=False)
    seen, seen_state = train_three_steps(name, watched=True)
    assert list(plain) == list(seen)
    assert [key for key in plain if not torch.equal(plain[key], seen[key])] == []
    assert torch.equal(plain_state, seen_state)
    start = build(name)[0].state_dict()
    assert any(not torch.equal(plain[key], start[key]) for key in plain)


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_s_fused_evaluation_hides_no_block_and_is_not_recorded(norm_first):
    """In evaluation torch runs a layer as one call, where no addition shows; training does not."""
    model, x = encoder(norm_first).eval(), torch.randn(4, 6, 10)
    with torch.no_grad():
        fused = model(x)
    after = "none" if norm_first else "layer_norm"
    names = [
        f"layers.{layer}#{half}" if half else f"layers.{layer}"
        for layer in (0, 1)
        for half in (0, 1)
    ]
    found = find_blocks(model, x)
    assert [(block.name, block.after_add) for block in found] == [(name, after) for name in names]
    with attach(model) as monitor:
        with torch.no_grad():
            # hooks keep torch from fusing: the same up to rounding
            torch.testing.assert_close(model(x), fused)
        assert not monitor.blocks
        model.train()
        model(x).square().mean().backward()
        monitor.step()
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(x), fused)
    assert monitor.blocks == found
    assert len(monitor.to_frame()) == 4


class Mixer(nn.Module):
    """Tolstikhin et al. 2021: one MLP mixes tokens, one channels."""

    def __init__(self):
        super().__init__()
        self.patches, self.out = nn.Conv2d(3, 6, 8, 8), nn.Linear(6, 10)
        self.norm, self.tokens, self.channels = nn.LayerNorm(6), nn.Linear(16, 16), nn.Linear(6, 6)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + F.gelu(self.tokens(self.norm(x).transpose(1, 2))).transpose(1, 2)
        self.mixed = x
        return self.out((x + F.gelu(self.channels(x))).mean(1))


def mixer_outputs(model, x):
    model(x)
    return {0: model.mixed}


def last_of(model, names):
    """Outputs of modules, which are those of blocks."""

    def outputs(x):
        kept, handles = {}, []
        for at, name in names.items():
            keep = functools.partial(lambda at, m, i, out: kept.update({at: out}), at)
            handles.append(model.get_submodule(name).register_forward_hook(keep))
        model(x)
        for handle in handles:
            handle.remove()
        return kept

    return outputs


def still_swin():
    sizes = {"patch_size": [4, 4], "embed_dim": 8, "window_size": [2, 2], "num_classes": 10}
    return models.SwinTransformer(
        depths=[1, 2], num_heads=[1, 2], stochastic_depth_prob=0.0, **sizes
    )


def still_convnext():
    widths = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)]
    return models.ConvNeXt(widths, stochastic_depth_prob=0.0, num_classes=10)


CHANNELS = {  # model, outputs of blocks by row, dimension of the channels
    "swin": (still_swin, lambda m: last_of(m, {1: "features.1.0", 3: "features.3.0"}), -1),
    "convnext": (still_convnext, lambda m: last_of(m, {0: "features.1.0", 2: "features.3.1"}), 1),
    "vit": (lambda: models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=10),
            lambda m: last_of(m, {1: "encoder.layers.encoder_layer_0"}), -1),
    "mixer": (Mixer, lambda m: lambda x: mixer_outputs(m, x), -1),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANNELS)
def test_channels_are_where_the_network_has_them(name):
    """B1, B2 and the channel moments against a direct computation over the right dimension."""
    torch.manual_seed(0)
    make, outputs, at = CHANNELS[name]
    model, x = make(), torch.randn(6, 3, 32, 32)
    expected = outputs(model)(x)
    with attach(model, samples=None) as monitor:
        model(x).square().mean().backward()
        monitor.step()
    frame = monitor.to_frame().set_index("block")
    for row, y in expected.items():
        per_channel = y.detach().double().movedim(at, 0).flatten(1)
        mean, variance = per_channel.mean(1), per_channel.var(1, unbiased=False)
        assert monitor.blocks[row].channels == len(mean)
        bias = (mean.square().mean() / variance.mean()).sqrt().item()
        assert frame.output_bias[row] == pytest.approx(bias, rel=1e-4)
        median = mean.quantile(0.5).item()
        assert frame.output_mean_q50[row] == pytest.approx(median, rel=1e-3, abs=1e-6)
