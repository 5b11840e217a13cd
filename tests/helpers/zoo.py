"""Small published networks that are really run."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig


class ResnetBlock(nn.Module):
    """As in diffusion models: norm, SiLU and convolution twice, the time between them."""

    def __init__(self, before, after, time=8):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, before), nn.GroupNorm(2, after)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.time, self.dropout = nn.Linear(time, after), nn.Dropout(0.1)
        self.shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x, time):
        y = self.conv1(F.silu(self.norm1(x)))
        y = y + self.time(F.silu(time))[:, :, None, None]  # added, and no block
        y = self.conv2(self.dropout(F.silu(self.norm2(y))))
        return (self.shortcut(x) + y) / 1.0


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens)[:, None].chunk(3, dim=-1)
        y = self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + y.transpose(1, 2).reshape(n, c, h, w)


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 8))
        self.enter, self.leave = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 10, 1)
        self.down1, self.down2 = ResnetBlock(8, 8), ResnetBlock(8, 16)
        self.smaller, self.attention = nn.Conv2d(8, 8, 3, 2, 1), Attention(16)
        self.up2, self.up1 = ResnetBlock(32, 8), ResnetBlock(16, 8)

    def forward(self, x):
        angle = x.mean((1, 2, 3))[:, None] * torch.arange(1, 3)
        time = self.time(torch.cat([angle.sin(), angle.cos()], 1))
        one = self.down1(self.enter(x), time)
        two = self.down2(self.smaller(one), time)
        y = self.up2(torch.cat([self.attention(two), two], 1), time)
        y = self.up1(torch.cat([F.interpolate(y, scale_factor=2.0), one], 1), time)
        return self.leave(y).mean((2, 3))


def convnext():
    widths = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)]
    return models.ConvNeXt(widths, stochastic_depth_prob=0.3, num_classes=10)


def vit():
    model = models.VisionTransformer(32, 8, 2, 2, 16, 32, dropout=0.1, num_classes=10)
    nn.init.normal_(model.heads.head.weight, std=0.1)  # torchvision's zeros give no gradient
    return model


def swin():
    sizes = {"patch_size": [4, 4], "embed_dim": 8, "window_size": [2, 2], "num_classes": 10}
    return models.SwinTransformer(depths=[1, 2], num_heads=[1, 2], **sizes)


def densenet():
    return models.DenseNet(4, (2, 2), 8, bn_size=2, drop_rate=0.1, num_classes=10)


def resnetv2():
    resnetv2 = pytest.importorskip("timm.models.resnetv2")
    return resnetv2.ResNetV2([1, 2], channels=(128, 256), num_classes=10, stem_chs=32)


def nfnet():
    nfnet = pytest.importorskip("timm.models.nfnet")
    config = nfnet.NfCfg(depths=(1, 2), channels=(16, 32), stem_type="3x3", stem_chs=8)
    return nfnet.NormFreeNet(config, num_classes=10, drop_path_rate=0.2)


def gpt2():
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=10)
    )


_SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 10}


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **_SMALL)
    return transformers.LlamaForCausalLM(config)


def t5():
    transformers = pytest.importorskip("transformers")
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=10)
    )


def encoder(norm_first):
    layer = nn.TransformerEncoderLayer(10, 2, 16, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def images():
    return {"": torch.randn(4, 3, 32, 32)}


def ids():
    return {"input_ids": torch.randint(10, (4, 6))}


def both_ids():
    return {**ids(), "decoder_input_ids": torch.randint(10, (4, 5))}


def tokens():
    return {"": torch.randn(4, 6, 10)}


def halves(layers, second):
    """Of each layer: what goes into its second half, and its output."""
    return [site for layer in layers for site in (f"{layer}.{second} in", layer)]


STACKS = [("encoder", layer, part) for layer in range(2) for part in range(2)]
STACKS += [("decoder", layer, part) for layer in range(2) for part in range(3)]


# model: (factory, inputs, where its blocks end, names of its blocks if it has no addition)
REAL = {
    "resnet18": (
        lambda: models.resnet18(num_classes=10),
        images,
        [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)],
        None,
    ),
    "convnext": (convnext, images, ["features.1.0", "features.3.0", "features.3.1"], None),
    "vit": (
        vit,
        images,
        halves([f"encoder.layers.encoder_layer_{i}" for i in range(2)], "ln_2"),
        None,
    ),
    "swin": (
        swin,
        images,
        halves(["features.1.0", "features.3.0", "features.3.1"], "norm2"),
        None,
    ),
    "resnetv2": (
        resnetv2,
        images,
        ["stages.0.blocks.0", "stages.1.blocks.0", "stages.1.blocks.1"],
        None,
    ),
    "nfnet": (nfnet, images, ["stages.0.0", "stages.1.0", "stages.1.1"], None),
    "gpt2": (gpt2, ids, halves(["transformer.h.0", "transformer.h.1"], "ln_2"), None),
    "llama": (
        llama,
        ids,
        halves(["model.layers.0", "model.layers.1"], "post_attention_layernorm"),
        None,
    ),
    "t5": (t5, both_ids, ["{}.block.{}.layer.{}".format(*place) for place in STACKS], None),
    "unet": (UNet, images, ["down1", "down2", "attention", "up2", "up1"], None),
    "densenet": (
        densenet,
        images,
        ["features.denseblock1", "features.denseblock2"],
        ["features.denseblock*"],
    ),
    "pre-norm encoder": (
        lambda: encoder(norm_first=True),
        tokens,
        halves(["layers.0", "layers.1"], "norm2"),
        None,
    ),
    "post-norm encoder": (
        lambda: encoder(norm_first=False),
        tokens,
        halves(["layers.0", "layers.1"], "linear1"),
        None,
    ),
}


def build(name):
    torch.manual_seed(4)
    make, inputs, _, _ = REAL[name]
    return make(), inputs()


def loss_of(model, inputs):
    """Cross-entropy against class 0."""
    out = model(inputs[""]) if "" in inputs else model(**inputs)
    logits = out if isinstance(out, torch.Tensor) else out.logits
    return F.cross_entropy(logits.flatten(0, -2), torch.zeros(logits[..., 0].numel()).long())
