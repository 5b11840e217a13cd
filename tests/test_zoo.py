"""Blocks of published networks: their number stated by hand, with the reason."""

import pytest
import torch
from torch import nn

from resdiag.watch.blocks import find_blocks
from resdiag.watch.monitor import attach

timm = pytest.importorskip("timm")

# name: (blocks, why that many; what else is added there and is not residual)
TIMM = {
    "resnet50": (16, "3+4+6+3"),
    "res2net50_14w_8s": (16, "3+4+6+3; the sums of splits inside a block join unlike pieces"),
    "botnet26t_256": (8, "2+2+2+2; position logits are added to attention logits"),
    "resnetv2_50": (16, "3+4+6+3"),
    "nf_resnet26": (8, "2+2+2+2; weights are standardised"),
    "regnety_002": (13, "1+1+4+7; gates of squeeze and excitation multiply"),
    "convnext_atto": (12, "2+2+6+2"),
    "convnextv2_atto": (12, "2+2+6+2; x + norm(x) inside is a normalisation: it mixes nothing"),
    "vit_tiny_patch16_224": (24, "12 layers of 2; position embeddings"),
    "vit_pwee_patch16_reg1_gap_256": (16, "16 layers, attention and MLP in parallel"),
    "deit_tiny_patch16_224": (24, "12 layers of 2"),
    "beit_base_patch16_224": (24, "12 layers of 2; relative position bias"),
    "mixer_s16_224": (16, "8 layers of 2"),
    "poolformer_s12": (24, "12 layers of 2; pool(x) - x is the mixer"),
    "poolformerv2_s12": (24, "12 layers of 2, some with a scaled shortcut"),
    "swin_tiny_patch4_window7_224": (24, "(2+2+6+2) layers of 2; relative position bias"),
    "xcit_nano_12_p8_224": (40, "12 layers of 3 and 2 class layers of 2"),
    "focalnet_tiny_srf": (24, "(2+2+6+2) layers of 2; gated contexts are added up"),
    "coat_lite_mini": (24, "8 layers of 2 and 8 position convolutions x + conv(x)"),
    "repvgg_a0": (17, "22 units but the 5 that halve the size"),
    "mobilenetv3_large_100": (10, "units of stride 1 that keep the width"),
    "densenet121": (0, "concatenates"),
    "vgg11": (0, "plain"),
    "inception_v3": (0, "concatenates"),
}


@pytest.mark.parametrize("name", TIMM)
def test_the_blocks_of_timm_s_networks(name):
    with torch.device("meta"), torch.no_grad():  # no weights, no arithmetic: only what follows what
        model = timm.create_model(name)
        found = find_blocks(model, torch.zeros(1, *model.pretrained_cfg["input_size"]))
    assert len(found) == TIMM[name][0], TIMM[name][1]


SPELLINGS = {
    "x - f(x)": (lambda x, f, g: x - f(x), 1),
    "torch.sub": (lambda x, f, g: torch.sub(x, f(x), alpha=0.5), 1),
    "f(x) - x": (lambda x, f, g: f(x) - x, 0),
    "addcmul": (lambda x, f, g: torch.addcmul(x, torch.full((6,), 0.1), f(x)), 1),
    "addmm": (lambda x, f, g: torch.addmm(x, f(x), g.weight), 1),
    "lerp": (lambda x, f, g: torch.lerp(x, f(x), 0.5), 1),
    "sum of a list": (lambda x, f, g: sum([x, f(x)]), 1),
    "sum of a stack": (lambda x, f, g: torch.stack([x, f(x)]).sum(0), 1),
    "a broadcast branch": (lambda x, f, g: x + f(x).mean(0, keepdim=True), 1),
    "parallel": (lambda x, f, g: x + f(x) + g(x), 1),
    "mean-centering": (lambda x, f, g: f(x) - f(x).mean(1, keepdim=True), 0),
    "gated recurrence": (lambda x, f, g: x * torch.sigmoid(f(x)) + g(f(x)), 0),
    "pieces": (lambda x, f, g: (lambda a, b: a + b.relu() @ g.weight[:3, :3])(*x.chunk(2, 1)), 0),
}


class _Spelled(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.f, self.g = function, nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.function(x, self.f, self.g)


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_an_addition(name):
    function, count = SPELLINGS[name]
    assert len(find_blocks(_Spelled(function), torch.randn(4, 6))) == count


def test_parallel_branches_are_measured_as_one_branch():
    model, x = _Spelled(SPELLINGS["parallel"][0]), torch.randn(4, 6, requires_grad=True)
    with attach(model, samples=None) as monitor:
        model(x).square().sum().backward()
        monitor.step()
    row = monitor.to_frame().iloc[0]
    branch = (model.f(x) + model.g(x)).detach()
    total = x.detach() + branch
    assert row.branch_ratio == pytest.approx((branch.norm() / x.norm()).item(), rel=1e-5)
    assert row.sum_second_moment == pytest.approx(total.square().mean().item(), rel=1e-5)
    assert row.grad_sum == pytest.approx(2 * (2 * total).norm().item(), rel=1e-5)
    share = (2 * total * x.grad).sum() / x.grad.square().sum()
    assert row.shortcut_share == pytest.approx(share.item(), rel=1e-5)
    assert monitor.notes == []
