"""Residual blocks of any model, found by watching the additions of one forward pass."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from resdiag.summary import Summary, summarise_blocks
from resdiag.watch.base.functions import Call
from resdiag.watch.find.additions import Addition
from resdiag.watch.find.passes import Observer, PassDriver, Surveyor
from resdiag.watch.find.tracer import TracedPass, Tracing
from resdiag.watch.find.units import Unit
from resdiag.watch.measure.reductions import channel_dimension


@dataclass(frozen=True, kw_only=True, repr=False)
class Block:
    """One residual unit `y = h(x) + F(x)`, `x' = f(y)`.

    Attributes:
        index: Position in forward order, from 0.
        name: The owner's name, with "#k" for its k-th addition if it has several.
        owner: Name of the module whose forward runs the addition; "" is the model itself.
        stage: Consecutive blocks of one output shape share a stage, from 0.
        transition: Whether the block changes the shape (or follows a change of it).
        shortcut: "identity" (no parameters), "projection", "gated" (times a gate that the network
            computes, as in a Highway network) or "none" (a unit without addition).
        after_add: f as the names of its functions joined by "-", or "none".
        shape: Shape of the sum without the batch dimension.
        order: Position of the block's activation or normalisation (He et al. 2016,
            arXiv:1603.05027): "pre" before the branch's first weights, "post" after the addition
            (in a unit without one, after its last weights), "both", or "none".
        branch: The operations on the branch by name, in order; of a unit, all operations.
        branch_module: The module whose output is F(x), or "".
        shortcut_module: The same for h(x).
        features: Dimension of the channels in the sum, counted with the batch dimension; None if
            it is not known and the usual position is assumed.
        dtype: Of the shortcut's elements; "" for a unit.
        frozen_norm: Whether a BatchNorm on the branch ran on running statistics in training.
        shortcut_path: The operations on the shortcut by name, in order, without idle dropout.
    """

    index: int
    name: str
    owner: str
    stage: int
    transition: bool
    shortcut: str
    after_add: str
    shape: tuple[int, ...]
    order: str = "none"
    branch: tuple[str, ...] = ()
    branch_module: str = ""
    shortcut_module: str = ""
    features: int | None = None
    dtype: str = ""
    frozen_norm: bool = False
    shortcut_path: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """Channels of the sum."""
        return self.shape[channel_dimension(len(self.shape) + 1, self.features) - 1]

    @property
    def ends_at_sum(self) -> bool:
        """Whether its output is its sum, so that one gradient is both's."""
        return self.shortcut != "none" and self.after_add == "none"

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        after = "" if self.after_add == "none" else f", {self.after_add} after the addition"
        place = f"stage {self.stage}, shape {shape}"
        return f"<Block {self.index} {self.name!r}: {self.shortcut} shortcut{after}, {place}>"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


class Blocks(list[Block]):
    """Blocks in forward order; shown as a table."""

    def summary(self) -> Summary:
        """One row per block."""
        title = f"{len(self)} block{'s' * (len(self) != 1)}" if self else "no residual block"
        return summarise_blocks(title, (block.to_dict() for block in self))

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()


def describe_units(blocks: Sequence[Block]) -> str:
    """One line about a network without residual additions."""
    many = f"{len(blocks)} modules are" if len(blocks) > 1 else "one module is"
    names = dict.fromkeys(block.name or "the model" for block in (blocks[0], blocks[-1]))
    return (
        f"no residual addition: {many} recorded as blocks: {' .. '.join(names)}; "
        "metrics of sum and skip path are NaN"
    )


