"""Blocks of published networks: their number stated by hand, with the reason."""

import pytest
import torch
from torch import nn
from watching import assert_parameters_of_block

from resdiag.models.inspection import inspect as inspect_model
from resdiag.watch.find.blocks import find_blocks
from resdiag.watch.loop.attach import attach

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


TORCHVISION = {
    "resnet18": (8, "2+2+2+2"),
    "resnet50": (16, "3+4+6+3"),
    "resnext50_32x4d": (16, "3+4+6+3"),
    "wide_resnet50_2": (16, "3+4+6+3"),
    "regnet_y_400mf": (16, "1+3+6+6; gates of squeeze and excitation multiply"),
    "efficientnet_b0": (9, "16 units but the first of each of 7 stages"),
    "efficientnet_v2_s": (35, "2+4+4+6+9+15 units but the first of 5 stages"),
    "convnext_tiny": (18, "3+3+9+3"),
    "vit_b_16": (24, "12 layers of 2; position embeddings"),
    "swin_t": (24, "(2+2+6+2) layers of 2; relative position bias"),
    "swin_v2_t": (24, "(2+2+6+2) layers of 2; relative position bias"),
    "maxvit_t": (55, "(2+2+5+2) layers: a convolution, 2 of windows, 2 of the grid"),
    "mobilenet_v2": (10, "1+2+3+4+3+3+1 units but the first of each of 7 stages"),
    "mobilenet_v3_small": (6, "11 units but the 4 of stride 2 and the one that widens"),
    "mnasnet0_5": (10, "3+3+3+2+4+1 units but the first of each of 6 stages"),
    "densenet121": (0, "concatenates"),
    "vgg11": (0, "plain"),
    "alexnet": (0, "plain"),
    "googlenet": (0, "concatenates"),
    "shufflenet_v2_x0_5": (0, "concatenates and shuffles"),
}

_TEXT = {"vocab_size": 50}
_SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, **_TEXT}
_TWO = {"num_hidden_layers": 2, **_SMALL}
_GROUPED = {**_TWO, "num_key_value_heads": 1}
_PICTURE = {**_TWO, "image_size": 32, "patch_size": 8}
_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, **_TEXT}
_WIDE = {"d_model": 16, "d_ff": 32, "num_heads": 2, **_TEXT}
_CODED = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "num_mel_bins": 8, **_TEXT}
_CODED |= dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2)
_CODED |= {"max_source_positions": 50, "pad_token_id": 0, "decoder_start_token_id": 1}

