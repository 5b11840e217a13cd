"""Blocks of further published networks: their number stated by hand, with the reason.

A few run always, the rest with --slow.
"""

import re
from pathlib import Path

import pytest
import test_zoo
import torch

from resdiag.models.inspection import inspect as inspect_model
from resdiag.watch.find.blocks import find_blocks

_EFFICIENT = "units of stride 1 that keep the width: all but the first of each stage"
_DETECTOR = "3+4+6+3 of the backbone; the pyramid adds scales, which is no block"

TORCHVISION = {
    "resnet34": (16, "3+4+6+3"),
    "resnet101": (33, "3+4+23+3"),
    "resnet152": (50, "3+8+36+3"),
    "resnext101_32x8d": (33, "3+4+23+3"),
    "wide_resnet101_2": (33, "3+4+23+3"),
    "convnext_base": (36, "3+3+27+3"),
    "convnext_large": (36, "3+3+27+3"),
    "convnext_small": (36, "3+3+27+3"),
    "efficientnet_b1": (16, f"2+3+3+4+4+5+2; {_EFFICIENT}"),
    "efficientnet_b2": (16, f"2+3+3+4+4+5+2; {_EFFICIENT}"),
    "efficientnet_b3": (19, f"2+3+3+5+5+6+2; {_EFFICIENT}"),
    "efficientnet_b4": (25, f"2+4+4+6+6+8+2; {_EFFICIENT}"),
    "efficientnet_b5": (32, f"3+5+5+7+7+9+3; {_EFFICIENT}"),
    "efficientnet_b6": (38, f"3+6+6+8+8+11+3; {_EFFICIENT}"),
    "efficientnet_b7": (48, f"4+7+7+10+10+13+4; {_EFFICIENT}"),
    "efficientnet_v2_m": (51, "3+5+5+7+14+18+5 units but the first of 6 stages"),
    "efficientnet_v2_l": (73, "4+7+7+10+19+25+7 units but the first of 6 stages"),
    "mnasnet1_3": (10, "3+3+3+2+4+1 units but the first of each of 6 stages"),
    "mobilenet_v3_large": (10, "15 units but the 4 of stride 2 and the one that widens"),
    "regnet_x_400mf": (22, "1+2+7+12"),
    "regnet_x_800mf": (16, "1+3+7+5"),
    "regnet_x_1_6gf": (18, "2+4+10+2"),
    "regnet_x_3_2gf": (25, "2+6+15+2"),
    "regnet_x_8gf": (23, "2+5+15+1"),
    "regnet_x_16gf": (22, "2+6+13+1"),
    "regnet_y_800mf": (14, "1+3+8+2"),
    "regnet_y_1_6gf": (27, "2+6+17+2"),
    "regnet_y_3_2gf": (21, "2+5+13+1"),
    "regnet_y_8gf": (17, "2+4+10+1"),
    "regnet_y_16gf": (18, "2+4+11+1"),
    "swin_s": (48, "(2+2+18+2) layers of 2"),
    "swin_b": (48, "(2+2+18+2) layers of 2"),
    "swin_v2_s": (48, "(2+2+18+2) layers of 2"),
    "swin_v2_b": (48, "(2+2+18+2) layers of 2"),
    "vit_b_32": (24, "12 layers of 2"),
    "vit_l_16": (48, "24 layers of 2"),
    "vit_h_14": (64, "32 layers of 2"),
    "vgg19_bn": (0, "plain"),
    "squeezenet1_0": (0, "concatenates"),
    "inception_v3": (0, "concatenates"),
    "densenet201": (0, "concatenates"),
    "shufflenet_v2_x2_0": (0, "concatenates and shuffles"),
    # segmentation, detection, video, optical flow
    "fcn_resnet50": (16, "3+4+6+3"),
    "deeplabv3_resnet101": (33, "3+4+23+3"),
    "deeplabv3_mobilenet_v3_large": (10, "those of the backbone"),
    "lraspp_mobilenet_v3_large": (10, "those of the backbone; two classifiers are added up"),
    "retinanet_resnet50_fpn": (16, _DETECTOR),
    "maskrcnn_resnet50_fpn": (16, _DETECTOR),
    "keypointrcnn_resnet50_fpn": (16, _DETECTOR),
    "fcos_resnet50_fpn": (16, _DETECTOR),
    "ssdlite320_mobilenet_v3_large": (10, "those of the backbone"),
    "ssd300_vgg16": (0, "plain"),
    "r3d_18": (8, "2+2+2+2"),
    "mc3_18": (8, "2+2+2+2"),
    "r2plus1d_18": (8, "2+2+2+2"),
    "s3d": (0, "concatenates"),
    "mvit_v1_b": (32, "16 layers of 2"),
    "mvit_v2_s": (48, "16 layers of 2, and the pooled query is added to the attention"),
    "swin3d_t": (24, "(2+2+6+2) layers of 2"),
    "raft_large": (24, "6+6 of the encoders; 12 times flow + update"),
}

