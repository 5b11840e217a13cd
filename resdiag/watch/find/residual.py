"""Whether an addition joins a shortcut and a branch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resdiag.watch.base.functions import Call
from resdiag.watch.find.additions import Addition, Mix, Operand, Sum, Ways, read_mix
from resdiag.watch.find.dataflow import Dataflow, Depth, Scope, reach
from resdiag.watch.find.module_stack import Frame
from resdiag.watch.find.passes import Operands

_LEFT, _RIGHT = 1, 2
_NONE: Depth = (0, 0, 0)


@dataclass(eq=False, kw_only=True)
class Meeting(Ways):
    """A shortcut and a branch, and the last tensor that both came from."""

    origin: Tensor | None  # that tensor: the block's input; None if it is gone
    begin: int  # its number
    is_learned: bool  # whether a parameterised transformation is on the branch
    is_scaled: bool  # whether a parameter multiplies the shortcut
    sides: tuple[Operand, ...] = ()  # shortcut first; set once the sum is called residual


class Residuals:
    """Judges the sums of one pass by the descent of their operands."""

    def __init__(self, flow: Dataflow) -> None:
        self._flow = flow

    def meet(self, spelled: Sum, frames: Sequence[Frame]) -> Meeting | None:
        """Whether two operands are a shortcut and a branch, seen from the module that adds them."""
        left, right = map(self._number, (spelled.left, spelled.right))
        if left is None or right is None:
            return None
        mix = read_mix(self._flow, spelled, left, right)
        left, right = (mix.left, mix.right) if mix is not None else (left, right)
        if left == right:
            return None
        try:
            torch.broadcast_shapes(spelled.left.shape, spelled.right.shape)
        except RuntimeError:
            return None  # the call itself will say what is wrong
        for frame in reversed(frames):
            # a module that does nothing but add its inputs stands for the one that called it
            if {left, right} <= frame.scope.entries and frame is not frames[0]:
                continue
            meeting = self.judge(left, right, frame.scope, mix)
            # where the shortcut was handed in and the branch half done, it may as well
            if meeting is not None or not {left, right} & frame.scope.entries:
                return None if meeting is None else self._accept(meeting, spelled, mix, frames)
        return None

    def _accept(
        self, meeting: Meeting, spelled: Sum, mix: Mix | None, frames: Sequence[Frame]
    ) -> Meeting | None:
        """The operands of a sum that is residual by the ways to them.

        A shortcut that a parameter multiplies is a layer's own where it begins inside the layer:
        the D x of a state space is a part of the branch that the mixer is.
        """
        if meeting.is_scaled and is_inner(self._flow, meeting.begin, frames):
            return None
        sides = spelled.left, spelled.right
        if meeting.is_gated:
            sides = (mix and mix.shares) or sides
        elif spelled.is_difference and (meeting.swapped or not meeting.is_learned):
            return None
        shortcut, branch = sides[::-1] if meeting.swapped else sides
        if shortcut.shape != torch.broadcast_shapes(shortcut.shape, branch.shape):
            return None
        return replace(meeting, sides=(shortcut, branch))

    def _number(self, side: Operand) -> int | None:
        if side.call is not None:
            return self._flow.imagine(side.inputs, side.call)
        return self._flow.number(side.inputs[0])

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
        flow, more = self._flow, sides[1 - at]
        number, begin = self._number(more), flow.number(total)
        origin = flow.number(tensors.origin)
        if number is None or begin is None or origin is None or more.shape != total.shape:
            return None
        if flow.descends(number, begin) or not flow.descends(number, origin):
            return None
        parallel = self.judge(origin, number, Scope(frozenset({origin}), frame.scope.start))
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

    def judge(self, left: int, right: int, scope: Scope, mix: Mix | None = None) -> Meeting | None:
        """What the two operands of an addition have in common, if that makes it residual.

        Walk back from both, latest tensor first, to the first one on both ways: x. Of the two ways
        from there the shorter one, in parameterised and then in other transforming operations, is
        the shortcut. The addition is residual if

        - the branch transforms at all (convolution, linear map, attention, pooling, ...), and more
          often than the shortcut does: else they are parallel branches,
        - the shortcut does not but for linear maps: no product of two tensors of the pass, no
          activation between two maps,
        - they are not different pieces of x, as in Res2Net's hierarchy of splits; but two halves of
          x are two streams, as in a RevNet,
        - no residual sum on the branch has a shortcut that passes x by if x was added to something
          before: else it is a position bias, added to somebody else's stream again and again,
        - the branch is not detached between two of its maps,
        - the shortcut begins inside the module whose forward runs the addition, or at its input.

        Of a mixture, the operands are what the gate takes its shares of. A gate that x is but one
        source of is a recurrent cell's, which holds a state against what comes in.
        """
        ways = {left: _LEFT}
        ways[right] = ways.get(right, 0) | _RIGHT
        between: list[int] = []
        for origin in self._flow.walk(ways, min(scope.entries, default=0)):
            if ways[origin] == _LEFT | _RIGHT:
                break
            between.append(origin)
        else:
            return None
        if mix is not None and not self._flow.descends(mix.gate, origin):
            return self.judge(*mix.operands, scope)  # a mask, or another factor from outside
        depths = self._depths(origin, reversed(between))
        one, other = depths[left], depths[right]
        if one[:2] == other[:2]:
            return None
        swapped = other < one
        shortcut, branch = (right, left) if swapped else (left, right)
        short, long = (_RIGHT, _LEFT) if swapped else (_LEFT, _RIGHT)
        on_shortcut = [n for n in reversed(between) if ways[n] == short]
        on_branch = [n for n in reversed(between) if ways[n] == long and n in depths]
        if (
            depths[branch][:2] == (0, 0)
            or not self._is_shortcut(on_shortcut)
            or are_pieces(self._flow, origin, on_shortcut, on_branch)
            or (depths[branch][0] and is_cut(self._flow, branch, depths))
        ):
            return None
        passed_by = any(
            (s := self._flow.node(n).stream) is not None and s not in depths for n in on_branch
        )
        if passed_by and was_added(self._flow, origin):
            return None
        if not _is_inside(scope, origin, on_shortcut, on_branch, depths[shortcut] == _NONE):
            return None
        if mix is None:
            inside = [n for n in between if n in depths or n >= scope.start]
        else:
            made = dict.fromkeys((left, right, mix.gate, *mix.operands), _LEFT)
            inside = [n for n in self._flow.walk(made, origin) if n != origin]
            if self._is_recurrent(mix.gate, origin):
                return None
        node = self._flow.node
        # the stream's own: a branch that mixes tokens, turned, has its features where they are
        features = (node(n).features for n in (shortcut, origin, branch))
        return Meeting(
            swapped=swapped,
            origin=node(origin).at_hand(),
            begin=origin,
            stream=shortcut,
            shortcut_count=sum(bool(node(n).parameters) for n in on_shortcut),
            path=self._path(shortcut, origin) if mix is None else None,
            parameters=self._flow.parameters(inside),
            calls=self._flow.calls(on_branch),
            shortcut_calls=self._flow.calls(on_shortcut),
            activations=[call for call in self._flow.calls(inside) if call.is_activation],
            is_learned=any(node(n).depth[0] for n in on_branch),
            features=next((known for known in features if known is not None), None),
            is_scaled=any(
                (call := node(n).call) is not None and call.is_product and node(n).parameters
                for n in on_shortcut
            ),
            is_gated=mix is not None,
        )

    def _is_recurrent(self, gate: int, origin: int) -> bool:
        """Whether a gate was made of a tensor and of something else that was there before it."""
        node = self._flow.node
        return any(
            n < origin or (not node(n).parents and node(n).call is not None)
            for n in reach(gate, lambda n: set(node(n).parents) - {origin})
        )

    def _depths(self, origin: int, numbers: Iterable[int]) -> dict[int, Depth]:
        """The longest way from the origin to each tensor that descends from it."""
        depths = {origin: _NONE}
        for number in numbers:
            node = self._flow.node(number)
            before = [depths[parent] for parent in node.parents if parent in depths]
            if before:
                (a, b, c), (d, e, f) = max(before), node.depth
                depths[number] = (a + d, b + e, c + f)
        return depths

    def _is_shortcut(self, numbers: list[int]) -> bool:
        """Whether a way is the identity or a linear map, activated at its ends at most."""
        mapped = activated = False
        for number in numbers:
            node = self._flow.node(number)
            if node.is_opaque or (mapped and activated and node.is_transform):
                return False
            mapped = mapped or node.is_transform
            acts = node.call is not None and node.call.is_activation
            activated = mapped and (activated or acts)
        return True

    def _path(self, number: int, origin: int) -> tuple[Call, ...] | None:
        """Calls from `origin` to a tensor if each can be repeated, else None."""
        calls: list[Call] = []
        while number != origin:
            node = self._flow.node(number)
            if node.call is None or not node.repeatable or number < origin:
                return None
            calls.append(_piece_of(node.call, node.piece))
            (number,) = node.parents
        return tuple(reversed(calls))


def _piece_of(call: Call, piece: str) -> Call:
    """A call that returns one tensor: of a split, one of those it returns."""
    name, _, index = piece.partition(" ")
    if not index.isdigit() or name != call.name:
        return call
    return Call(lambda x: call(x)[int(index)], (), {})


def _is_inside(
    scope: Scope, origin: int, on_shortcut: list[int], on_branch: list[int], identity: bool
) -> bool:
    """Whether the shortcut begins inside the module or at its input.

    A branch may come from outside if the shortcut is the module's very input, as where a module
    gets x and F(x) and adds them; a shortcut may where the module gets x and h(x).
    """
    if not scope.entries.isdisjoint(on_shortcut) and not {on_shortcut[-1], origin} <= scope.entries:
        return False
    return identity or scope.entries.isdisjoint(on_branch)


def are_pieces(
    flow: Dataflow, origin: int, on_shortcut: Sequence[int], on_branch: Sequence[int]
) -> bool:
    """Whether two ways begin with different pieces of their origin, not its halves: two streams."""
    one, other = (
        {node.piece: node.size for n in way if origin in (node := flow.node(n)).parents}
        for way in (on_shortcut, on_branch)
    )
    if not one or "" in {**one, **other} or not one.keys().isdisjoint(other):
        return False
    sizes = [*one.values(), *other.values()]
    return len(sizes) != 2 or sum(sizes) < flow.node(origin).size


def was_added(flow: Dataflow, number: int) -> bool:
    """Whether a tensor, or a view of it, has been an operand of an addition."""
    users = flow.users()

    def is_view(n: int) -> bool:
        node = flow.node(n)
        return len(set(node.parents)) == 1 and not node.is_transform and not node.is_opaque

    return any(
        (call := flow.node(user).call) is not None
        and call.is_sum
        and len(set(flow.node(user).parents)) > 1
        for view in reach(number, lambda n: filter(is_view, users.get(n, ())))
        for user in users.get(view, ())
    )


def is_cut(flow: Dataflow, branch: int, depths: Mapping[int, Depth]) -> bool:
    """Whether every way to a branch is detached between two of its parameterised maps.

    What follows begins anew, as a position does that was embedded from a predicted box. A branch
    that is detached as a whole is a fault. `depths` are of what is on the ways from the origin.
    """
    whole = depths[branch][0]

    def ahead(number: int) -> Iterator[int]:
        node = flow.node(number)
        if node.name != "detach" or depths[number][0] == whole:
            yield from (parent for parent in node.parents if parent in depths)

    return all(depths[number][0] for number in reach(branch, ahead))


def is_inner(flow: Dataflow, origin: int, frames: Sequence[Frame]) -> bool:
    """Whether a tensor is internal to a layer, not a stream: mapped or normalised on its way in.

    Either the module that adds has mapped its input to it, as a state-space mixer does before it
    computes C h + D x, or one of those that called it has normalised its input to it, as a pre-norm
    block does for its layer. What follows a residual sum is the stream's, and so is what the model
    itself makes of its input.
    """
    for frame in frames[1:]:
        scope, queue, seen = frame.scope, [origin], {origin}
        maps = normalises = summed = False
        while queue:
            number = queue.pop()
            node = flow.node(number)
            if number in scope.entries or number < scope.start or node.stream is not None:
                summed = summed or (node.stream is not None and number not in scope.entries)
                continue
            maps = maps or node.depth[0] > 0
            normalises = normalises or (node.call is not None and node.call.normalises)
            queue.extend(set(node.parents) - seen)
            seen.update(node.parents)
        if (maps and frame is frames[-1]) or (normalises and not maps and not summed):
            return True
    return False
