"""The table of architectures: how each is built, what it learns, the rates at which it does."""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from resdiag.models.resnet import build_model
from resdiag.pathologies import convnets, library, perceptrons, transformers
from resdiag.pathologies.layers import Attention, Mixture, Scale, Tied, Unit
from resdiag.pathologies.tasks import TASKS, Task
from resdiag.watch.find.blocks import Block, find_blocks, find_units

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
"""Modules of PyTorch that normalise."""
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh)
"""Activations that a fault can replace."""
DROPOUTS = (nn.Dropout, nn.Dropout2d)
_LONG = 3


@dataclass(frozen=True)
class Architecture:
    """One network and how it is trained.

    Attributes:
        name: What it is called.
        family: Architectures that share a construction; a family is in one set only.
        build: Makes it from the global random state.
        task: Name of a task in `TASKS`.
        sgd: Learning rate of SGD with momentum 0.9 at which it learns; 0 where it does not.
        adam: The same for Adam and its relatives.
        samples: Samples per step.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    task: str
    sgd: float
    adam: float
    samples: int = 16

    @property
    def learns(self) -> Task:
        """The task."""
        return TASKS[self.task]


@dataclass(frozen=True)
class Traits:
    """What an architecture has, so that faults and recipes fit it.

    Attributes:
        words: Words for what it has, see `traits_of`.
        blocks: What a monitor finds: residual blocks, or units where there are none.
        spots: By trait of a block, the indices of the blocks that have it.
    """

    words: frozenset[str]
    blocks: tuple[Block, ...]
    spots: dict[str, tuple[int, ...]]

    def has(self, *words: str) -> bool:
        """Whether it has all of these; one that begins with "no " must be missing."""
        return all(
            word.removeprefix("no ") not in self.words
            if word.startswith("no ")
            else word in self.words or bool(self.spots.get(word))
            for word in words
        )


def blocks_of(model: nn.Module, inputs: torch.Tensor) -> list[Block]:
    """The residual blocks; the units where there is no residual addition."""
    return find_blocks(model, inputs) or find_units(model, inputs)


@functools.cache
def traits_of(architecture: Architecture) -> Traits:
    """Build an architecture once and look at what it has.

    Words: "residual", "norm", "batchnorm", "batchnorm1d", "dropout", "attention", "image",
    "tokens", "classes", the names of the family and of the task, "variant" for our own networks,
    "stages" (several), "long stages" (one of `_LONG` blocks at least), "norms end branches",
    "nothing after additions", "scaled" (branches have a learned factor that begins small), "tied"
    (head and embedding), "linear in blocks", "sgd" (it learns by SGD).

    Traits of blocks: "branch" (a module returns it), "shiftable" (so, and no norm follows the
    addition), "shortcut" (the identity by a module that can be replaced), "join" (the addition can
    be replaced), "after" (what follows it can be), "inner norm", "activation", "weights",
    "attention block", "experts", "next to others" (neither the first nor the last of several).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = architecture.build()
        task = architecture.learns
        blocks = tuple(blocks_of(model, task.batch(0, 0, 4)[0]))
    modules = list(model.modules())
    residual = any(block.shortcut != "none" for block in blocks)
    words: dict[str, bool] = {
        architecture.family: True,
        architecture.task: True,
        "residual": residual,
        "norm": any(_is_norm(m) for m in modules),
        "batchnorm": any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules),
        "batchnorm1d": any(isinstance(m, nn.BatchNorm1d) for m in modules),
        "dropout": any(isinstance(m, DROPOUTS) for m in modules),
        "attention": any(isinstance(m, Attention) for m in modules),
        "image": task.is_image,
        "tokens": task.is_tokens,
        "classes": bool(task.classes),
        "variant": "variant" in architecture.family,
        "long stages": max(Counter(block.stage for block in blocks).values()) >= _LONG,
        "stages": len({block.stage for block in blocks}) > 1,
        "norms end branches": all(_ends_in_norm(model, block) for block in blocks),
        "nothing after additions": residual and all(b.after_add == "none" for b in blocks),
        "sgd": bool(architecture.sgd),
        "scaled": any(isinstance(m, Scale) or hasattr(m, "layer_scale") for m in modules),
        "tied": any(isinstance(m, Tied) for m in modules),
        "linear in blocks": any(
            isinstance(m, nn.Linear)
            for b in blocks
            if b.owner
            for m in model.get_submodule(b.owner).modules()
        ),
    }
    found: dict[str, list[int]] = {}
    for block in blocks:
        for trait in _traits_of_block(model, block, len(blocks)):
            found.setdefault(trait, []).append(block.index)
    return Traits(
        frozenset(word for word, holds in words.items() if holds),
        blocks,
        {trait: tuple(indices) for trait, indices in found.items()},
    )


