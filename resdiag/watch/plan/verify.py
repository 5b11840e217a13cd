"""Tells by the autograd graph of a pass whether its blocks are the planned ones.

Hooks do not see that a pass differs: a branch that is scaled behind its last module shows the same
tensors to them. The graph does. From a block's output it leads over the after-add to the addition,
on to both operands, and back to the block's input. What the nodes on the way are, how they hang
together, the leaves they end in and the numbers they keep is written down as a list of tokens, in
the traced pass and in every later one; equal lists are equal blocks. All that was seen of a block
must lie on the way where it lay before. Nodes know nothing of shapes, so batches of other sizes
fit too.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from resdiag.catalog.table import SITES
from resdiag.watch.measure.moments import Gone, kept
from resdiag.watch.plan.ports import Plan

Edge: TypeAlias = tuple[Node, int]
"""A tensor of a pass: the node that made it, and which of the node's outputs it is."""

Tokens: TypeAlias = list[object]

AWAY = "away"  # stands for a tensor that does not lie on the way
BARE = "bare"  # stands for the block's input, where no gradient leads to it
_LIMIT = 20_000  # nodes of one block; a longer way is not written down
_NUMBERS = frozenset(f"_saved_{name}" for name in (
    "alpha", "beta", "scale", "input_scale", "value", "negative_slope", "min", "max", "min_val",
    "max_val", "threshold", "approximate", "weight", "p",
))  # fmt: skip
"""Numbers that nodes of additions and activations keep."""

_SHAPES = ("sizes", "numel", "sym_", "seed", "offset", "philox")
"""Parts of the names of what nodes keep about shapes and random numbers: it differs by batch."""

_ACCUMULATES = type(get_gradient_edge(torch.ones(1, requires_grad=True)).node)


def edge_of(x: Tensor | None) -> Edge | None:
    """The edge of a tensor; None where no gradient leads to it."""
    if x is None:
        return None
    if x.grad_fn is not None:
        return x.grad_fn, x.output_nr
    if not x.requires_grad:
        return None
    leaf = get_gradient_edge(x)
    return leaf.node, leaf.output_nr


class PassGraph:
    """The edges seen in one pass: of blocks by row and site, of its ends; `kept` as in `Survey`."""

    def __init__(self, kept: frozenset[int]) -> None:
        self._kept = kept
        self._edges: dict[tuple[int, str], Edge | None] = {}
        self._ends: dict[Edge, str] = {}
        # where tensors lie in memory to which no gradient leads
        self._bare: dict[tuple[int, str], int] = {}

    def see(self, row: int, site: str, x: Tensor | None) -> None:
        """A tensor of a block was seen."""
        self.see_edge(row, site, edge := edge_of(x))
        if x is not None and edge is None and row != _ENDS:
            with suppress(RuntimeError):  # a subclass of tensors may lie nowhere
                self._bare[row, site] = x.data_ptr()

    def see_edge(self, row: int, site: str, edge: Edge | None) -> None:
        """The same for a tensor that may have been overwritten since."""
        self._edges[row, site] = edge

    def see_ends(
        self, features: Tensor | None, logits: Tensor | None, outputs: Sequence[Tensor]
    ) -> None:
        """The pass has ended."""
        self.see(_ENDS, "features", features)
        self.see(_ENDS, "logits", logits)
        for index, output in enumerate(outputs):
            self.see(_ENDS, f"output {index}", output)

    def tokens(self, row: int, sites: Sequence[str], *, path: bool = False) -> Tokens | None:
        """The way back from the last of some sites of a row to the first.

        It ends at sums and outputs of the blocks before, too. None if no gradient leads along it,
        so that nothing can be said. `path` writes down all numbers that the nodes keep, for calls
        that will be applied again.
        """
        edges = [self._edges.get((row, site)) for site in sites]
        start, target = edges[-1], edges[0]
        if start is None:
            return None
        stops = dict(self._ends)
        if target is not None:
            stops.setdefault(target, "start")
        bare = self._bare.get((row, "input")) if "branch" in sites else None
        found, at = _walk(start, stops, self._kept, path=path, bare=bare)
        for site, edge in zip(sites[:-1], edges[:-1], strict=True):
            if edge is None:
                found.append(BARE if bare and self._bare.get((row, site)) == bare else None)
            elif edge in stops:
                found.append(stops[edge])
            else:
                found.append((at[edge[0]], edge[1]) if edge[0] in at else AWAY)
        return found

    def behind(self, row: int, site: str) -> Tokens | None:
        """The way back from a tensor to the sums and outputs of the blocks before."""
        start = self._edges.get((row, site))
        return None if start is None else _walk(start, self._ends, self._kept, path=False)[0]

    def end(self, row: int) -> None:
        """The block's part of the graph is known: later ones end at its sum and output."""
        for site in ("sum", "output"):
            if (edge := self._edges.get((row, site))) is not None:
                self._ends.setdefault(edge, f"{site} {row}")