_SKIP = "units with has_skip in timm's own code"

TIMM = {
    "dla34": (12, "2+4+4+2; the first of each level gets its projection from the tree"),
    "dla60": (16, "2+4+8+2"),
    "dpn68": (22, "3+4+12+3; a part of each sum is concatenated; projections begin with norm, act"),
    "repvit_m0_9": (49, "(2+2+14+2) of x + conv(x) + conv1(x) and MLP, 3 downsamplings of 2 + 1"),
    "bat_resnext26ts": (16, "2+2+2+2, in each the attention's own x + f(x)"),
    "gcresnet33ts": (20, "2+3+3+2, in each the context's own x + f(x)"),
    "caformer_s18": (36, "(3+3+9+3) layers of 2"),
    "convformer_s18": (36, "(3+3+9+3) layers of 2"),
    "cait_xxs24_224": (52, "24 layers of 2, 2 class layers of 2"),
    "coat_tiny": (78, "4 x 2 layers of 3; 6 parallel ones: 3 scales of position, attention, MLP"),
    "coatnet_nano_rw_224": (25, "3+4 convolutions, (6+3) layers of 2"),
    "convit_tiny": (24, "12 layers of 2"),
    "convmixer_768_32": (32, "32 layers x + depthwise(x)"),
    "crossvit_tiny_240": (36, "3 times: 1+4 layers of 2, 2 cross attentions"),
    "cs3darknet_s": (9, "1+3+4+1"),
    "cspdarknet53": (23, "1+2+8+8+4"),
    "cspresnet50": (13, "3+3+5+2"),
    "cspresnext50": (13, "3+3+5+2"),
    "darknet53": (23, "1+2+8+8+4"),
    "davit_tiny": (48, "(1+1+3+1) pairs of 4: position, attention, position, MLP"),
    "deit3_small_patch16_224": (24, "12 layers of 2"),
    "dm_nfnet_f0": (12, "1+2+6+3"),
    "eca_nfnet_l0": (12, "1+2+6+3"),
    "edgenext_xx_small": (15, "2+2+6+2, 3 of them with cross-covariance attention of their own"),
    "efficientformer_l1": (30, "(3+2+6+4) layers of 2"),
    "efficientformerv2_s0": (20, "14 MLPs, 4 attentions; the last downsampling: x + attention, "
                                 "in it pool(q) + local(q)"),
    "efficientnetv2_rw_t": (34, "2+4+4+6+9+14 units but the first of 5 stages"),
    "efficientvit_b0": (11, "stem 1, stages 1+1 and 2 times 2 layers of 2"),
    "efficientvit_m0": (38, "(1+2+3) layers of 5, 2 subsamplings of 4"),
    "ese_vovnet19b_dw": (0, "concatenates"),
    "eva02_tiny_patch14_224": (24, "12 layers of 2"),
    "fastvit_t8": (34, "(2+2+4+2) layers of 2 and of a mixer's own identity, stem 1, patches 3"),
    "fbnetc_100": (15, _SKIP),
    "gcvit_xxtiny": (35, "(2+2+6+2) layers of 2; 3+2+1+1 features of queries; 4 reductions"),
    "gernet_s": (14, "1+3+7+2+1"),
    "ghostnet_100": (16, "16 bottlenecks, each with a shortcut"),
    "halonet26t": (8, "2+2+2+2"),
    "hardcorenas_a": (5, _SKIP),
    "hiera_tiny_224": (24, "(1+2+7+2) layers of 2"),
    "hrnet_w18_small": (23, "1, 2 x 2, 3 x 2, 4 x 2, 4 of the head; fusions add branches"),
    "inception_next_tiny": (18, "3+3+9+3"),
    "inception_resnet_v2": (40, "10+20+9+1"),
    "inception_v4": (0, "concatenates"),
    "lambda_resnet26t": (8, "2+2+2+2"),
    "lcnet_050": (0, "plain"),
    "legacy_senet154": (50, "3+8+36+3"),
    "levit_128s": (20, "(2+3+4) layers of 2, an MLP after each of 2 downsamplings"),
    "mambaout_femto": (18, "3+3+9+3"),
    "maxvit_nano_rw_256": (35, "(1+2+3+1) layers of 5"),
    "mixnet_s": (11, _SKIP),
    "mobilenetv1_100": (0, "plain"),
    "mobilenetv4_conv_small": (10, _SKIP),
    "mobilenetv4_hybrid_medium": (27, _SKIP),
    "mobileone_s0": (35, "17 depthwise and 18 pointwise units that keep size and width"),
    "mobilevit_xxs": (21, "1+2 units, (2+4+3) layers of 2"),
    "mobilevitv2_050": (19, "1 unit, (2+4+3) layers of 2"),
    "mvitv2_tiny": (30, "(1+2+5+2) layers of 3: the pooled query is added"),
    "nest_tiny": (24, "(2+2+8) layers of 2"),
    "nextvit_small": (44, "16 convolution layers of 2, 4 transformer layers of 3"),
    "pit_ti_224": (24, "(2+6+4) layers of 2"),
    "pvt_v2_b0": (16, "(2+2+2+2) layers of 2"),
    "rdnet_tiny": (0, "concatenates"),
    "regnetz_b16": (18, "2+6+12+2 but the first of each stage"),
    "repghostnet_050": (48, "16 bottlenecks of 3: each of two modules adds its input, normalised"),
    "resmlp_12_224": (24, "12 layers of 2"),
    "resnest14d": (4, "1+1+1+1"),
    "resnetrs50": (16, "3+4+6+3"),
    "rexnet_100": (11, "units of stride 1; added to a part of the channels"),
    "selecsls42": (0, "concatenates"),
    "sequencer2d_s": (36, "(4+3+8+3) layers of 2"),
    "skresnet18": (8, "2+2+2+2; the two kernels' paths are added up"),
    "starnet_s1": (15, "2+2+8+3"),
    "swiftformer_xs": (28, "16 local, 4 attentions, 4 MLPs; each attention adds the query"),
    "swinv2_cr_tiny_224": (24, "(2+2+6+2) layers of 2"),
    "tiny_vit_5m_224": (22, "2 convolution layers, (2+6+2) layers of 2"),
    "tnt_s_legacy_patch16_224": (48, "12 layers of 4; pixels added to patches join two streams"),
    "tresnet_m": (21, "3+4+11+3"),
    "twins_svt_small": (40, "(2+2+10+4) layers of 2, 4 position convolutions"),
    "twins_pcpvt_small": (36, "(3+4+6+3) layers of 2, 4 position convolutions"),
    "visformer_tiny": (23, "7, (4+4) layers of 2"),
    "vitamin_small_224": (34, "2+4 convolution layers, 14 layers of 2"),
    "volo_d1_224": (40, "(4+4+8+2) layers of 2, 2 class layers of 2"),
    "xception41": (12, "3+8+1"),
    "gmlp_s16_224": (30, "30 layers; the spatial gate multiplies"),
    "gmixer_24_224": (48, "24 layers of 2"),
    "vit_base_patch16_siglip_224": (25, "12 layers of 2, the pooling's MLP"),
    "shvit_s1": (39, "2 layers of 2, (4+5) of 3, 2 subsamplings of 4"),
}  # fmt: skip

