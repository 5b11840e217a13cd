"""What the nodes of an autograd graph keep for their backward passes, looked at without a trace."""

from torch import Tensor
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
