"""Notices that a loop rewrote the gradient between the backward pass and the optimizer's step."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Rewriting:
    """Follows the version counter of one parameter's gradient; costs no operation on the device.

    A clipped gradient is changed in place, which torch counts. Compared are the count right after
    the last accumulation and the one right before the optimizer's step.
    """

    def __init__(self) -> None:
        self._parameter: nn.Parameter | None = None
        self._handle: RemovableHandle | None = None
        self._fresh: tuple[int, int] | None = None

    @property
    def follows(self) -> bool:
        """Whether a parameter was chosen."""
        return self._parameter is not None

    def follow(self, parameters: Iterable[nn.Parameter]) -> None:
        """Choose the first parameter that takes a gradient."""
        self._parameter = next((p for p in parameters if p.requires_grad and p.is_leaf), None)
        if self._parameter is not None:
            self._handle = self._parameter.register_post_accumulate_grad_hook(self._accumulated)

    def close(self) -> None:
        """Remove the hook; safe to call twice."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def count(self) -> int:
        """How often the gradient was changed in place since it was accumulated; 0 if unknown."""
        grad = None if self._parameter is None else self._parameter.grad
        if grad is None or self._fresh is None:
            return 0
        same, version = self._fresh
        return grad._version - version if same == id(grad) else 1

    def _accumulated(self, parameter: torch.Tensor) -> None:
        grad = parameter.grad
        self._fresh = None if grad is None else (id(grad), grad._version)