def _traits_of_block(model: nn.Module, block: Block, count: int) -> list[str]:
    owner = model.get_submodule(block.owner)
    inside = list(owner.modules())
    alone = bool(block.owner)  # the model itself is no place: everything lies inside
    found = {
        "branch": alone and bool(block.branch_module),
        "shortcut": alone and _has_shortcut(model, owner, block),
        "join": isinstance(owner, Unit) and block.shortcut == "identity",
        "inner norm": alone and any(_is_norm(m) for m in inside),
        "activation": alone and any(isinstance(m, ACTIVATIONS) for m in inside),
        "weights": alone and any(p.dim() > 1 for p in owner.parameters()),
        "attention block": any(isinstance(m, Attention) for m in inside),
        "experts": any(isinstance(m, Mixture) for m in inside),
        "shiftable": alone and bool(block.branch_module) and "norm" not in block.after_add,
        "after": hasattr(owner, "after") or hasattr(owner, "after_add"),
        "next to others": alone and 0 < block.index < count - 1,
        "own": alone,
    }
    return [trait for trait, holds in found.items() if holds]


def _ends_in_norm(model: nn.Module, block: Block) -> bool:
    return bool(block.branch_module) and _is_norm(
        list(model.get_submodule(block.branch_module).modules())[-1]
    )


def _has_shortcut(model: nn.Module, owner: nn.Module, block: Block) -> bool:
    """Whether its identity shortcut is a module of its own, or can be made one."""
    if block.shortcut != "identity" or (block.transition and block.index):
        return False
    if isinstance(owner, BasicBlock | Bottleneck):
        return owner.downsample is None
    return bool(block.shortcut_module) and isinstance(
        model.get_submodule(block.shortcut_module), nn.Identity
    )


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, NORMS) or type(module).__name__.endswith("RMSNorm")


def _ours(name: str, depth: int, family: str, sgd: float = 0.05) -> Architecture:
    build = partial(build_model, name, depth, width=0.25)
    return Architecture(f"{name}-{depth}", family, build, "images 16", sgd, 3e-3)


_P, _T, _C, _L = perceptrons, transformers, convnets, library
_RELU, _GELU, _ELU, _TANH = nn.ReLU, nn.GELU, nn.ELU, nn.Tanh

DEVELOPMENT = (
    *(_ours(name, 8, "ReLU variant") for name in ("original", "relu_pre")),
    _ours("original", 14, "ReLU variant"),
    _ours("no_relu", 20, "ReLU variant"),
    Architecture(
        "residual-mlp", "residual perceptron", partial(_P.residual_perceptron, 5),
        "vectors", 0.03, 3e-3, 32,
    ),
    Architecture(
        "residual-mlp-regression", "residual perceptron",
        partial(_P.residual_perceptron, 4, _GELU, outputs=2), "regression", 0.02, 3e-3,
    ),
    Architecture(
        "residual-mlp-dropout", "residual perceptron",
        partial(_P.residual_perceptron, 4, _ELU, dropout=0.1), "vectors", 0.03, 3e-3, 32,
    ),
    Architecture(
        "bare-residual", "bare residual perceptron",
        partial(_P.residual_perceptron, 4, norm=False), "vectors", 0.01, 1e-3, 32,
    ),
    Architecture(
        "plain-mlp", "plain perceptron", partial(_P.plain_perceptron, 5, _RELU, 1.41),
        "vectors", 0.02, 2e-3, 32,
    ),
    Architecture(
        "plain-mlp-bn", "plain perceptron",
        partial(_P.plain_perceptron, 4, _RELU, 1.41, norm=True), "vectors", 0.05, 3e-3, 32,
    ),
    Architecture("vit", "vision transformer", _L.vision_transformer, "images 16", 0.0, 2e-3, 32),
    Architecture("vit-mean", "vision transformer", _T.vision_encoder, "images 16", 0.0, 3e-3),
    Architecture("gpt", "decoder", _T.decoder, "next word", 0.0, 5e-3),
    Architecture("gpt-tied", "decoder", partial(_T.decoder, 2, tied=True), "next word", 0.0, 5e-3),
    Architecture("mixture", "mixture of experts", _T.mixture_decoder, "next word", 0.0, 5e-3),
    Architecture("bottlenecks-gn", "bottleneck", _C.bottlenecks, "images 16", 0.05, 3e-3),
    Architecture("resnet18", "basic resnet", _L.basic_resnet, "images 32", 0.02, 2e-3),
    Architecture("mobilenet", "mobilenet", _L.mobilenet, "images 32", 0.02, 3e-3),
    Architecture("gru", "gated recurrent", _P.gru, "sequences", 0.0, 5e-3),
    Architecture("unet", "U-Net", _C.UNet, "denoising", 0.0, 3e-3),
    Architecture("convnet-bn", "plain convnet", _C.plain, "images 16", 0.05, 3e-3),
    Architecture(
        "convnet-dropout", "plain convnet", partial(_C.plain, 3, dropout=0.1),
        "images 16", 0.05, 3e-3,
    ),
    Architecture("temporal", "temporal convnet", _C.temporal, "sequences", 0.05, 3e-3),
)  # fmt: skip
"""Faults are planted in these while rules are written; thresholds may be set on them."""

