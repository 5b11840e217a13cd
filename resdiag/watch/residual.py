"""Whether an addition joins a shortcut and a branch."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from resdiag.watch.addition import Addition
from resdiag.watch.events import Operands
from resdiag.watch.lineage import Lineage, Meeting, Scope
from resdiag.watch.module_stack import Frame
from resdiag.watch.sums import Operand, Sum


class Residuals:
    """Judges the sums of one pass by the descent of their operands.

    Args:
        lineage: The tensors of the pass.
    """

    def __init__(self, lineage: Lineage) -> None:
        self._lineage = lineage

    def meet(self, spelled: Sum, frames: Sequence[Frame]) -> Meeting | None:
        """Whether two operands are a shortcut and a branch, seen from the module that adds them."""
        numbers = [self._number(side) for side in (spelled.left, spelled.right)]
        left, right = numbers
        if left is None or right is None or left == right:
            return None
        try:
            torch.broadcast_shapes(spelled.left.shape, spelled.right.shape)
        except RuntimeError:
            return None  # the call itself will say what is wrong
        for frame in reversed(frames):
            # a module that does nothing but add its inputs stands for the one that called it
            if {left, right} <= frame.scope.entries and frame is not frames[0]:
                continue
            meeting = self._lineage.meet(left, right, frame.scope)
            # where the shortcut was handed in and the branch half done, it may as well
            if meeting is not None or not {left, right} & frame.scope.entries:
                return meeting
        return None

    def _number(self, side: Operand) -> int | None:
        if side.call is not None:
            return self._lineage.imagine(side.inputs, side.call)
        return self._lineage.number(side.inputs[0])

    def parallel(self, frame: Frame, spelled: Sum) -> tuple[Addition, Operands] | None:
        """The open block with one more branch of its own input, as in x + f(x) + g(x)."""
        first, tensors, total = frame.open, frame.tensors, frame.total
        if first is None or tensors is None or total is None:
            return None
        if frame.tail is not total or frame.chain or spelled.is_difference:
            return None
        sides = spelled.left, spelled.right
        at = next((i for i, s in enumerate(sides) if s.inputs[0] is total), None)
        if at is None or sides[at].scale != 1 or tensors.origin is None:
            return None
        flow, more = self._lineage, sides[1 - at]
        number, begin = self._number(more), flow.number(total)
        origin = flow.number(tensors.origin)
        if number is None or begin is None or origin is None or more.shape != total.shape:
            return None
        if flow.descends(number, begin) or not flow.descends(number, origin):
            return None
        parallel = flow.meet(origin, number, Scope(frozenset({origin}), frame.scope.start))
        if parallel is None or parallel.swapped:
            return None
        with torch._C.DisableTorchFunction(), torch.no_grad():
            branch = tensors.branch * first.branch_scale + more.make() * more.scale
        extended = replace(
            first,
            branch_scale=1.0,
            branch_module="",
            parameters=[*first.parameters, *parallel.parameters],
            activations=[*first.activations, *parallel.activations],
            calls=(*first.calls, *parallel.calls),
            extends=True,
        )
        return extended, Operands(tensors.origin, branch, tensors.shortcut)