_TEXT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50,
         "num_hidden_layers": 2, "pad_token_id": 0}  # fmt: skip
_LLAMA = {**_TEXT, "num_key_value_heads": 1}
_WIDE = {**_LLAMA, "head_dim": 8}
_BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "vocab_size": 50,
         "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "pad_token_id": 0,
         **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)}  # fmt: skip
_T5 = {"d_model": 16, "d_ff": 32, "num_heads": 2, "d_kv": 8, "num_layers": 2, "vocab_size": 50}
_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50}
_IMAGE = {**_TEXT, "image_size": 32, "patch_size": 8}
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2],
         "window_size": 4}  # fmt: skip
_SOUND = {**_TEXT, "conv_dim": [8, 8], "conv_kernel": [10, 8], "conv_stride": [5, 4],
          "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}  # fmt: skip
_DETR = {**_BART, "use_timm_backbone": False, "use_pretrained_backbone": False, "num_queries": 4}
_MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 8, "first_k_dense_replace": 1,
        "num_key_value_heads": 2}  # fmt: skip
_LAYERS = "2 layers: attention, MLP"
_CODER = "2 layers of 2, 3 of 3"

_BARTS = ("bart", "mbart", "pegasus", "marian", "blenderbot", "m2m_100", "plbart")
_BERTS = ("deberta", "deberta-v2", "layoutlm", "yoso", "ernie", "megatron-bert", "xlm-roberta",
          "esm", "splinter", "ibert", "persimmon", "biogpt")  # fmt: skip
