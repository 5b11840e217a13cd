"""What a run continues from: tensors as safetensors, which cannot execute code, and JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from resdiag.runs.files import Damaged


@dataclass(frozen=True)
class Checkpoint:
    """A state of training.

    Attributes:
        step: Optimizer steps done.
        tensors: Weights, momenta, buffers, random states; on the CPU.
        state: Everything else, as JSON holds it.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


def pack(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Tensors as the bytes of a safetensors file; they may be views and on any device."""
    # cloned: safetensors refuses tensors that share memory
    return save({key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()})


def unpack(data: bytes, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of `pack`, on the CPU.

    Raises:
        Damaged: `data`, read from `path`, is not a safetensors file.
    """
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise Damaged(f"{path} is damaged: not safetensors ({type(error).__name__})") from error
