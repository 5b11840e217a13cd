"""The page "Where the paper is silent": choices that it leaves open, and the size of each network."""

import torch
from measuredtables import HEAD, table
from torch import Tensor, nn

from resdiag.models.resnet import build_model
from resdiag.models.variants import VARIANTS

DEPTHS = (20, 56, 110)


def silent_page() -> str:
    """The whole page."""
    head = HEAD.format(source="docs/sizespage.py and the networks themselves")
    return "\n".join([head, _TEXT, "## Size of each network\n", _SIZES, _sizes()])


def _sizes() -> str:
    """Parameters and multiplications of each network, for CIFAR-10."""
    header = ["variant", *(f"{what}, depth {d}" for d in DEPTHS for what in ("parameters", "MACs"))]
    rows = []
    for name in VARIANTS:
        row = [f"`{name}`"]
        for depth in DEPTHS:
            model = build_model(name, depth, seed=0)
            weights = sum(p.numel() for p in model.parameters())
            row += [f"{weights:,}", f"{multiplications(model) / 1e6:.1f} M"]
        rows.append(row)
    return table(header, rows)


def multiplications(model: nn.Module) -> int:
    """Multiply-accumulate operations of convolutions and linear layers, one image of 32 x 32."""
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, Tensor)
        total += output.numel() * weight[0].numel()

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    return total


_SIZES = """Parameters, and multiply-accumulate operations (MACs) of convolutions and the classifier for one image. BatchNorm and
activations are not counted as MACs. d has fewer BatchNorms than `original`, which is all that their parameters differ by.
"""

_TEXT = """# Where the paper is silent

Shah et al. 2016 (arXiv:1604.04112) give the learning rate 0.1, divided by 10 after 81 and 122 epochs, batches of 128, momentum 0.9, weight
decay 1e-4 and the augmentation. What a training needs beyond that was chosen as below. fb.resnet.torch is the public code whose recipe the
paper's numbers fit.

| choice | the paper | here | why | to change it |
| --- | --- | --- | --- | --- |
| kind of momentum | not said | Nesterov's | fb.resnet.torch; He et al. 2015 used the plain one | `--no-nesterov` |
| number of epochs | not said; its plots end behind 125 | 164 | fb.resnet.torch: 64,000 steps of He et al. 2015 | `--epochs` |
| drops of the rate in a shorter training | - | after 0.494 and 0.744 of the steps | the fractions of 81 and 122 of 164 epochs | `--epochs`, `--steps` |
| warm-up | not mentioned | none | He et al. 2015 started 110 layers at 0.01 until the training error fell below 80 %; here it is counted in steps | `--warmup` |
| initialisation | "of [5]" (He et al. 2015, arXiv:1502.01852) | N(0, 2 / (k k C_out)), by fan_out | fb.resnet.torch; fan_in differs where a stage begins | - |
| biases of convolutions | not said | none, in all variants | fb.resnet.torch; a and b would otherwise have some | - |
| weight decay | 1e-4 | on all parameters, those of BatchNorm too | fb.resnet.torch | `--weight-decay` |
| stem | not said | a, c, d: convolution and ELU, without BatchNorm; b: convolution, since its blocks begin with the ELU | "ELU instead of the combination of ReLU and Batch Normalization" | `--stem-bn` |
| head of a and b | not said | b: ELU before the pooling, as d; a: nothing, as its branch ends with an ELU | on a, an ELU there changes less than 0.2 % of the outputs from depth 56 on | - |
| shortcut where a stage begins | "id()" | option A: every second pixel, zeros for new channels | He et al. 2015, section 4.2, for CIFAR | - |
| b's blocks where a stage begins | not said | the ELU stands on the branch only | fb.resnet.torch's pre-activation puts it on both paths | - |
| batch statistics | batches of 128 on one GPU | over all 128 | He et al. 2015 had 64 on each of two GPUs | `--batch-size` |
| error that is reported | "epoch with lowest validation error" | the final one; the lowest is recorded too | no validation images are mentioned, and the lowest test error is chosen by the test images | - |

How much each matters was not measured here, apart from the first steps; [the paper's claims](../studies/claims.md) lists what is known of
its results.
"""
