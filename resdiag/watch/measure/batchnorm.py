"""What the nodes of an autograd graph keep for their backward passes, looked at without a trace."""

from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node


class Gone(Exception):
    """A tensor cannot be had from a graph, or not without running somebody's code."""


def kept(node: Node, name: str) -> Tensor:
    """A tensor that a node keeps, detached; `name` without its prefix.

    Raises:
        Gone: It was overwritten since, or unpacking it runs a hook of somebody's: activation
            checkpointing would compute the pass again.
    """
    try:
        hook = getattr(node, f"_raw_saved_{name}").unpack_hook
        found: Tensor | None = None if hook is not None else getattr(node, f"_saved_{name}")
    except (AttributeError, RuntimeError) as error:  # no such thing; its version is another one
        raise Gone(str(error)) from error
    if found is None:
        raise Gone(name)
    return found.detach()


def affine(node: Node) -> tuple[nn.Parameter, nn.Parameter] | None:
    """Scale and shift (C,) of a BatchNorm on the CPU that used the batch's statistics.

    None for any other node, and for a layer that is frozen or has no affine parameters.
    """
    layer: Any = node  # what a node keeps is not in its type
    if layer.name() != "NativeBatchNormBackward0" or not layer._saved_training:
        return None
    scale, shift = (getattr(ahead, "variable", None) for ahead, _ in layer.next_functions[1:])
    return None if scale is None or shift is None else (scale, shift)
