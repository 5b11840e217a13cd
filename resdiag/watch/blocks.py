"""Residual blocks of any model, found by watching the additions of one forward pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from resdiag.watch.calls import Call
from resdiag.watch.metrics import channel_dimension
from resdiag.watch.tracer import Addition, Tracer


@dataclass(frozen=True, kw_only=True)
class Block:
    """One residual unit `y = h(x) + F(x)`, `x' = f(y)`.

    Attributes:
        index: Position in forward order, from 0.
        name: The owner's name, with "#k" for its k-th addition where it has several.
        owner: Name of the module whose forward runs the addition; "" is the model itself.
        stage: Consecutive blocks of one output shape share a stage, from 0.
        transition: Whether the block changes the shape (or follows a change of it).
        shortcut: "identity" (no parameters), "projection" or "none" (a unit without addition).
        after_add: f as the names of its functions joined by "-", or "none".
        shape: Shape of the sum without the batch dimension.
    """

    index: int
    name: str
    owner: str
    stage: int
    transition: bool
    shortcut: str
    after_add: str
    shape: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Channels of the sum."""
        return self.shape[channel_dimension(torch.empty(1, *[0] * len(self.shape))) - 1]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "shape": list(self.shape)}


class Anatomy:
    """Collects blocks in forward order while a tracer runs.

    The key of a block is (owner, ordinal): stable from pass to pass of a deterministic forward.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.parameters: list[list[nn.Parameter]] = []
        self.rows: dict[tuple[str, int], int] = {}

    def add_block(self, addition: Addition, *, inputs: Sequence[int] | None) -> int:
        """Add a residual block when its sum is there; returns its row."""
        assert addition.sum is not None
        kind = "projection" if addition.shortcut_count else "identity"
        return self._add(
            addition.owner, addition.ordinal, tuple(addition.sum.shape[1:]), kind, inputs
        )

    def add_unit(self, owner: str, ordinal: int, x: Tensor, output: Tensor) -> int:
        """Add a module without a residual addition; returns its row."""
        return self._add(owner, ordinal, tuple(output.shape[1:]), "none", tuple(x.shape[1:]))

    def finish(self, row: int, after: tuple[Call, ...], parameters: list[nn.Parameter]) -> None:
        """Complete a block at its end: its after-add and its parameters."""
        names = "-".join(call.name for call in after) or "none"
        self.blocks[row] = Block(**{**self.blocks[row].__dict__, "after_add": names})
        self.parameters[row] = list({id(p): p for p in parameters}.values())

    def _add(
        self,
        owner: str,
        ordinal: int,
        shape: tuple[int, ...],
        shortcut: str,
        inputs: Sequence[int] | None,
    ) -> int:
        row = len(self.blocks)
        before = self.blocks[-1] if self.blocks else None
        changed = inputs is not None and tuple(inputs) != shape
        moved = before is not None and before.shape != shape
        stage = 0 if before is None else before.stage + moved
        name = f"{owner}#{ordinal}" if ordinal else owner
        self.blocks.append(
            Block(
                index=row,
                name=name or f"#{ordinal}",
                owner=owner,
                stage=stage,
                transition=changed or moved,
                shortcut=shortcut,
                after_add="none",
                shape=shape,
            )
        )
        self.parameters.append([])
        self.rows[owner, ordinal] = row
        return row


class _Finder:
    """The listener of `find_blocks`: anatomy only, no numbers."""

    def __init__(self) -> None:
        self.anatomy = Anatomy()

    def operands(self, addition: Addition) -> None:
        """Nothing to measure."""

    def added(self, addition: Addition) -> None:
        if addition.extends:
            return
        origin = addition.origin
        self.anatomy.add_block(addition, inputs=None if origin is None else origin.shape[1:])

    def closed(self, addition: Addition, output: Tensor) -> None:
        row = self.anatomy.rows[addition.owner, addition.ordinal]
        self.anatomy.finish(row, addition.after, addition.parameters)

    def unit(self, owner: str, ordinal: int, x: Tensor, output: Tensor, module: nn.Module) -> None:
        row = self.anatomy.add_unit(owner, ordinal, x, output)
        self.anatomy.finish(row, (), list(module.parameters()))

    def same(self, old: Tensor, new: Tensor) -> None:
        """Nothing is known by its identity."""

    def activation(self, owners: tuple[str, ...], call: Call, x: Tensor) -> None:
        """Nothing to measure."""

    def finished(self, features: Tensor | None, logits: Tensor | None) -> None:
        """Nothing to measure."""


def find_blocks(
    model: nn.Module, *inputs: object, blocks: Sequence[str] | None = None, **kwargs: object
) -> list[Block]:
    """Find the residual blocks of a model by running one forward pass on example inputs.

    The pass runs in evaluation mode without gradients; the mode of every module and the random
    state are put back.

    Args:
        model: Any module.
        *inputs: Positional inputs of its forward.
        blocks: Names or patterns of modules to take as the blocks instead.
        **kwargs: Keyword inputs of its forward.

    Returns:
        Blocks in forward order; empty if the model has no residual addition.

    Raises:
        ValueError: A name or pattern in `blocks` matches no module.

    >>> from torchvision.models import resnet18
    >>> found = find_blocks(resnet18(), torch.zeros(1, 3, 64, 64))
    >>> len(found), found[2].shortcut, found[2].after_add
    (8, 'projection', 'relu')
    """
    return find_anatomy(model, *inputs, blocks=blocks, **kwargs).blocks


def find_anatomy(
    model: nn.Module, *inputs: object, blocks: Sequence[str] | None = None, **kwargs: object
) -> Anatomy:
    """As `find_blocks`, with the parameters of each block."""
    finder = _Finder()
    tracer = Tracer(model, finder, lambda: True, match_modules(model, blocks))
    try:
        with _evaluating(model), torch.no_grad():
            model(*inputs, **kwargs)
    finally:
        tracer.close()
    return finder.anatomy


def match_modules(model: nn.Module, patterns: Sequence[str] | None) -> frozenset[str] | None:
    """Names of the modules that a list of names or shell patterns means; None for None.

    As in a shell, a star stays on its level: "layer1.*" are the children of layer1, not theirs.

    Raises:
        ValueError: A pattern matches nothing.
    """
    if patterns is None:
        return None
    names = [name for name, _ in model.named_modules()]
    matched: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if _matches(name, pattern)}
        if not found:
            raise ValueError(f"blocks: '{pattern}' matches no module of {type(model).__name__}")
        matched |= found
    return frozenset(matched)


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    same = len(parts) == len(wanted) and bool(name) == bool(pattern)
    return same and all(map(fnmatchcase, parts, wanted))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and a forked random state for one pass."""
    modes = {module: module.training for module in model.modules()}
    with torch.random.fork_rng():
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
