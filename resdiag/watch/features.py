"""Which dimension of a tensor holds the channels: the one its parameterised operation works on."""

from collections.abc import Sequence

from torch import Tensor, nn

from resdiag.watch.calls import Call

_LAST = (
    "linear",
    "layer_norm",
    "rms_norm",
    "embedding",
    "matmul",
    "mm",
    "attention",
    "lstm",
    "gru",
)
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

    Args:
        call: The call.
        result: Its result.
        parameters: Parameters that took part.
        before: Shape of its first operand of the pass.
        known: The channel dimension of that operand.
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
    if tuple(before) == tuple(result.shape):
        return known
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
    """Where a dimension is after a permutation."""
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
    if before[known:] == after[-tail:]:
        return len(after) - tail
    if known == len(before) - 1 and after and before[-1] == after[-1]:
        return len(after) - 1
    return None
