"""The optimizers of the suite by name; Lion is written here, since PyTorch has none."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop


class Lion(Optimizer):
    """Steps by the sign of an average of gradients (Chen et al. 2023, arXiv:2302.06675)."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:  # noqa: ANN401
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ANN401
        """One step; a closure is not called."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.sign(0.9 * average + 0.1 * p.grad), alpha=-group["lr"])
                average.mul_(0.99).add_(p.grad, alpha=0.01)


Make = Callable[[Any, float, float], Optimizer]


def _sgd(momentum: float) -> Make:
    return lambda groups, lr, decay: SGD(groups, lr, momentum=momentum, weight_decay=decay)


OPTIMIZERS: dict[str, tuple[bool, float, Make]] = {
    "sgd": (True, 1.0, _sgd(0.9)),
    "sgd without momentum": (True, 4.0, _sgd(0.0)),
    "adam": (False, 1.0, lambda groups, lr, decay: Adam(groups, lr)),
    "adamw": (False, 1.0, lambda groups, lr, decay: AdamW(groups, lr, weight_decay=decay)),
    "rmsprop": (False, 0.3, lambda groups, lr, decay: RMSprop(groups, lr)),
    "lion": (False, 0.3, lambda groups, lr, decay: Lion(groups, lr, decay)),
}
"""By name: whether it uses the rate of SGD or else of Adam, its factor on that rate, and itself."""