LOCKED = (
    *(_ours(name, 8, "ELU variant") for name in ("elu", "elu_after")),
    _ours("elu", 20, "ELU variant"),
    Architecture(
        "rezero", "ReZero perceptron",
        partial(_P.residual_perceptron, 5, norm=False, rezero=0.0), "vectors", 0.02, 2e-3, 32,
    ),
    Architecture("llama", "llama", _T.llama, "next word", 0.0, 5e-3),
    Architecture("gpt-j", "parallel decoder", _T.parallel_decoder, "next word", 0.0, 5e-3),
    Architecture(
        "bert", "post-norm encoder", partial(_T.masked_encoder, 2, 48),
        "masked words", 0.0, 3e-3, 32,
    ),
    Architecture(
        "post-norm", "post-norm encoder", _T.post_norm_classifier, "sequences", 0.0, 2e-3
    ),
    Architecture("encoder", "pre-norm encoder", _T.encoder, "sequences", 0.0, 3e-3),
    Architecture(
        "cait", "LayerScale transformer", partial(_T.vision_encoder, scale=1e-4),
        "images 16", 0.0, 6e-3,
    ),
    Architecture("mixer", "mixer", partial(_P.mixer, 3), "images 16", 0.0, 3e-3),
    Architecture("graph", "graph network", partial(_P.graph_network, 4), "images 16", 0.0, 3e-3),
    Architecture("highway", "highway", partial(_P.highway, 4), "vectors", 0.05, 3e-3, 32),
    Architecture("se", "squeeze-and-excitation", _C.squeeze_excite, "images 16", 0.05, 3e-3),
    Architecture(
        "se-pairs", "squeeze-and-excitation", partial(_C.squeeze_excite, 3, outputs=16),
        "pairs", 0.05, 3e-3, 32,
    ),
    Architecture("pre-activation", "pre-activation", _C.pre_activation, "images 16", 0.05, 3e-3),
    Architecture(
        "pre-activation-gelu", "pre-activation", partial(_C.pre_activation, 3, 24, _GELU),
        "images 16", 0.05, 3e-3,
    ),
    Architecture("fixup", "bare residual convnet", _C.bare_residual, "images 16", 0.0, 5e-3),
    Architecture(
        "convnet-bare", "bare convnet", partial(_C.plain, 3, 32, norm=False), "images 16", 0.0, 2e-3
    ),
    Architecture(
        "tanh-mlp", "tanh perceptron", partial(_P.plain_perceptron, 4, _TANH, 1.0),
        "vectors", 0.03, 2e-3, 32,
    ),
    Architecture(
        "elu-mlp-bn", "tanh perceptron",
        partial(_P.plain_perceptron, 4, _ELU, 1.2, norm=True), "vectors", 0.03, 3e-3, 32,
    ),
    Architecture("resnext", "bottleneck resnet", _L.resnext, "images 32", 0.02, 2e-3),
    Architecture("regnet", "regnet", _L.regular, "images 32", 0.05, 3e-3),
    Architecture("densenet", "densenet", _L.dense, "images 32", 0.05, 3e-3),
    Architecture("vgg", "vgg", _L.vgg, "images 32", 0.02, 1e-3),
    Architecture("efficientnet", "efficientnet", _L.efficient, "images 32", 0.05, 3e-3),
    Architecture("convnext", "convnext", _L.convnext, "images 32", 0.0, 3e-3),
    Architecture("swin", "swin", _L.swin, "images 32", 0.0, 1e-3, 32),
    Architecture("shufflenet", "shufflenet", _L.shuffle, "images 32", 0.05, 3e-3),
    Architecture("lstm", "long short-term memory", _P.lstm, "sequences", 0.0, 1e-2),
    Architecture("autoencoder", "autoencoder", _C.autoencoder, "denoising", 0.0, 5e-3),
)  # fmt: skip
"""No threshold is set on what happens in these: their first score counts."""

SETS = {"development": DEVELOPMENT, "locked": LOCKED}
"""The architectures of each set; no family is in both."""
