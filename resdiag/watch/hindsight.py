"""Reads a forward pass in hindsight, from the autograd graph that it leaves.

Whoever listens to a pass runs Python between its operations, and there everything is slow: two
convolutions leave nothing of an interpreter in the caches, and an operation on 16 numbers takes
thirty times as long as in a loop. But a training repeats its pass, and the graph of a pass says by
its nodes, edges and leaves that it was the same one; it holds what the backward pass needs, and
that is most of what a recorder of the core set wants to see. So: learn from a pass that was
listened to where each tensor of a block can be had from the graph (`watch/sources.py`), and if all
can, listen to no further pass, but read its graph when it has ended. At the first graph that is
another one, listening begins again, for good.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.autograd.graph import Node

from resdiag.watch.addition import Addition
from resdiag.watch.base.functions import Call
from resdiag.watch.measure import changes, reductions
from resdiag.watch.measure.batchnorm import Normalised
from resdiag.watch.measure.reductions import Scalar
from resdiag.watch.skeleton import Skeleton, walk
from resdiag.watch.sources import Added, Edge, Led, Normed, Source, Sources, edge_of

SITES = ("branch", "shortcut", "output")
"""What is read of a block."""

_TRIES = 2


@dataclass(frozen=True)
class _Heard:
    """A block's tensors in a pass that was listened to, by their edges."""

    branch: Edge | None
    shortcut: Edge | None
    origin: Edge | None
    path: tuple[Call, ...] | None
    sum: Edge | None = None
    output: Edge | None = None
    after: tuple[Call, ...] = ()


@dataclass(frozen=True)
class _Known:
    """Where a block's tensors can be had.

    Attributes:
        sources: Of branch, shortcut and output.
        same: Where a site is a tensor that an earlier one was: its row and site.
        sum: The sum, None where nothing is applied to it.
        after: What is applied to it.
        output: The edge of the output.
        numbers: What the nodes of sum and output keep in numbers: index, name and value.
    """

    sources: tuple[Source, Source, Source]
    same: tuple[tuple[int, str] | None, ...]
    sum: Source | None
    after: tuple[Call, ...]
    output: tuple[int, int]
    numbers: list[tuple[int, str, object]]


@dataclass(frozen=True)
class View:
    """One pass that has ended, as its graph shows it.

    Attributes:
        nodes: The graph's nodes.
        blocks: Where to look, row by row.
        head: Input and result of the classifier; None where there is none.
    """

    nodes: Sequence[Node]
    blocks: Sequence[_Known]
    head: tuple[Tensor, Tensor] | None

    def same(self, row: int, at: int) -> tuple[int, str] | None:
        """Row and site at which the tensor of a site, by its place in `SITES`, was one before."""
        return self.blocks[row].same[at]

    def read(self, row: int, at: int) -> Tensor | Normalised:
        """The tensor of a site, or what its moments follow from.

        Raises:
            Gone: It cannot be had any more.
        """
        source = self.blocks[row].sources[at]
        if isinstance(source, Normed):
            return source.moments(self.nodes)
        return source.tensor(self.nodes)

    def is_bare(self, row: int) -> bool:
        """Whether a block's output is its sum."""
        return not self.blocks[row].after

    def perturbation(self, row: int, samples: int | None) -> Scalar:
        """P1 of a block on so many samples at the head of the batch.

        Raises:
            Gone: Its sum cannot be had any more.
        """
        known = self.blocks[row]
        if known.sum is None:
            return 0.0
        u = known.sum.tensor(self.nodes, samples)
        return changes.change_by(known.after, u)

    def outputs(self) -> Iterator[tuple[Node, int]]:
        """Row by row the node that makes a block's output, and which of its outputs that is."""
        edges = (known.output for known in self.blocks)
        return ((self.nodes[index], place) for index, place in edges)