# model type: (configuration, blocks, why that many)
TRANSFORMERS = {
    "bert": (_TWO, 2 * 2, "2 layers: attention, MLP; three embeddings are added up"),
    "distilbert": ({"dim": 16, "n_layers": 2, "n_heads": 2, **_TEXT}, 2 * 2, "attention, MLP"),
    "roberta": (_TWO, 2 * 2, "2 layers: attention, MLP"),
    "albert": (_TWO, 2 * 2, "one layer called twice: attention, MLP"),
    "electra": (_TWO, 2 * 2, "2 layers: attention, MLP"),
    "modernbert": ({**_SMALL, "num_hidden_layers": 3, "pad_token_id": 0}, 3 * 2, "3 layers"),
    "gpt2": (_GPT, 2 * 2, "2 layers: attention, MLP"),
    "opt": (
        {"word_embed_proj_dim": 16, "ffn_dim": 32, **_TWO},
        2 * 2,
        "2 layers: attention, MLP",
    ),
    "bloom": (_TWO | {"n_layer": 2, "n_head": 2}, 2 * 2, "2 layers; ALiBi"),
    "llama": (_GROUPED, 2 * 2, "2 layers: attention, MLP; rotary positions are no residual"),
    "mistral": (_GROUPED, 2 * 2, "2 layers: attention, MLP"),
    "gemma": ({**_GROUPED, "head_dim": 8}, 2 * 2, "2 layers: attention, MLP"),
    "gemma2": ({**_GROUPED, "head_dim": 8}, 2 * 2, "2 layers, normalised on both sides"),
    "mixtral": ({**_GROUPED, "num_local_experts": 2}, 2 * 2, "2 layers; experts are one branch"),
    "gpt_neox": (_TWO, 2, "2 layers, attention and MLP in parallel"),
    "gptj": ({**_GPT, "rotary_dim": 4}, 2, "2 layers, attention and MLP in parallel"),
    "phi": (_TWO, 2, "2 layers, attention and MLP in parallel"),
    "falcon": (_TWO, 2, "2 layers, attention and MLP in parallel"),
    "t5": ({**_WIDE, "d_kv": 8, "num_layers": 2}, 2 * 2 + 2 * 3, "decoders look back as well"),
    "whisper": (_CODED, 2 * 2 + 3 * 3, "2 layers of 2, 3 of 3; position embeddings"),
    "vit": (_PICTURE, 2 * 2, "2 layers: attention, MLP; position embeddings"),
    "clip_vision_model": (_PICTURE, 2 * 2, "2 layers: attention, MLP"),
    "segformer": ({}, 8 * 2, "(2+2+2+2) layers: attention, MLP; scales are concatenated"),
    "resnet": ({}, 16, "3+4+6+3"),
    "timesformer": (
        {**_PICTURE, "num_frames": 2},
        2 * 3,
        "2 layers: attention over time, attention over space, MLP",
    ),
    "fnet": (_TWO, 2 * 2, "2 layers: the real part of a Fourier transform, MLP"),
    "mobilebert": (
        {"num_hidden_layers": 2, **_TEXT},
        2 * 6,
        "2 layers: attention, 3 MLPs, one more, the bottleneck's",
    ),
    "mpnet": (_TWO, 2 * 2, "2 layers: attention, MLP; relative position bias"),
    "mamba": (
        {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, **_TEXT},
        2,
        "2 layers: x + mixer; the state space's own skip C h + D x is a part of it",
    ),
}


@pytest.mark.parametrize("name", TIMM)
def test_the_blocks_of_timm_s_networks(name):
    with torch.device("meta"), torch.no_grad():  # no weights, no arithmetic: only what follows what
        model = timm.create_model(name)
        found = find_blocks(model, torch.zeros(1, *model.pretrained_cfg["input_size"]))
    assert len(found) == TIMM[name][0], TIMM[name][1]


@pytest.mark.parametrize("name", TORCHVISION)
def test_the_blocks_of_torchvision_s_networks(name):
    built = inspect_model(f"torchvision:{name}")
    assert len(built.blocks) == TORCHVISION[name][0], TORCHVISION[name][1]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_blocks_of_transformers_networks(name):
    pytest.importorskip("transformers")
    config, count, reason = TRANSFORMERS[name]
    assert len(inspect_model(f"transformers:{name}", config).blocks) == count, reason


def _couple(weight, a, b, *rest):
    return a + b.relu() @ weight


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
    "turned by an attribute": (lambda x, f, g: x + f(x).T.mT, 1),
    "the real part": (lambda x, f, g: x + torch.fft.fft(x).real, 1),
    "mean-centering": (lambda x, f, g: f(x) - f(x).mean(1, keepdim=True), 0),
    "gated recurrence": (lambda x, f, g: x * torch.sigmoid(f(x)) + g(f(x)), 0),
    "pieces": (lambda x, f, g: _couple(g.weight[:2, :2], *x.chunk(3, 1)), 0),
    "halves": (lambda x, f, g: _couple(g.weight[:3, :3], *x.chunk(2, 1)), 1),
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
    assert monitor.warnings == []


def test_an_attribute_that_turns_a_tensor_is_a_call_like_any_other():
    """x.mT is x.transpose(-2, -1), also for parameters and channels."""
    frames = []
    for turn in (lambda x: x.mT, lambda x: x.transpose(-2, -1)):
        torch.manual_seed(1)
        model = _Spelled(lambda x, f, g, turn=turn: x + turn(f(turn(x))) @ turn(g.weight))
        with attach(model, samples=None) as monitor:
            model(torch.randn(4, 6, 6)).square().mean().backward()
            monitor.step()
        assert_parameters_of_block(monitor, 0, [*model.f.parameters(), model.g.weight])
        frames.append(monitor.to_frame())
    assert frames[0].equals(frames[1])
