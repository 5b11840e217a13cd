"""One configurable CIFAR ResNet: a row of the variants table, a depth, a width.

Letters in shapes: N batch, C channels, H and W height and width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resdiag.errors import UsageError
from resdiag.models.variants import STAGE_CHANNELS, Variant, count_blocks, find_variant


class OptionA(nn.Module):
    """Parameter-free shortcut across a stage change: subsample, append zero channels.

    The zeros come after the real channels, as in fb.resnet.torch `models/resnet.lua`
    (shortcut type A, He et al. 2015 section 4.2).

    Args:
        channels: Channels of the output; at least those of the input.
        stride: Spatial subsampling.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, channels, H/stride, W/stride)."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.channels - x.shape[1]))


class Block(nn.Module):
    """One unit `x' = f(h(x) + F(x))`; without a shortcut `x' = f(F(x))`.

    Args:
        row: The variant.
        inputs: Channels of x.
        channels: Channels of x'.
        stride: Stride of the first convolution and of the shortcut.
    """

    def __init__(self, row: Variant, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.branch = _sequence(row.branch, inputs, channels, stride)
        self.shortcut: nn.Module | None = None
        if row.shortcut:
            same = inputs == channels and stride == 1
            self.shortcut = nn.Identity() if same else OptionA(channels, stride)
        self.after_add = _sequence("" if row.after_add == "none" else row.after_add, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, channels, H/stride, W/stride)."""
        y: Tensor = self.branch(x)
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        out: Tensor = self.after_add(y)
        return out


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al. 2015 section 4.2 with the units of one variant.

    Attributes:
        unit_names: Names of the blocks in forward order, for `resdiag.attach(blocks=...)`.
    """

    def __init__(
        self,
        row: Variant,
        depth: int,
        *,
        width: float = 1.0,
        num_classes: int = 10,
        in_channels: int = 3,
        stem_bn: bool = False,
        branch_scale: float = 1.0,
    ) -> None:
        super().__init__()
        count = count_blocks(depth)
        widths = [max(1, round(channels * width)) for channels in STAGE_CHANNELS]
        self.stem = _sequence(_stem(row, stem_bn), in_channels, widths[0])
        self.stages = nn.ModuleList()
        inputs = widths[0]
        for stage, channels in enumerate(widths):
            strides = [2 if stage else 1] + [1] * (count - 1)
            blocks = nn.Sequential()
            for stride in strides:
                blocks.append(Block(row, inputs, channels, stride))
                inputs = channels
            self.stages.append(blocks)
        self.head = _sequence(row.head, inputs)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs, num_classes)
        self.unit_names = [
            f"stages.{s}.{b}" for s in range(len(STAGE_CHANNELS)) for b in range(count)
        ]
        _initialise(self)
        scale_branches(self, branch_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.classifier(self.pool(self.head(x)).flatten(1))
        return logits


def build_model(
    variant: str,
    depth: int,
    *,
    width: float = 1.0,
    num_classes: int = 10,
    in_channels: int = 3,
    stem_bn: bool = False,
    branch_scale: float = 1.0,
    seed: int | None = None,
) -> ResNet:
    """Build one of the variants.

    Convolutions have no bias and are drawn from N(0, 2 / (k k C_out)) (He et al. 2015,
    arXiv:1502.01852, with fan_out as in fb.resnet.torch); the classifier has PyTorch's default
    weights and zero bias; BatchNorm starts at gain 1, bias 0.

    Args:
        variant: Id or letter, see `resdiag variants`.
        depth: 6n+2.
        width: Multiple of the 16/32/64 channels.
        num_classes: Outputs of the classifier.
        in_channels: Channels of the images.
        stem_bn: Put BatchNorm after the stem's convolution where the row has none.
        branch_scale: See `scale_branches`.
        seed: Seed of the weights; None draws from the global generator.

    Raises:
        UsageError: Unknown variant, a depth other than 6n+2, or a width that is not positive.

    >>> sum(p.numel() for p in build_model("original", 20, seed=0).parameters())
    269722
    """
    row = find_variant(variant)
    count_blocks(depth)
    if not width > 0:
        raise UsageError(f"width {width} must be positive; 1 is the paper's 16/32/64 channels")
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return ResNet(
            row,
            depth,
            width=width,
            num_classes=num_classes,
            in_channels=in_channels,
            stem_bn=stem_bn,
            branch_scale=branch_scale,
        )


def scale_branches(network: ResNet, factor: float) -> None:
    """Multiply the last weights of each branch in place: of a convolution, or of a BatchNorm.

    An activation behind them (variant a) is left as it is, so the branch itself is scaled only as
    far as that is linear.
    """
    if factor == 1:
        return
    for name in network.unit_names:
        branch = network.get_submodule(f"{name}.branch")
        *_, last = (m for m in branch.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d))
        with torch.no_grad():
            last.weight.mul_(factor)


def _stem(row: Variant, stem_bn: bool) -> str:
    """The stem's operations; BatchNorm is inserted after its convolution on request."""
    steps = row.stem.split("-")
    if stem_bn and "bn" not in steps:
        steps.insert(1, "bn")
    return "-".join(steps)


def _sequence(steps: str, inputs: int, channels: int | None = None, stride: int = 1) -> nn.Module:
    """Modules for a row's "conv-bn-relu"; the first convolution changes width and resolution."""
    layers: list[nn.Module] = []
    for step in filter(None, steps.split("-")):
        if step == "conv":
            outputs = channels or inputs
            layers.append(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False))
            inputs, stride = outputs, 1
        elif step == "bn":
            layers.append(nn.BatchNorm2d(inputs))
        else:
            layers.append({"relu": nn.ReLU, "elu": nn.ELU}[step]())
    return nn.Sequential(*layers) if layers else nn.Identity()


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
