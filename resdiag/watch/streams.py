"""What tells a stream, which goes on from sum to sum, from what is only added to one."""

from collections.abc import Mapping, Sequence

from resdiag.watch.lineage import Depth, Lineage
from resdiag.watch.module_stack import Frame


def are_pieces(
    lineage: Lineage, origin: int, on_shortcut: Sequence[int], on_branch: Sequence[int]
) -> bool:
    """Whether two ways begin with different pieces of their origin, of which there are more.

    Two pieces that make up the whole are two streams.
    """
    one, other = (
        {node.piece: node.size for n in way if origin in (node := lineage.node(n)).parents}
        for way in (on_shortcut, on_branch)
    )
    if not one or "" in {**one, **other} or not one.keys().isdisjoint(other):
        return False
    sizes = [*one.values(), *other.values()]
    return len(sizes) != 2 or sum(sizes) < lineage.node(origin).size


def was_added(lineage: Lineage, number: int) -> bool:
    """Whether a tensor, or a view of it, has been an operand of an addition."""
    users, queue = lineage.users(), [number]
    while queue:
        for user in users.get(queue.pop(), ()):
            node = lineage.node(user)
            alone = len(set(node.parents)) == 1
            if not alone and node.call is not None and node.call.is_sum:
                return True
            if alone and not node.is_transform and not node.is_opaque:
                queue.append(user)
    return False


def is_cut(lineage: Lineage, branch: int, depths: Mapping[int, Depth]) -> bool:
    """Whether every way to a branch is detached between two of its parameterised maps.

    What follows begins anew, as a position does that was embedded from a predicted box. A branch
    that is detached as a whole is a fault in a block.

    Args:
        lineage: The tensors of the pass.
        branch: Number of the branch.
        depths: What is on the ways from the origin.
    """
    whole, queue, seen = depths[branch][0], [branch], {branch}
    while queue:
        number = queue.pop()
        if depths[number][0] == 0:
            return False
        node = lineage.node(number)
        if node.call is not None and node.call.name == "detach" and depths[number][0] < whole:
            continue
        for parent in set(node.parents) - seen:
            if parent in depths:
                seen.add(parent)
                queue.append(parent)
    return True


def is_inner(lineage: Lineage, origin: int, frames: Sequence[Frame]) -> bool:
    """Whether a tensor is no stream's, but a layer's own: mapped, or normalised, on its way in.

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
            node = lineage.node(number)
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
