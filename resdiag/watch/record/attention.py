"""Finds the attentions of a traced pass and records how they spread, for the blocks they are in."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resdiag.watch.base.functions import name_of
from resdiag.watch.base.safety import guarded
from resdiag.watch.base.tensors import tensors_in
from resdiag.watch.measure.attention import (
    READERS,
    Heads,
    Unreadable,
    describe,
    has_heads,
    read_logits,
    softmax_dimension,
)
from resdiag.watch.record.block_survey import BlockSurvey, Part

_PRODUCTS = ("matmul", "rmatmul", "bmm", "baddbmm", "einsum", "tensordot")

NONE_SEEN = "no scaled_dot_product_attention and no softmax of products was seen in its branch"
MERGED = "samples and heads are one dimension of this attention"
_HEADS = ("attention_logit_head", "attention_entropy_head")


@dataclass(eq=False, kw_only=True)
class _Attention(Part):
    """One attention, or a softmax that may be one; it is not sure until a product takes it."""

    heads: Heads | None = None
    reason: str = ""  # why it was not measured
    merged: bool = False


class AttentionSurvey(BlockSurvey[_Attention]):
    """Measures every attention of one pass.

    An attention is a call of `READERS`; a softmax is one if a product of two tensors of the pass
    led to it, and its result goes into another product.

    Args:
        samples: First samples of the batch to measure; None for all.
        others: What a `BlockSurvey` takes.
    """

    SET, NONE = "attention", NONE_SEEN

    def __init__(self, samples: int | None, *others: Any, is_expected: bool) -> None:  # noqa: ANN401
        super().__init__(*others, is_expected=is_expected)
        self._samples = samples
        self._call: _Attention | None = None

    @guarded
    def reads(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """An operation is about to run: measure an attention before its inputs are overwritten."""
        self._call, name = None, name_of(func)
        with torch._C.DisableTorchFunction():
            if name in READERS:
                if name != "softmax" or self._follows_product(args, kwargs):
                    self._call = self._measure(name, args, kwargs)
            elif name in _PRODUCTS:
                self._confirm(tensors_in(args))

    @guarded
    def wrote(self, result: Tensor) -> None:
        """The result of the operation has its number."""
        if self._call is not None:
            self._call.number = self.flow.number(result)
            self.pending.append(self._call)
            self._call = None

    def write(self, row: int, parts: Sequence[_Attention]) -> None:
        """All heads of a block's attentions together."""
        reasons = [part.reason for part in parts if part.reason]
        if reasons:
            self.sets.miss("attention", row, reasons[0])
            return
        values = summarise([part.heads for part in parts if part.heads is not None])
        if any(part.merged for part in parts):
            self.sets.guard.miss(row, _HEADS, MERGED)
            values = {name: value for name, value in values.items() if name not in _HEADS}
        self.sets.put(row, values)

    def _measure(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Attention:
        found = _Attention(modules=tuple(self.open), is_sure=name != "softmax")
        try:
            with torch.no_grad():
                found.heads = describe(read_logits(name, args, kwargs, self._samples))
            found.merged = not has_heads(name, args, kwargs)
        except Unreadable as error:
            found.reason = str(error)
        return found

    def _follows_product(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a softmax over the last dimension is one of products of tensors of the pass."""
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or x.dim() < 3 or softmax_dimension(x, args, kwargs) != -1:
            return False
        number = self.flow.number(x)
        return number is not None and any(map(self._is_product, self._way(number)))

    def _is_product(self, number: int) -> bool:
        node = self.flow.node(number)
        return node.name in _PRODUCTS and len(set(node.parents)) > 1

    def _way(self, number: int) -> list[int]:
        return self.back(number, self._is_product)

    def _confirm(self, operands: Iterable[Tensor]) -> None:
        """A product takes tensors: a softmax that led to one of them is attention."""
        unsure = {part.number: part for part in self.pending if not part.is_sure}
        numbers = [self.flow.number(x) for x in operands] if unsure else []
        for number in numbers:
            for one in () if number is None else self._way(number):
                if one in unsure:
                    unsure[one].is_sure = True


def summarise(attentions: Sequence[Heads]) -> dict[str, Tensor]:
    """The columns of a block, 0-d tensors, from all heads of its attentions."""
    logit, entropy, share, first = (
        torch.cat([getattr(one, name).double() for one in attentions])
        for name in ("logit", "entropy", "share", "first")
    )
    return {
        "attention_logit": logit.amax(),
        "attention_logit_head": logit.argmax(),
        "attention_entropy": entropy.mean(),
        "attention_entropy_share": share.mean(),
        "attention_entropy_least": share.amin(),
        "attention_entropy_head": share.argmin(),
        "attention_first": first.mean(),
    }