def _walk(
    start: Edge,
    stops: Mapping[Edge, str],
    stay: frozenset[int],
    *,
    path: bool,
    bare: int | None = None,
) -> tuple[Tokens, dict[Node, int]]:
    """Tokens of the nodes behind an edge, breadth first, and the places of the nodes.

    No edge leads to an input without a gradient: nodes at whose end one is missing say whether they
    keep what lies at `bare`.
    """
    if start in stops:
        return [stops[start]], {}
    nodes, at = [start[0]], {start[0]: 0}
    tokens: Tokens = [start[1]]
    for node in nodes:  # grows on the way
        tokens += (type(node), *_numbers(node, type(node), path=path))
        for ahead, place in node.next_functions:
            if ahead is None:
                tokens.append(None if bare is None else _keeps(node, bare))
            elif (stop := stops.get((ahead, place))) is not None:
                tokens.append(stop)
            elif type(ahead) is _ACCUMULATES:
                leaf = id(ahead.variable)  # type: ignore[attr-defined]  # torch declares no such class
                tokens.append(leaf if leaf in stay else "leaf")  # inputs are others in each pass
            else:
                index = at.setdefault(ahead, len(nodes))
                if index == len(nodes):
                    nodes.append(ahead)
                tokens += (index, place)
        if len(nodes) > _LIMIT:
            break
    return tokens, at


def _keeps(node: Node, place: int) -> bool:
    """Whether a node keeps a tensor that lies at a place in memory."""
    for name in _tensors_of(type(node)):
        with suppress(Gone, RuntimeError):
            if kept(node, name).data_ptr() == place:
                return True
    return False


def _numbers(node: Node, kind: type, *, path: bool) -> Iterator[object]:
    """The numbers that a node keeps, of which the block's do not depend on the batch."""
    for name in _names_of(kind, path=path):
        yield getattr(node, name)
    if path:
        for name in _tensors_of(kind):
            try:
                value = kept(node, name)
            except Gone:
                continue
            if not value.dim() and value.device.type == "cpu":  # a number in an operation
                yield float(value)


@functools.cache
def _names_of(kind: type, *, path: bool) -> tuple[str, ...]:
    """The attributes of a kind of node that are numbers: tensors have a raw form besides."""
    names = (name for name in dir(kind) if name.startswith("_saved_"))
    names = (name for name in names if not hasattr(kind, f"_raw{name}"))
    if path:
        return tuple(name for name in names if not any(word in name for word in _SHAPES))
    return tuple(name for name in names if name in _NUMBERS)


@functools.cache
def _tensors_of(kind: type) -> tuple[str, ...]:
    return tuple(n.removeprefix("_raw_saved_") for n in dir(kind) if n.startswith("_raw_saved_"))


_ENDS = -1  # the row of the classifier and of what the model returns


class Pattern:
    """What the graph of one pass, of `outputs` results, says of a plan's blocks and classifier."""

    def __init__(self, plan: Plan, graph: PassGraph, outputs: int) -> None:
        # tokens of each block; None where no gradient tells
        self.blocks: list[tuple[Tokens | None, ...]] = []
        for row, block in enumerate(plan.blocks):
            whole = graph.tokens(row, SITES if block.unit is None else ("input", "output"))
            # a block that no plan knows may have come in between
            parts: tuple[Tokens | None, ...] = (whole, graph.behind(row, "input"))
            if block.addition is not None and block.addition.path:
                parts = (*parts, graph.tokens(row, ("input", "shortcut"), path=True))
            self.blocks.append(parts)
            graph.end(row)
        # those of the classifier and of the outputs, the way to the last block at the end
        ends = [("features", "logits"), *(("logits", f"output {k}") for k in range(outputs))]
        self.ends = [graph.tokens(_ENDS, sites) for sites in ends]
        self.ends.append(graph.behind(_ENDS, "features"))

    def followed(self, known: "Pattern") -> set[str]:
        """Sums and outputs, as in `PassGraph.end`, that other operations take than when planned.

        One of them may be an after-add, which the block itself does not show.
        """
        ways = [(now[1], then[1]) for now, then in zip(self.blocks, known.blocks, strict=True)]
        pairs = [
            (_takers(now), _takers(then)) for now, then in (*ways, (self.ends[-1], known.ends[-1]))
        ]
        return {end for now, then in pairs for end in now | then if now.get(end) != then.get(end)}

    def unseen(self, plan: Plan) -> frozenset[int]:
        """Rows of a traced pass whose sums no gradient shows: frozen, or run without gradients."""
        unseen = set[int]()
        for row, block in enumerate(plan.blocks):
            whole, _, *path = self.blocks[row]
            hidden = whole is None or any(place in (None, AWAY, BARE) for place in whole[-4:])
            if block.unit is None and (hidden or (path and path[0] is None)):
                unseen.add(row)
        return frozenset(unseen)


def _takers(tokens: Tokens | None) -> dict[str, list[object]]:
    """What takes each sum or output that a way ends in: kinds of nodes, None for nothing."""
    kind, found = None, dict[str, list[object]]()
    for token in tokens or ():
        if isinstance(token, type):
            kind = token
        elif isinstance(token, str) and " " in token:
            found.setdefault(token, []).append(kind)
    return found
