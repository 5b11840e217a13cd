"""What one traced pass shows of the parts of a network beside its blocks.

Of each normalisation the variance that it divides by, of each attention how its weights spread, of
each module whether it has an addition as its likes have. It is read once, in the first traced pass;
the numbers stay on the device until somebody asks for them.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resdiag.watch.base.functions import NORMALISATIONS, name_of
from resdiag.watch.base.safety import Guard, guarded
from resdiag.watch.base.tensors import first_floating, mesh_of, tensors_in
from resdiag.watch.find.additions import Addition
from resdiag.watch.find.passes import Operands, Surveyor
from resdiag.watch.measure.attention import (
    READERS,
    Unreadable,
    describe,
    read_logits,
    softmax_dimension,
    spread,
)

_SAMPLES = 4
"""Samples of the batch that attention and normalisations within a sample are read on."""

_LEAST_LIKE = 3
"""Modules of a kind that have an addition before one that has none is missed."""

_EPSILONS = ("eps", "variance_epsilon", "epsilon")


@dataclass(eq=False)
class Place:
    """Where in the pass something ran.

    Attributes:
        name: The innermost module that was running.
        blocks: How many blocks had begun.
    """

    name: str
    blocks: int


@dataclass(eq=False)
class Normalisation(Place):
    """One normalisation of the pass; tensors are 0-d.

    Attributes:
        kind: Name of the function: "batch_norm", "layer_norm", ...
        count: Numbers that each mean and variance is taken over.
        eps: What is added to the variance.
        variance: Median variance of what is normalised; for an RMS norm the mean square.
        gain: Largest magnitude of the learned factor; None without one.
    """

    kind: str
    count: int
    eps: float
    variance: Tensor
    gain: Tensor | None


@dataclass(eq=False)
class Attention(Place):
    """One attention of the pass; tensors are 0-d.

    Attributes:
        entropy: Mean over queries of the entropy of the weights over that of uniform ones.
        spread: Mean over queries of the largest logit minus the smallest.
    """

    entropy: Tensor
    spread: Tensor


class Inspection(Surveyor):
    """Looks at the parts of a network in one pass.

    Args:
        modules: The model's modules by name.
        step: Number of the training step.
        weights: Whether to read all weights, too, for those that are equal.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], step: int, *, weights: bool = False
    ) -> None:
        self.guard, self.is_whole, self.step = Guard(), False, step
        self._modules, self._weights = modules, weights
        self._owners: list[str] = []  # of the blocks that have begun
        self._branches: list[str] = []  # the modules that made their branches, or ""
        self._open: list[str] = []
        self._entered: list[Tensor | None] = []
        self._idle: set[str] = set()  # modules that handed on their very input
        self._calls: Counter[str] = Counter()
        self._shapes: dict[str, tuple[torch.Size | None, torch.Size | None]] = {}
        self._order: dict[str, int] = {}  # blocks that had begun when a module first ran
        self.normalisations: list[Normalisation] = []
        self.attentions: list[Attention] = []
        self.constant: list[tuple[str, Tensor]] = []

    @guarded
    def started(self, inputs: Sequence[Tensor]) -> None:
        """The pass begins."""
        if self._weights:
            with torch.no_grad():
                self.constant = list(_constant(self._modules))

    def operands(self, addition: Addition, tensors: Operands) -> None:
        """A block has begun, or has one branch more."""
        if not addition.extends:
            self._owners.append(addition.owner)
            self._branches.append(addition.branch_module)

    def finished(
        self, features: Tensor | None, logits: Tensor | None, outputs: Sequence[Tensor]
    ) -> None:
        """The pass has ended as it should."""
        self._entered.clear()
        self.is_whole = not self.guard.failure

    @guarded
    def enters(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A module's forward begins."""
        x = first_floating([*tensors_in(args), *tensors_in(kwargs)])
        self._calls[name] += 1
        self._open.append(name)
        self._entered.append(x)
        self._shapes.setdefault(name, (None if x is None else x.shape, None))
        self._order.setdefault(name, len(self._owners))
        with torch.no_grad(), torch._C.DisableTorchFunction():
            self._see_module(name, x)

    def leaves(self, name: str, module: nn.Module, output: Any) -> Any:  # noqa: ANN401
        """A module's forward has ended; an exception may have ended calls inside it."""
        self._left(name, output)
        return output

    @guarded
    def _left(self, name: str, output: object) -> None:
        x, given = first_floating(tensors_in(output)), None
        while self._open:
            given = self._entered.pop()
            if self._open.pop() == name:
                break
        if x is given:
            self._idle.add(name)
        entered = self._shapes.get(name, (None, None))[0]
        self._shapes[name] = entered, None if x is None else x.shape

    @guarded
    def reads(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """An operation is about to run."""
        name = name_of(func)
        with torch.no_grad(), torch._C.DisableTorchFunction():
            if name in NORMALISATIONS:
                self._see_normalisation(name, args, kwargs)
            elif name in READERS and (name != "softmax" or self._is_attention(args, kwargs)):
                self._see_attention(name, args, kwargs)

    def lacking(self) -> list[dict[str, Any]]:
        """Modules that add nothing although their likes do: name, blocks before it, how many do.

        Two modules are alike if they are of one class, in lists of one name but for numbers, and
        hand on tensors of the shape that they got.
        """
        found: dict[str, dict[str, Any]] = {}
        for of in (self._owners, self._branches):
            counts = Counter(name for name in of if name)
            for alike in self._groups(counts):
                having = [name for name in alike if counts[name]]
                for name in (n for n in alike if len(having) >= _LEAST_LIKE):
                    place = name.rpartition(".")[0]
                    usual = [counts[n] for n in having if n.rpartition(".")[0] == place]
                    most = Counter(usual).most_common(1)[0] if usual else (0, 0)
                    fewer = most[1] >= _LEAST_LIKE and counts[name] < most[0]
                    absent = not counts[name] and 2 * len(having) > len(alike)
                    if fewer or absent:
                        found[name] = {
                            "name": name, "block": self._order[name], "like": len(having)
                        }  # fmt: skip
        return [*found.values()]

    def _groups(self, counts: Mapping[str, int]) -> Iterator[list[str]]:
        """Names of modules that are alike, in the order of the pass, if one of them counts."""
        groups: dict[tuple[type, str], list[str]] = defaultdict(list)
        for name, (entered, left) in self._shapes.items():
            listed = name.rpartition(".")[2].isdigit() or name in counts
            once = self._calls[name] == 1 and name not in self._idle
            if entered is not None and entered == left and listed and once:
                place = re.sub(r"\d+", "#", name.rpartition(".")[0])
                groups[type(self._modules[name]), place].append(name)
        return (names for names in groups.values() if any(name in counts for name in names))

    def _place(self) -> tuple[str, int]:
        return (self._open[-1] if self._open else "", len(self._owners))

    def _see_module(self, name: str, x: Tensor | None) -> None:
        """A normalisation that is written by hand, told by its name and its epsilon."""
        module = self._modules[name]
        eps = next((e for n in _EPSILONS if (e := getattr(module, n, None)) is not None), None)
        by_hand = not type(module).__module__.startswith("torch.")
        named = "norm" in type(module).__name__.lower() and not list(module.children())
        if by_hand and named and isinstance(eps, float) and x is not None and x.dim() > 1:
            square = x[:_SAMPLES].float().square().mean(-1).median()
            gain = getattr(module, "weight", None)
            gain = gain.detach().abs().amax() if isinstance(gain, Tensor) else None
            self.normalisations.append(
                Normalisation(*self._place(), "rms_norm", x.shape[-1], eps, square, gain)
            )

    def _see_normalisation(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        given = {**dict(zip(_ARGUMENTS.get(name, ()), args, strict=False)), **kwargs}
        x, eps = given.get("input"), given.get("eps", 1e-5)
        if not isinstance(x, Tensor) or not isinstance(eps, float) or x.dim() < 2:
            return
        if name == "batch_norm" and not given.get("training"):
            return
        rows = _rows(name, x, given)
        if rows is None or rows.shape[1] == 0:
            return
        wide = rows.float()
        spread = wide.square().mean(1) if name == "rms_norm" else wide.var(1, correction=0)
        gain = given.get("weight")
        self.normalisations.append(
            Normalisation(
                *self._place(),
                name,
                rows.shape[1],
                eps,
                spread.median(),
                gain.detach().abs().amax() if isinstance(gain, Tensor) else None,
            )
        )

    def _is_attention(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a softmax is one over keys, and not over classes or experts."""
        x = args[0] if args else kwargs["input"]
        if x.dim() < 3 or softmax_dimension(x, args, kwargs) != -1:
            return False
        names = " ".join(type(self._modules[name]).__name__.lower() for name in self._open[-2:])
        return "att" in names or (x.dim() == 4 and x.shape[-1] == x.shape[-2])

    def _see_attention(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        try:
            logits = read_logits(name, args, kwargs, _SAMPLES)
        except Unreadable:
            return
        share = describe(logits).share.mean()
        self.attentions.append(Attention(*self._place(), share, spread(logits)))


_ARGUMENTS = {
    "batch_norm": (
        *("input", "running_mean", "running_var", "weight", "bias"),
        *("training", "momentum", "eps"),
    ),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
}
"""Positional arguments of the normalisations in `torch.nn.functional`."""


def _rows(name: str, x: Tensor, given: Mapping[str, Any]) -> Tensor | None:
    """What is normalised together, as rows (statistics, numbers); of one sample, some samples."""
    if name == "batch_norm":
        return x.transpose(0, 1).flatten(1)
    x = x[:_SAMPLES]
    if name == "group_norm":
        return x.reshape(x.shape[0] * int(given["num_groups"]), -1)
    if name in ("layer_norm", "rms_norm"):
        return x.reshape(-1, math.prod(given["normalized_shape"]))
    return None


def _constant(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Whether the units of each layer's weights are all the same, and not zero: names, 0-d bools.

    A depthwise convolution gives every unit another input, a shard is not a whole matrix, and what
    is no layer's weight may be made so, as the decay rates of a state space.
    """
    for name, module in modules.items():
        for own, weight in module.named_parameters(recurse=False):
            alone = getattr(module, "groups", 1) != 1 or isinstance(module, nn.Embedding)
            named = own == "in_proj_weight" or own.startswith("weight")
            if weight.dim() < 2 or weight.shape[0] < 2 or alone or weight.is_meta or not named:
                continue
            if weight.shape[1:].numel() < 2:  # a factor per unit, in the shape of a matrix
                continue
            if mesh_of(weight) is None and not nn.parameter.is_lazy(weight):
                same = (weight == weight[:1]).all() & (weight[:1] != 0).any()
                yield f"{name}.{own}" if name else own, same
