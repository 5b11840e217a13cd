"""Networks that torchvision builds, in small configurations, for images of 32 x 32 pixels."""

from functools import partial
from typing import Any

import torchvision
from torch import nn
from torchvision.models import densenet, efficientnet, mobilenetv2, regnet, resnet, swin_transformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.vgg import make_layers

from resdiag.pathologies.tasks import CLASSES


def _made(model: Any) -> nn.Module:  # noqa: ANN401
    assert isinstance(model, nn.Module)
    return model


def basic_resnet(width: int = 16) -> nn.Module:
    """A narrow ResNet of torchvision's basic blocks."""
    half = nn.Sequential(nn.Conv2d(width, 2 * width, 1, 2), nn.BatchNorm2d(2 * width))
    make = resnet.BasicBlock
    units = [make(width, width), make(width, width), make(width, 2 * width, 2, half)]
    return _residual(width, [*units, make(2 * width, 2 * width)])


def resnext(width: int = 16) -> nn.Module:
    """A narrow ResNeXt of torchvision's bottlenecks with four groups."""
    half = nn.Sequential(nn.Conv2d(width, 2 * width, 1, 2), nn.BatchNorm2d(2 * width))
    make = partial(resnet.Bottleneck, groups=4, base_width=32)
    first, last = width // 4, width // 2
    units = [make(width, first), make(width, first), make(width, last, 2, half)]
    return _residual(width, [*units, make(2 * width, last)])


def _residual(width: int, units: list[nn.Module]) -> nn.Module:
    stem = nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    tail = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, CLASSES)
    return nn.Sequential(*stem, *units, *tail)


def dense() -> nn.Module:
    """A DenseNet: every layer's input is the concatenation of all before."""
    return _made(densenet.DenseNet(8, (2, 3, 2), 16, num_classes=CLASSES))


def vgg() -> nn.Module:
    """A VGG with BatchNorm and dropout, narrow."""
    features = make_layers([16, "M", 32, "M", 32, "M", 32], batch_norm=True)
    head = nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, CLASSES)
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *head)


def mobilenet() -> nn.Module:
    """A MobileNetV2: inverted residuals with linear bottlenecks."""
    setting = [[1, 8, 1, 1], [3, 12, 2, 2], [3, 16, 3, 2]]
    return _made(
        mobilenetv2.MobileNetV2(
            CLASSES, inverted_residual_setting=setting, width_mult=1.0, dropout=0.1
        )
    )


def efficient() -> nn.Module:
    """An EfficientNet: inverted residuals with squeeze-and-excitation and stochastic depth."""
    row = partial(efficientnet.MBConvConfig, width_mult=1.0, depth_mult=1.0)
    setting = [row(1, 3, 1, 16, 8, 1), row(3, 3, 2, 8, 16, 2), row(3, 3, 2, 16, 24, 3)]
    return _made(
        efficientnet.EfficientNet(
            setting, 0.1, stochastic_depth_prob=0.1, num_classes=CLASSES, last_channel=64
        )
    )


def regular() -> nn.Module:
    """A RegNetY: grouped bottlenecks with squeeze-and-excitation."""
    params = regnet.BlockParams.from_init_params(
        depth=5, w_0=16, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25
    )
    return _made(regnet.RegNet(params, num_classes=CLASSES, stem_width=16))


def convnext(scale: float = 1e-2) -> nn.Module:
    """A ConvNeXt; `scale` is where its LayerScale begins."""
    setting = [CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)]
    return _made(ConvNeXt(setting, layer_scale=scale, num_classes=CLASSES))


def vision_transformer(layers: int = 3) -> nn.Module:
    """The VisionTransformer of torchvision, for images of 16 x 16 pixels."""
    return _made(
        torchvision.models.VisionTransformer(16, 4, layers, 2, 32, 64, num_classes=CLASSES)
    )


def swin() -> nn.Module:
    """A Swin transformer: attention in shifted windows."""
    return _made(
        swin_transformer.SwinTransformer(
            patch_size=[4, 4], embed_dim=24, depths=[2, 2], num_heads=[2, 2], window_size=[4, 4],
            stochastic_depth_prob=0.0, num_classes=CLASSES,
        )
    )  # fmt: skip


def shuffle() -> nn.Module:
    """A ShuffleNetV2: channels are split, convolved, concatenated and shuffled."""
    return _made(
        torchvision.models.ShuffleNetV2([1, 2, 1], [8, 16, 32, 32, 64], num_classes=CLASSES)
    )


def squeeze() -> nn.Module:
    """SqueezeNet 1.1: fire modules, no norm, dropout."""
    return _made(torchvision.models.squeezenet1_1(num_classes=CLASSES))


def mnas() -> nn.Module:
    """MNASNet at a quarter of the width."""
    return _made(torchvision.models.MNASNet(0.25, num_classes=CLASSES, dropout=0.1))
