"""What tells a stream, which goes on from sum to sum, from what is only added to one."""

from collections.abc import Sequence

from resdiag.watch.lineage import Lineage


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
