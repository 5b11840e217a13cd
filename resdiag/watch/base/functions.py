"""Roles of torch functions, one call that can be applied again, and where it has its channels."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resdiag.watch.base.names import NORMALISATIONS as NORMALISATIONS

ACTIVATIONS = frozenset({
    "relu", "relu_", "relu6", "elu", "elu_", "selu", "selu_", "celu", "celu_", "gelu", "silu",
    "mish", "leaky_relu", "leaky_relu_", "prelu", "hardswish", "hardtanh", "hardtanh_",
    "hardsigmoid", "sigmoid", "sigmoid_", "tanh", "tanh_", "softplus", "softsign", "logsigmoid",
    "clamp", "clamp_",
})  # fmt: skip
"""Elementwise functions without randomness: applying one again changes nothing."""

_TRANSFORMS = ("conv", "linear", "matmul", "einsum", "tensordot", "attention", "lstm", "gru", "rnn",
               "fft", "pool")  # fmt: skip
"""Parts of the names of functions that mix positions or channels, with or without parameters."""

_NONLINEAR = frozenset(
    {"exp", "expm1", "exp2", "log", "log1p", "softmax", "log_softmax", "pow", "sqrt", "rsqrt"}
    | {"reciprocal", "sin", "cos", "square", "maximum", "minimum", "cumsum", "cumprod"}
)
"""What no shortcut does; activations are looked at apart, they may end one."""

_SAME_SHAPE_ONLY = ("expand_as", "view_as", "reshape_as", "type_as")

_PRODUCTS = frozenset({"mul", "rmul", "imul", "div", "truediv", "rtruediv", "multiply", "divide"})
_PRODUCTS |= {"rest_of"}  # of a lerp

_STATISTICS = frozenset({"rsqrt", "var", "std", "var_mean", "vector_norm", "norm"})


def name_of(function: Callable[..., Any]) -> str:
    """The function's bare name: "elu" for torch.nn.functional.elu, "relu" for Tensor.relu.

    >>> name_of(torch.Tensor.mT.__get__)  # reading an attribute calls this
    'mT'
    """
    name = getattr(function, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    return name.strip("_") or str(function)


@functools.lru_cache(maxsize=1024)
def _is_transform(name: str) -> bool:
    product = name.endswith(("mm", "mv")) and "norm" not in name
    return name == "unseen" or product or any(word in name for word in _TRANSFORMS)


@dataclass(frozen=True)
class Call:
    """One traced call whose first argument was the tensor followed."""

    function: Callable[..., Any]
    args: tuple[Any, ...]  # positional arguments after the tensor
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """Name without underscores."""
        return name_of(self.function)

    @property
    def _raw(self) -> str:
        return getattr(self.function, "__name__", "")

    @property
    def is_activation(self) -> bool:
        """Whether it is a known elementwise activation."""
        return self._raw in ACTIVATIONS

    @property
    def is_idempotent(self) -> bool:
        """Whether applying it twice is applying it once, to the last bit."""
        return self.name in ("relu", "relu6", "hardtanh", "clamp")

    @property
    def is_normalisation(self) -> bool:
        """Whether it is a normalisation layer's function."""
        return self._raw in NORMALISATIONS

    @property
    def is_after(self) -> bool:
        """Whether it may end a block: an activation or a normalisation."""
        return self.is_activation or self.is_normalisation

    @property
    def is_transform(self) -> bool:
        """Whether it mixes positions or channels: a convolution, a linear map, attention, ..."""
        return _is_transform(self.name)

    @property
    def is_product(self) -> bool:
        """Whether it multiplies element by element."""
        return self.name in ("mul", "rmul", "imul", "multiply")

    @property
    def is_sum(self) -> bool:
        """Whether it adds or subtracts."""
        return self.name in ("add", "radd", "iadd", "sub", "rsub", "isub", "subtract")

    @property
    def normalises(self) -> bool:
        """Whether it is a normalisation or a step of one that is written by hand."""
        return self.is_normalisation or self.name in _STATISTICS

    def is_opaque(self, parents: int) -> bool:
        """Whether it is not a linear map of one tensor; `parents` tensors of the pass went in."""
        if self.name in _NONLINEAR:
            return True
        return parents > 1 and (self.name in _PRODUCTS or self.is_transform)

    def operands(self, inputs: list[Tensor]) -> list[Tensor]:
        """The inputs that say more than the shape of the result."""
        if self.name.endswith("_like") or self.name.startswith("new_"):
            return []
        return inputs[:1] if self.name in _SAME_SHAPE_ONLY else inputs

    @property
    def is_random(self) -> bool:
        """Whether applying it again could draw random numbers."""
        return any(word in self.name for word in ("drop", "rrelu", "rand", "bernoulli", "normal"))

    @property
    def is_inplace(self) -> bool:
        """Whether the call overwrote its argument."""
        by_name = self._raw.endswith("_") and not self._raw.startswith("__")
        return bool(self.kwargs.get("inplace")) or by_name

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the function to another tensor; never in place."""
        kwargs = {k: v for k, v in self.kwargs.items() if k != "inplace"}
        function, name = self.function, self._raw.removesuffix("_")
        if self.is_inplace and name != self._raw:
            function = getattr(F, name, None) or getattr(torch, name)
        out: Tensor = function(x, *self.args, **kwargs)
        return out


def compose(calls: Sequence[Call]) -> Callable[[Tensor], Tensor]:
    """The calls one after the other as one function."""
    return lambda x: functools.reduce(lambda value, call: call(value), calls, x)


_QUESTIONS = frozenset({"__get__", "dim", "size", "numel", "stride", "is_floating_point"})
"""Calls that ask about a tensor and make none."""

_VIEWS = frozenset(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag"))
"""Attributes that are tensors made of the one asked: calls like any other."""


def is_question(func: Callable[..., Any]) -> bool:
    """Whether a torch function only asks about a tensor."""
    return getattr(func, "__name__", "") in _QUESTIONS and func not in _VIEWS


_LAST = frozenset({"linear", "layer_norm", "rms_norm", "embedding", "attention", "lstm", "gru"})
_LAST |= {"matmul", "mm"}
_TURNS = ("T", "mT", "H", "mH")
_SECOND = ("conv", "batch_norm", "group_norm", "instance_norm", "prelu")


def features_after(
    call: Call,
    result: Tensor,
    parameters: Sequence[nn.Parameter],
    before: Sequence[int] | None,
    known: int | None,
) -> int | None:
    """The channel dimension of a call's result, None if nothing says it.

    A linear map or a layer normalisation has its features last, a convolution or a batch
    normalisation in dimension 1; a vector of parameters that is broadcast names its dimension;
    everything else hands on what is known of its first operand, through permutations and reshapes.
    """
    dims = result.dim()
    if parameters:
        if any(word in call.name for word in _SECOND):
            return 1 if dims > 1 else None
        if any(word in call.name for word in _LAST):
            return dims - 1
        named = _broadcast_dimension(parameters, result)
        if named is not None:
            return named
    if known is None or before is None:
        return None
    if call.name in ("permute", "transpose", "swapaxes", "movedim", "moveaxis", "t", *_TURNS):
        return _moved(call, known, len(before))
    if len(before) == dims and before[known] == result.shape[known]:
        return known
    return _reshaped(tuple(before), tuple(result.shape), known)


def _broadcast_dimension(parameters: Sequence[nn.Parameter], result: Tensor) -> int | None:
    """Where a vector of parameters, e.g. a layer scale (C, 1, 1), lies along the result."""
    for parameter in parameters:
        long = [i for i, size in enumerate(parameter.shape) if size > 1]
        if len(long) == 1:
            at = result.dim() - parameter.dim() + long[0]
            if at > 0 and result.shape[at] == parameter.shape[long[0]]:
                return at
    return None


def _moved(call: Call, known: int, dims: int) -> int | None:
    if call.name == "permute":
        wanted = call.args[0] if call.args else call.kwargs.get("dims")
        order = wanted if isinstance(wanted, Sequence) else call.args
        places = [int(d) % dims for d in order]
        return places.index(known) if known in places else None
    given = [-2, -1] if call.name in _TURNS else [*call.args, *call.kwargs.values()][:2]
    pair = given or [0, 1]
    if call.name in ("movedim", "moveaxis") or not all(isinstance(d, int) for d in pair):
        return None
    one, other = (d % dims for d in pair)
    return other if known == one else one if known == other else known


def _reshaped(before: tuple[int, ...], after: tuple[int, ...], known: int) -> int | None:
    """Where a dimension is after a reshape that keeps everything on one side of it."""
    if before[: known + 1] == after[: known + 1]:
        return known
    tail = len(before) - known
    return len(after) - tail if before[known:] == after[-tail:] else None
