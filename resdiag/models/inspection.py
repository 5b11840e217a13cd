"""The anatomy of any model: its residual blocks, found on a generated batch, without training."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from resdiag.errors import ResdiagError, UsageError
from resdiag.models.example import Example, example_batch
from resdiag.models.source import LIBRARIES, Built, build_source, error_words
from resdiag.summary import Summary, summarise_blocks
from resdiag.watch.find.blocks import Block, find_anatomy
from resdiag.watch.plan.ports import example

_RESERVED = 0.7  # share of the free memory that a model's weights may take


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Inspection:
    """What `inspect` found; shown as a table of the blocks.

    Attributes:
        built: The model.
        example: The batch on which the blocks were found.
        blocks: In forward order; empty without residual additions.
        units: The modules that a monitor records instead of blocks where there are none.
        parameters: Numbers of parameters of each block or unit.
    """

    built: Built
    example: Example
    blocks: list[Block]
    units: list[Block]
    parameters: list[int]

    def summary(self) -> Summary:
        """One row per block, or per unit where there is no residual addition."""
        found = [*self.blocks, *self.units]
        many = f"{len(found)} {'block' if self.blocks else 'module'}{'s' * (len(found) != 1)}"
        kind = "" if self.blocks or not found else " without a residual addition"
        total = words_of(count_parameters(self.built.model))
        title = f"{self.built.name}: {many}{kind}, {total} parameters"
        return summarise_blocks(title, (block.to_dict() for block in found), notes=self.built.notes)

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """The document of `resdiag inspect --json`."""
        pairs = zip([*self.blocks, *self.units], self.parameters, strict=True)
        rows = [{**block.to_dict(), "parameters": count} for block, count in pairs]
        blocks, units = rows[: len(self.blocks)], rows[len(self.blocks) :]
        return {"model": self.built.name, "blocks": blocks, "units": units}


def inspect(
    model: str | nn.Module,
    arguments: Mapping[str, Any] | None = None,
    *,
    example_inputs: object = None,
    shape: Sequence[int] | None = None,
    batch_size: int = 1,
    blocks: Sequence[str] | None = None,
) -> Inspection:
    """Find the residual blocks of a model, without training it.

    The pass runs in evaluation mode without gradients; the mode of every module and the random
    state are put back. The model that a name of a library means is built on the meta device, where
    weights take neither memory nor time; one that cannot run there, and a factory of the user's,
    is built for real.

    Args:
        model: A module, or a name such as "torchvision:resnet18"; see `resdiag inspect --help`.
        arguments: Of the factory or configuration that a name means.
        example_inputs: Inputs of one forward pass of a module, a tuple or a mapping of keywords;
            None generates a batch of the form that the model seems to take.
        shape: Shape of one sample, instead of the generated one.
        batch_size: Samples.
        blocks: Patterns of modules to take as the blocks instead of found additions.

    Raises:
        UsageError: The model is unknown, cannot be built, does not run on the batch, or does not
            fit into memory; one line.

    >>> [block.shortcut for block in inspect("torchvision:resnet18").blocks[:3]]
    ['identity', 'identity', 'projection']
    >>> from resdiag.models.resnet import build_model
    >>> print(inspect(build_model("elu", 8, seed=0)))
    ResNet: 3 blocks, 75.0 k parameters
      block  name        stage  shortcut  after add  shape
          0  stages.0.0      0  identity  none       16x32x32
          1  stages.1.0      1  identity  none       32x16x16
          2  stages.2.0      2  identity  none       64x8x8
    """
    if isinstance(model, nn.Module):
        built = Built(name=type(model).__name__, library="", model=model)
        if example_inputs is None:
            given = example_batch(built, batch_size=batch_size, shape=shape)
        else:
            args, kwargs = example(example_inputs)
            given = Example(args=args, kwargs=dict(kwargs))
        return _look(built, given, blocks)

    def look(built: Built) -> Inspection:
        batch = example_batch(built, batch_size=batch_size, shape=shape)
        return _look(built, batch, blocks)

    if model.partition(":")[0] not in LIBRARIES:
        return look(build_source(model, arguments))
    try:
        built = build_source(model, arguments, meta=True)
    except ResdiagError:  # unknown, or a factory that reads numbers out of its tensors
        return look(build_source(model, arguments))
    try:
        return look(built)
    except ResdiagError:  # so does its forward, or it fails on every device
        check_memory(built, copies=1)
        return look(build_source(model, arguments))


def check_memory(built: Built, *, copies: float) -> None:
    """Refuse a model whose weights, `copies` times in float32, are more than this machine has free.

    Raises:
        UsageError: It does not fit; the message has the estimate.
    """
    count = count_parameters(built.model)
    needed, free = 4.0 * count * copies, free_memory()
    if needed > _RESERVED * free:
        raise UsageError(
            f"{built.name} has {words_of(count)} parameters: it needs about {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free",
            "make it smaller with --arg, e.g. --arg num_hidden_layers=4",
        )


def free_memory() -> float:
    """Bytes of memory that a process can still get; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        rows = dict(line.split(":", 1) for line in lines)
        return float(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return float("inf")


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def words_of(count: float) -> str:
    """A number of parameters in words.

    >>> words_of(124_439_808), words_of(272), words_of(6_738_415_616)
    ('124 M', '272', '6.74 G')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{count:g}"


def _look(built: Built, example: Example, blocks: Sequence[str] | None) -> Inspection:
    try:
        anatomy = find_anatomy(built.model, *example.args, blocks=blocks, **example.kwargs)
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("blocks:"):
            raise UsageError(str(error), "a pattern such as layer1.* names modules") from error
        raise UsageError(
            f"{built.name} does not run on {example.describe()}: {error_words(error, 300)}",
            "--input-shape, or --arg",
        ) from error
    counts = [sum(p.numel() for p in members) for members in anatomy.parameters]
    found, none = anatomy.blocks, list[Block]()
    residual, units = (none, found) if anatomy.is_chosen else (found, none)
    return Inspection(built=built, example=example, blocks=residual, units=units, parameters=counts)
