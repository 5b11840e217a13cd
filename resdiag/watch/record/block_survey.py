"""Looks at some operations of a traced pass, and finds the block that each of them belongs to."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from resdiag.watch.base.safety import Guard, guarded
from resdiag.watch.find.additions import Addition
from resdiag.watch.find.blocks import Anatomy
from resdiag.watch.find.dataflow import Dataflow
from resdiag.watch.find.passes import Operands, Surveyor
from resdiag.watch.find.units import Unit
from resdiag.watch.record.sets import Sets

WAY = 16
"""Most operations between two that belong together, such as a product and its softmax."""


@dataclass(eq=False, kw_only=True)
class Part:
    """An operation that was looked at.

    Attributes:
        modules: Those that were running, the innermost last.
        number: Of the tensor that the block's branch is made from; None if it is not known yet.
        is_sure: Whether it is what it seems to be.
    """

    modules: tuple[str, ...]
    number: int | None = None
    is_sure: bool = True


P = TypeVar("P", bound=Part)


class BlockSurvey(Surveyor, ABC, Generic[P]):
    """Parts of a pass, each with the next block whose branch was made from it.

    A survey of one kind of parts appends them to `pending` and has a `write`.

    Args:
        anatomy: Gives the blocks; those of this pass are in it once their operands are there.
        modules: The model's modules by name.
        sets: Where the numbers go.
        is_expected: Whether to say so where no block has such a part.

    Attributes:
        of_blocks: The parts of each block.
        is_whole: Whether the pass has ended as it should.
    """

    SET: ClassVar[str]
    NONE: ClassVar[str]
    """The set of metrics, and why a block has none of them."""

    def __init__(
        self,
        anatomy: Callable[[], Anatomy],
        modules: Mapping[str, nn.Module],
        sets: Sets,
        *,
        is_expected: bool,
    ) -> None:
        self.guard = Guard()  # of its own: an error here ends this set, and not the recording
        self.of_blocks: dict[int, list[P]] = {}
        self.is_whole = False
        self.anatomy, self.modules, self.sets = anatomy, modules, sets
        self._is_expected = is_expected
        self.pending: list[P] = []
        self.open: list[str] = []  # modules that are running

    def begin(self, flow: Dataflow) -> None:
        """The pass begins."""
        self._flow = weakref.ref(flow)  # its calls hold tensors of the pass

    @property
    def flow(self) -> Dataflow:
        """The tensors of the pass that runs."""
        flow = self._flow()
        assert flow is not None
        return flow

    def enters(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A module's forward begins."""
        self.open.append(name)

    def leaves(self, name: str, module: nn.Module, output: Any) -> Any:  # noqa: ANN401
        """A module's forward has ended; an exception may have ended calls inside it."""
        while self.open and self.open.pop() != name:
            pass
        return output

    @guarded
    def operands(self, addition: Addition, tensors: Operands) -> None:
        """A block's branch is there: the parts that it was made from are the block's."""
        row, branch = self.anatomy().rows.get(addition.key), self.flow.number(tensors.branch)
        if row is not None and branch is not None:
            self._take(row, lambda part: self._is_before(part.number, branch))

    @guarded
    def unit(self, unit: Unit) -> None:
        """A module without an addition is a block: the parts inside it are the block's."""
        row = self.anatomy().rows.get((unit.owner, unit.ordinal))
        if row is not None:
            self._take(row, lambda part: unit.owner in part.modules)

    @guarded
    def finished(
        self, features: Tensor | None, logits: Tensor | None, outputs: Sequence[Tensor]
    ) -> None:
        """The pass has ended: write what was measured, and say which blocks have nothing."""
        self.is_whole = True
        for row, parts in self.of_blocks.items():
            self.write(row, parts)
        said = self.of_blocks or self._is_expected
        for row in range(len(self.anatomy().blocks)) if said else ():
            if row not in self.of_blocks:
                self.sets.miss(self.SET, row, self.NONE)

    @abstractmethod
    def write(self, row: int, parts: Sequence[P]) -> None:
        """Hand the numbers of a block on, or say why there are none."""

    def back(self, number: int, ends: Callable[[int], bool]) -> list[int]:
        """A tensor and those that it was made from, no further than to those where it `ends`."""
        found, new = [number], [number]
        for _ in range(WAY):
            inner = [n for n in new if not ends(n)]
            parents = dict.fromkeys(p for n in inner for p in self.flow.node(n).parents)
            new = [p for p in parents if p not in found]
            found += new
        return found

    def _is_before(self, number: int | None, branch: int) -> bool:
        return number is not None and number <= branch and self.flow.descends(branch, number)

    def _take(self, row: int, belongs: Callable[[P], bool]) -> None:
        mine = [part for part in self.pending if part.is_sure and belongs(part)]
        if mine:
            self.of_blocks.setdefault(row, []).extend(mine)
            self.pending = [part for part in self.pending if part not in mine]
