"""Everything a training continues from: weights, momenta, and what it has counted so far."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import SGD

_MODEL, _MOMENTUM = "model.", "momentum."


def pack(model: nn.Module, optimizer: SGD) -> dict[str, Tensor]:
    """Tensors of a model and of its optimizer by name, sharing their memory."""
    tensors = {_MODEL + name: value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            tensors[_MOMENTUM + name] = momentum
    return tensors


def unpack(model: nn.Module, optimizer: SGD, tensors: Mapping[str, Tensor]) -> None:
    """Put packed tensors back, bit for bit.

    Raises:
        RuntimeError: They are those of another model.
    """
    state = {k.removeprefix(_MODEL): v for k, v in tensors.items() if k.startswith(_MODEL)}
    model.load_state_dict(state)
    for name, parameter in model.named_parameters():
        momentum = tensors.get(_MOMENTUM + name)
        if momentum is not None:
            # the parameter's own memory format: another one would round differently
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(
                momentum
            )
