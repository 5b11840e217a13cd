"""Finds the routers of a traced pass, and records how they spread tokens over experts."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resdiag.watch.base.functions import name_of
from resdiag.watch.base.safety import guarded
from resdiag.watch.base.tensors import tensors_in
from resdiag.watch.measure.extremes import root_z
from resdiag.watch.record.block_survey import BlockSurvey, Part

_CHOICES = ("topk", "argmax", "max")
_LEVELS = 2
"""Modules around a choice that are asked for experts: a router is often a module of its own."""

NO_ROUTER = (
    "no top-k or argmax over as many numbers as a module around it has experts was seen in its "
    "branch"
)
FREED = "the router's logits were freed or overwritten before its choice"


@dataclass(eq=False, kw_only=True)
class _Router(Part):
    """One choice of experts; 0-d tensors by column."""

    values: Mapping[str, Tensor]


class RouterSurvey(BlockSurvey[_Router]):
    """Measures every router of one pass.

    A router is a linear map to as many numbers as the module around it, or the next one, has
    experts, a list of modules or parameters of three dimensions, whose largest k, or largest one,
    are chosen.

    Args:
        others: What a `BlockSurvey` takes.
    """

    SET, NONE = "experts", NO_ROUTER

    def __init__(self, *others: Any, is_expected: bool) -> None:  # noqa: ANN401
        super().__init__(*others, is_expected=is_expected)
        self._logits: int | None = None  # of the choice that is about to be made
        self._name, self._experts, self._is_overwritten = "", 0, False

    @guarded
    def reads(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """An operation is about to run: is it a choice of experts?"""
        self._logits, name = None, name_of(func)
        self._name = name
        x = args[0] if args else kwargs.get("input")
        if name not in _CHOICES or not isinstance(x, Tensor) or x.dim() < 2:
            return
        dim = kwargs.get("dim", _dimension(name, args))
        number = self.flow.number(x)
        if number is None or dim not in (-1, x.dim() - 1) or not self._has_experts(x.shape[-1]):
            return
        self._experts = x.shape[-1]
        way = self.back(number, self._is_map)
        self._logits = next(filter(self._is_map, way), None)
        self._is_overwritten = any(map(self._writes, way))

    def returns(self, result: Any) -> Any:  # noqa: ANN401
        """It has run; the result is handed on as it is."""
        self._chose(result)
        return result

    def write(self, row: int, parts: Sequence[_Router]) -> None:
        """The last choice of a block."""
        values = parts[-1].values
        if "router_logit_z" not in values:
            self.sets.guard.miss(row, ("router_logit_z",), FREED)
        self.sets.put(row, values)

    @guarded
    def _chose(self, result: object) -> None:
        if self._logits is None:
            return
        chosen = [x for x in tensors_in(result) if not x.is_floating_point()]
        self.pending = [part for part in self.pending if part.number != self._logits]
        with torch.no_grad(), torch._C.DisableTorchFunction():
            k = chosen[-1].shape[-1] if self._name == "topk" else 1
            values = load(chosen[-1], self._experts, k) | self._z(self._logits)
        self.pending.append(_Router(modules=tuple(self.open), number=self._logits, values=values))
        self._logits = None

    def _is_map(self, number: int) -> bool:
        """Whether a tensor is a learned linear map to one number per expert."""
        node = self.flow.node(number)
        found = node.at_hand()
        wide = found is None or found.shape[-1:] == (self._experts,)
        return node.is_transform and bool(node.parameters) and wide

    def _writes(self, number: int) -> bool:
        """Whether what made a tensor wrote to its operand."""
        call = self.flow.node(number).call
        return call is not None and (call.is_inplace or call.name == "setitem")

    def _has_experts(self, count: int) -> bool:
        around = self.open[: -_LEVELS - 1 : -1]
        return count > 1 and any(count in experts_of(self.modules[name]) for name in around)

    def _z(self, number: int) -> dict[str, Tensor]:
        """The column of the logits, unless they were freed or overwritten since they were made."""
        logits = self.flow.node(number).at_hand()
        if logits is None or self._is_overwritten:
            return {}
        return {"router_logit_z": root_z(logits)}


def load(chosen: Tensor, experts: int, k: int) -> dict[str, Tensor]:
    """How many tokens each expert gets, from the indices that were chosen, of any shape.

    Each token has chosen `k` experts.

    >>> values = load(torch.tensor([[0, 1], [0, 1], [0, 2]]), 4, 2)
    >>> print(*(f"{name} {value:.3g}" for name, value in values.items()))
    expert_load 0.5 expert_busiest 0 expert_entropy 0.459 expert_dead 0.25 expert_tokens 1.5
    """
    ones = torch.ones(chosen.numel(), dtype=torch.float64, device=chosen.device)
    counts = ones.new_zeros(experts).index_add_(0, chosen.reshape(-1), ones)
    shares = counts / counts.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    free = math.log(experts / k)  # 0 where every expert is chosen
    evenness = (entropy - math.log(k)) / free if free else torch.full_like(entropy, math.nan)
    return {
        "expert_load": shares.amax(),
        "expert_busiest": shares.argmax(),
        "expert_entropy": evenness.clamp_min(0),
        "expert_dead": (counts == 0).double().mean(),
        "expert_tokens": counts.mean(),
    }


def experts_of(module: nn.Module) -> set[int]:
    """Numbers of experts that a module may have: lists of modules, stacks of matrices, inside."""
    inside = [module, *module.children()]
    lists = {len(one) for one in inside if isinstance(one, nn.ModuleList)}
    stacks = {p.shape[0] for one in inside for p in one.parameters(recurse=False) if p.dim() == 3}
    return lists | stacks


def _dimension(name: str, args: tuple[Any, ...]) -> int | None:
    """The dimension of a choice that its positional arguments name; topk's is the last."""
    at = 2 if name == "topk" else 1
    given = args[at] if len(args) > at else None
    return -1 if name == "topk" and given is None else given