class Hindsight:
    """What has been learned of a model's passes.

    Attributes:
        is_ready: Whether the next pass need not be listened to.
    """

    def __init__(self) -> None:
        self.is_ready = False
        self._tries = _TRIES
        self._skeleton: Skeleton | None = None
        self._blocks: list[_Known] = []
        self._head: tuple[Source, tuple[int, int]] | None = None
        self.forget()

    @property
    def listens(self) -> bool:
        """Whether it wants to be told of the pass."""
        return self._tries > 0 and not self.is_ready

    def forget(self) -> None:
        """Let go of a pass."""
        self._heard: dict[int, _Heard | None] = {}

    def give_up(self) -> None:
        """The passes are not alike, or do not show what is wanted: listen to all of them."""
        self._tries, self.is_ready = 0, False
        self._skeleton, self._blocks, self._head = None, [], None

    # -- a pass that is listened to ------------------------------------------------------------

    def operands(self, row: int, addition: Addition) -> None:
        """Both operands of a residual addition are there."""
        branch, shortcut, origin = addition.branch, addition.shortcut, addition.origin
        plain = addition.shortcut_scale == addition.branch_scale == 1 and not addition.extends
        usual = reductions.is_fast(branch) and reductions.is_fast(shortcut)
        self._heard[row] = None
        if plain and usual and branch.shape == shortcut.shape:
            entered = None if origin is None else edge_of(origin)
            self._heard[row] = _Heard(edge_of(branch), edge_of(shortcut), entered, addition.path)

    def added(self, row: int, total: Tensor) -> None:
        """The addition has run; nothing was applied to its sum yet."""
        heard = self._heard.get(row)
        if heard is not None:
            self._heard[row] = replace(heard, sum=edge_of(total))

    def closed(self, row: int, output: Tensor, after: tuple[Call, ...]) -> None:
        """A block has ended."""
        heard = self._heard.get(row)
        usual = len(after) <= 1 and all(call.is_activation for call in after)
        if heard is not None:
            ended = replace(heard, output=edge_of(output), after=after)
            self._heard[row] = ended if usual and reductions.is_fast(output) else None

    def learn(
        self,
        outputs: Sequence[Tensor],
        features: Tensor | None,
        logits: Tensor | None,
    ) -> View | None:
        """A pass has ended: the second one of two alike is learned.

        Args:
            outputs: What the model returned.
            features: What went into the classifier.
            logits: What came out of it.

        Returns:
            The pass as its graph shows it, to be compared with what was heard; None if it does not
            show all, or nothing is known to repeat yet.
        """
        nodes, skeleton = walk(outputs)
        before, self._skeleton = self._skeleton, skeleton
        if before is None:
            return None
        self._tries -= 1
        view = None
        if skeleton.fits(before):
            sources = Sources(nodes)
            known = self._learn_head(sources, features, logits)
            if known and self._learn_blocks(sources, nodes):
                view = self._view(nodes, outputs)
        if view is None and not self._tries:
            self.give_up()
        return view

    def _learn_blocks(self, sources: Sources, nodes: Sequence[Node]) -> bool:
        """Note where the tensors of the blocks are; whether all can be had."""
        blocks, seen = list[_Known](), dict[tuple[int, int], tuple[int, str]]()
        for row in range(len(self._heard)):
            heard = self._heard.get(row)
            known = None if heard is None else _locate(row, heard, sources, nodes, seen)
            if known is None:
                return False
            blocks.append(known)
        self._blocks = blocks
        return bool(blocks)

    def _learn_head(self, sources: Sources, features: Tensor | None, logits: Tensor | None) -> bool:
        """Note where the classifier is; whether its input can be had, or there is none."""
        self._head = None
        if features is None or logits is None:
            return True
        source, place = sources.find(edge_of(features)), sources.place(edge_of(logits))
        if source is None or place is None:
            return False
        self._head = source, place
        return True

    # -- a pass that is not --------------------------------------------------------------------

    def look(self, outputs: Sequence[Tensor]) -> View | None:
        """The pass that made a model's outputs; None if it is not the one that was learned."""
        nodes, skeleton = walk(outputs)
        if self._skeleton is None or not skeleton.fits(self._skeleton):
            return None
        numbers = (number for known in self._blocks for number in known.numbers)
        if any(getattr(nodes[index], name) != value for index, name, value in numbers):
            return None
        return self._view(nodes, outputs)

    def _view(self, nodes: Sequence[Node], outputs: Sequence[Tensor]) -> View | None:
        """A pass that was recognised; None if the classifier's result is no output."""
        if self._head is None:
            return View(nodes, self._blocks, None)
        source, (index, place) = self._head
        ends = (x for x in outputs if x.grad_fn is nodes[index] and x.output_nr == place)
        logits = next(ends, None)
        if logits is None:
            return None
        return View(nodes, self._blocks, (source.tensor(nodes), logits))


def _locate(
    row: int,
    heard: _Heard,
    sources: Sources,
    nodes: Sequence[Node],
    seen: dict[tuple[int, int], tuple[int, str]],
) -> _Known | None:
    """Where a block's tensors can be had, None if one cannot; notes them in `seen` by edge."""
    branch = sources.find(heard.branch)
    shortcut = sources.find(heard.shortcut) or sources.led(heard.origin, heard.path)
    sum_, output = sources.place(heard.sum), sources.place(heard.output)
    if branch is None or shortcut is None or sum_ is None or output is None:
        return None
    if not nodes[sum_[0]].name().startswith("AddBackward"):
        return None
    total: Source = sources.find(heard.sum) or Added(branch, shortcut)
    # nobody behind the last block may keep its output
    result = sources.find(heard.output) or (Led(total, heard.after) if heard.after else total)
    same = list[tuple[int, str] | None]()
    for site, edge in zip(SITES, (heard.branch, heard.shortcut, heard.output), strict=True):
        place = sources.place(edge)
        same.append(None if place is None else seen.get(place))
        if place is not None and site != "branch":
            seen.setdefault(place, (row, site))
    found, unsettled = (branch, shortcut, result), total if heard.after else None
    numbers = _numbers(nodes, (sum_[0], output[0]))
    return _Known(found, tuple(same), unsettled, heard.after, output, numbers)


_NUMBERS = (
    *("_saved_alpha", "_saved_scale", "_saved_input_scale", "_saved_negative_slope"),
    *("_saved_min_val", "_saved_max_val", "_saved_beta", "_saved_threshold"),
)


def _numbers(nodes: Sequence[Node], which: Iterable[int]) -> list[tuple[int, str, object]]:
    """The numbers that nodes keep: the scale of an operand, a slope."""
    return [
        (index, name, getattr(nodes[index], name))
        for index in which
        for name in _NUMBERS
        if hasattr(nodes[index], name)
    ]