_LLAMAS = ("qwen2", "olmo", "olmo2", "starcoder2", "stablelm", "phi3", "granite", "nemotron")
_VITS = ("deit", "beit", "dinov2", "ijepa", "vit_msn", "vitdet")

TRANSFORMERS = {
    **dict.fromkeys(_BARTS, (_BART, 13, _CODER)),
    "led": ({**_BART, "attention_window": 4}, 13, _CODER),
    **dict.fromkeys(_BERTS, (_TEXT, 4, _LAYERS)),
    "xlnet": ({"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "vocab_size": 50}, 4,
              _LAYERS),
    "longformer": ({**_TEXT, "attention_window": 4}, 4, _LAYERS),
    "big_bird": ({**_TEXT, "attention_type": "original_full"}, 4, _LAYERS),
    "funnel": ({"block_sizes": [2, 2], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32,
                "vocab_size": 50}, 13, "(2+2+2) layers of 2; the decoder adds the first block"),
    "squeezebert": ({**_TEXT, "embedding_size": 16, **{f"{part}_groups": 1 for part in
                     ("q", "k", "v", "post_attention", "intermediate", "output")}}, 4, _LAYERS),
    "convbert": ({**_TEXT, "embedding_size": 16}, 4, _LAYERS),
    "nystromformer": ({**_TEXT, "num_landmarks": 4, "segment_means_seq_len": 32}, 4, _LAYERS),
    "roformer": ({**_TEXT, "embedding_size": 16}, 4, _LAYERS),
    **dict.fromkeys(_LLAMAS, (_LLAMA, 4, _LAYERS)),
    **dict.fromkeys(("qwen3", "gemma3_text", "glm"), (_WIDE, 4, _LAYERS)),
    "cohere": (_LLAMA, 2, "2 layers, attention and MLP in parallel"),
    "qwen2_moe": ({**_LLAMA, "num_experts": 4, "moe_intermediate_size": 8,
                   "shared_expert_intermediate_size": 8}, 4, f"{_LAYERS}; experts are added up"),
    "deepseek_v3": ({**_TEXT, **_MLA}, 4, f"{_LAYERS}; a shared expert is added"),
    "gpt_neo": ({"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 50,
                 "attention_types": [[["global", "local"], 1]]}, 4, _LAYERS),
    "codegen": ({**_GPT, "rotary_dim": 4}, 2, "2 layers, attention and MLP in parallel"),
    "mpt": ({"d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 50}, 4, _LAYERS),
    "ctrl": ({**_GPT, "dff": 32}, 4, _LAYERS),
    "openai-gpt": (_GPT, 4, _LAYERS),
    "gpt_bigcode": (_GPT, 4, _LAYERS),
    "rwkv": ({"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16,
              "vocab_size": 50, "context_length": 64}, 4, "2 layers: time mixing, channel mixing"),
    "mamba2": ({"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 50,
                "num_heads": 4, "head_dim": 8, "n_groups": 1}, 2,
               "2 layers: x + mixer; the state space's own skip C h + D x is a part of it"),
    **dict.fromkeys(("mt5", "umt5", "longt5"), (_T5, 10, "2 layers of 2, 2 of 3")),
    "switch_transformers": ({**_T5, "num_decoder_layers": 2, "num_experts": 2}, 10,
                            "2 layers of 2, 2 of 3; experts are one branch"),
    **dict.fromkeys(_VITS, (_IMAGE, 4, _LAYERS)),
    "siglip_vision_model": (_IMAGE, 5, f"{_LAYERS}; the pooling's MLP"),
    "swin": (_SWIN, 8, "(2+2) layers of 2"),
    "swinv2": (_SWIN, 8, "(2+2) layers of 2"),
    "convnext": ({"hidden_sizes": [8] * 4, "depths": [1, 1, 2, 1]}, 5, "1+1+2+1"),
    "cvt": ({}, 26, "(1+2+10) layers of 2"),
    "levit": ({}, 26, "(4+4+4) layers of 2, an MLP after each of 2 downsamplings"),
    "pvt": ({}, 16, "(2+2+2+2) layers of 2"),
    "mobilevit": ({}, 20, "2 units, (2+4+3) layers of 2"),
    "mobilenet_v1": ({}, 0, "plain"),
    "regnet": ({}, 22, "2+6+12+2"),
    "bit": ({}, 16, "3+4+6+3"),
    "hiera": ({}, 48, "(2+3+16+3) layers of 2"),
    "wav2vec2": (_SOUND, 5, f"{_LAYERS}; x + position convolution"),
    "hubert": (_SOUND, 5, f"{_LAYERS}; x + position convolution"),
    "wav2vec2-conformer": (_SOUND, 8, "2 layers: MLP, attention, convolution, MLP"),
    "wav2vec2-bert": (_TEXT, 8, "2 layers: MLP, attention, convolution, MLP"),
    "audio-spectrogram-transformer": (_TEXT, 4, _LAYERS),
    "speech_to_text": ({**_BART, "conv_channels": 16}, 13, _CODER),
    "encodec": ({}, 10, "encoder and decoder: 4 units, x + LSTM; weights are normalised"),
    "reformer": ({}, 12, "6 layers of two streams: attention, MLP"),
    "falcon_mamba": ({"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 50},
                     2, "2 layers: x + mixer"),
    "rt_detr": ({}, 40, "3+4+6+3 of the backbone, 2 of the encoder, 4 scales, 6 layers of 3"),
    "detr": (_DETR, 16 + 2 * 2 + 3 * 3, "ResNet-50; position embeddings added in every layer"),
}  # fmt: skip

ALWAYS = {"dla34", "repvit_m0_9", "dpn68", "gcresnet33ts", "regnet_x_400mf", "r3d_18", "bart",
          "deberta", "cohere", "detr", "reformer", "encodec"}  # fmt: skip
"""What a rule was made for, and some of the rest."""


def _rows(table):
    return [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in table]


@pytest.mark.parametrize("name", _rows(TORCHVISION))
def test_the_blocks_of_torchvision_s_other_networks(name):
    arguments = {}
    if "rcnn" in name or "retinanet" in name or "fcos" in name:
        arguments = {"min_size": 64, "max_size": 64}
    count, reason = TORCHVISION[name]
    assert len(inspect_model(f"torchvision:{name}", arguments).blocks) == count, reason


@pytest.mark.parametrize("name", _rows(TIMM))
def test_the_blocks_of_timm_s_other_networks(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(name)
        found = find_blocks(model, torch.zeros(1, *model.pretrained_cfg["input_size"]))
    count, reason = TIMM[name]
    assert len(found) == count, reason
    if reason == _SKIP:
        assert count == sum(getattr(module, "has_skip", False) for module in model.modules())


@pytest.mark.parametrize("name", _rows(TRANSFORMERS))
def test_the_blocks_of_transformers_other_networks(name):
    pytest.importorskip("transformers")
    config, count, reason = TRANSFORMERS[name]
    assert len(inspect_model(f"transformers:{name}", config).blocks) == count, reason


@pytest.mark.slow
def test_the_blocks_of_diffusion_models_are_their_own_block_classes():
    """Counted in the modules: a ResnetBlock2D or an Attention has one block, a transformer 3."""
    diffusers = pytest.importorskip("diffusers")
    x, step = torch.randn(1, 4, 16, 16), torch.tensor([3])
    small = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 2}
    plain = diffusers.UNet2DModel(
        in_channels=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), **small,
    )  # fmt: skip
    guided = diffusers.UNet2DConditionModel(
        cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **small,
    )  # fmt: skip
    for model, inputs, each in (
        (plain, (x, step), {"ResnetBlock2D": 1, "Attention": 1}),
        (guided, (x, step, torch.randn(1, 5, 8)),
         {"ResnetBlock2D": 1, "BasicTransformerBlock": 3, "Transformer2DModel": 1}),
    ):  # fmt: skip
        expected = sum(each.get(type(module).__name__, 0) for module in model.modules())
        assert expected > 10
        assert len(find_blocks(model, *inputs)) == expected


@pytest.mark.parametrize(
    "page",
    ["README.md", "CHANGELOG.md", "docs/explanation/watching.md", "docs/explanation/limits.md"],
)
def test_the_pages_state_how_many_architectures_were_counted(page):
    text = (Path(__file__).parents[2] / page).read_text("utf-8")
    told = re.findall(r"(\d+) (?:published architectures|networks of torchvision, timm)", text)
    tables = [
        *(test_zoo.TIMM, test_zoo.TORCHVISION, test_zoo.TRANSFORMERS),
        *(TIMM, TORCHVISION, TRANSFORMERS),
    ]
    assert told == [str(sum(map(len, tables)))]