class Anatomy:
    """A tracer's blocks in forward order; their keys, (owner, ordinal), are stable over passes."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.parameters: list[list[nn.Parameter]] = []
        self.rows: dict[tuple[str, int], int] = {}  # by key
        self.is_chosen = False  # whether there is no residual addition and units stand for blocks
        self._extent: tuple[int, int] | None = None  # of the last block

    def add_block(self, addition: Addition) -> int:
        """Add a residual block when its operands are there; returns its row."""
        return self._add(
            addition,
            shortcut=addition.kind,
            order=_order(addition.calls),
            branch_module=addition.branch_module,
            shortcut_module=addition.shortcut_module,
            dtype=str(addition.dtype).removeprefix("torch."),
            frozen_norm=torch.is_grad_enabled() and any(map(_is_frozen, addition.calls)),
            shortcut_path=tuple(c.name for c in addition.shortcut_calls if not _is_idle(c)),
        )

    def add_unit(self, unit: Unit) -> int:
        """Add a module without a residual addition; returns its row."""
        order = _order(unit.calls, ends=True)
        row = self._add(unit, shortcut="none", order=order, branch_module=unit.owner)
        self.finish(row, unit.after, unit.parameters)
        self.is_chosen = unit.chosen
        return row

    def finish(self, row: int, after: tuple[Call, ...], parameters: list[nn.Parameter]) -> None:
        """Complete a block at its end: its after-add and its parameters."""
        names = "-".join(call.name for call in after) or "none"
        block = self.blocks[row]
        order = block.order
        if any(call.is_after for call in after):
            order = {"pre": "both", "none": "post"}.get(order, order)
        self.blocks[row] = replace(block, after_add=names, order=order)
        self.parameters[row] = list({id(p): p for p in parameters}.values())

    def _add(self, found: Addition | Unit, **about: Any) -> int:  # noqa: ANN401
        row, owner, ordinal = len(self.blocks), found.owner, found.ordinal
        features, x, output = found.features, found.entered, found.shape
        before = self.blocks[-1] if self.blocks else None
        entered = extent = _extent(output, features)
        if x is not None:
            entered = _extent(x, features if len(x) == len(output) else None)
        moved = before is not None and self._extent != extent
        self._extent = extent
        block = Block(
            index=row,
            name=f"{owner}#{ordinal}" if ordinal or not owner else owner,
            owner=owner,
            stage=0 if before is None else before.stage + moved,
            transition=moved or entered != extent,
            after_add="none",
            shape=tuple(output[1:]),
            branch=tuple(call.name for call in found.calls),
            features=features,
            **about,
        )
        self.blocks.append(block)
        self.parameters.append([])
        self.rows[owner, ordinal] = row
        return row


def _is_frozen(call: Call) -> bool:
    """Whether a call is a BatchNorm that normalises with running statistics."""
    training = call.kwargs.get("training", call.args[4] if len(call.args) > 4 else False)
    return call.name == "batch_norm" and not training


def _is_idle(call: Call) -> bool:
    """Whether a call is a dropout that drops nothing."""
    p = call.kwargs.get("p", call.args[0] if call.args else 0.5)
    training = call.kwargs.get("training", call.args[1] if len(call.args) > 1 else True)
    return "dropout" in call.name and not (p and training)


def _order(calls: Sequence[Call], *, ends: bool = False) -> str:
    """Where activation or normalisation stands: "pre" before the first weights.

    In a module without an addition (`ends`) also "post", after the last ones, or "both".
    """
    telling = [call.is_after for call in calls if call.is_after or call.is_transform] or [False]
    if ends and telling[-1]:
        return "both" if telling[0] else "post"
    return "pre" if telling[0] else "none"


def _extent(shape: torch.Size, features: int | None) -> tuple[int, int]:
    """Channels and elements: a view that merges batch and positions changes neither."""
    return (shape[channel_dimension(len(shape), features)] if shape else 1), shape.numel()


class BlockFinder(Observer):
    """Collects the anatomy of one pass, and no numbers."""

    def __init__(self) -> None:
        self.anatomy = Anatomy()

    def added(self, addition: Addition, total: Tensor) -> None:
        """A block begins, or has one branch more."""
        if not addition.extends:
            self.anatomy.add_block(addition)

    def closed(self, addition: Addition, output: Tensor) -> None:
        """A block has ended."""
        row = self.anatomy.rows[addition.key]
        self.anatomy.finish(row, addition.after, addition.parameters)

    def unit(self, unit: Unit) -> None:
        """A module stands for a block."""
        self.anatomy.add_unit(unit)


def find_blocks(
    model: nn.Module, *inputs: object, blocks: Sequence[str] | None = None, **kwargs: object
) -> Blocks:
    """Find the residual blocks of a model by running one forward pass on example inputs.

    The pass runs in evaluation mode without gradients; the mode of every module and the random
    state are put back.

    Args:
        model: Any module.
        *inputs: Positional inputs of its forward.
        blocks: Names or patterns of modules to take as the blocks instead.
        **kwargs: Keyword inputs of its forward.

    Returns:
        A list of `Block` in forward order; empty if the model has no residual addition.

    Raises:
        ValueError: A name or pattern in `blocks` matches no module.

    >>> from torchvision.models import resnet18
    >>> found = find_blocks(resnet18(), torch.zeros(1, 3, 64, 64))
    >>> len(found), found[2].shortcut, found[2].after_add
    (8, 'projection', 'relu')
    """
    anatomy = find_anatomy(model, *inputs, blocks=blocks, **kwargs)
    return Blocks([] if anatomy.is_chosen else anatomy.blocks)


def find_units(model: nn.Module, *inputs: object, **kwargs: object) -> Blocks:
    """What a monitor records of a network without residual additions; empty if it has some.

    >>> from torchvision.models import alexnet
    >>> [unit.name for unit in find_units(alexnet(), torch.zeros(1, 3, 64, 64))][3:]
    ['features.8', 'features.10', 'classifier.1', 'classifier.4']
    """
    anatomy = find_anatomy(model, *inputs, blocks=None, **kwargs)
    return Blocks(anatomy.blocks if anatomy.is_chosen else [])


def find_anatomy(
    model: nn.Module, *inputs: object, blocks: Sequence[str] | None = None, **kwargs: object
) -> Anatomy:
    """As `find_blocks`, with the parameters of each block; without additions, of units."""
    finder = BlockFinder()
    trace_once(model, inputs, kwargs, [finder], match_modules(model, blocks))
    return finder.anatomy


def trace_once(
    model: nn.Module,
    inputs: tuple[Any, ...],
    keywords: Mapping[str, Any],
    observers: Sequence[Observer],
    units: frozenset[str] | None = None,
    surveyors: Sequence[Surveyor] = (),
    *,
    evaluate: bool = True,
) -> None:
    """Trace one pass without gradients; modes, buffers and random state are put back."""
    tracing = Tracing(model, units)
    driver = PassDriver(model, lambda: TracedPass(tracing, observers, surveyors))
    try:
        with put_back(model, evaluate=evaluate), torch.no_grad():
            model(*inputs, **keywords)
    finally:
        driver.close()


def match_modules(model: nn.Module, patterns: Sequence[str] | None) -> frozenset[str] | None:
    """Names of the modules that a list of names or shell patterns means; None for None.

    As in a shell, a star stays on its level: "layer1.*" are the children of layer1, not theirs.
    A pattern that matches nothing raises a ValueError.
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
def put_back(model: nn.Module, *, evaluate: bool) -> Iterator[None]:
    """For one pass: evaluation mode if `evaluate`; modes, buffers and random state are put back."""
    modes = {module: module.training for module in model.modules()}
    buffers = [] if evaluate else [(x, x.clone()) for x in model.buffers()]
    with torch.random.fork_rng():
        if evaluate:
            model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for x, before in buffers:
                    x.copy_(before)
