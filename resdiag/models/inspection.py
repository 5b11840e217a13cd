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
from resdiag.watch.find.blocks import Block, find_anatomy

_RESERVED = 0.7  # share of the free memory that a model's weights may take


@dataclass(frozen=True, kw_only=True, eq=False)
class Inspection:
    """What `resdiag inspect` found.

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

    def to_dict(self) -> dict[str, Any]:
        """The document of `resdiag inspect --json`."""
        pairs = zip([*self.blocks, *self.units], self.parameters, strict=True)
        rows = [{**block.to_dict(), "parameters": count} for block, count in pairs]
        blocks, units = rows[: len(self.blocks)], rows[len(self.blocks) :]
        return {"model": self.built.name, "blocks": blocks, "units": units}


def inspect_model(
    name: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    shape: Sequence[int] | None = None,
    batch_size: int = 1,
    blocks: Sequence[str] | None = None,
) -> Inspection:
    """Find the blocks of the model that a string names.

    A library's model is built on the meta device, where weights take neither memory nor time; one
    that cannot run there, and a factory of the user's, is built for real.

    Args:
        name: See `resdiag.models.source`.
        arguments: Of its factory or configuration.
        shape: Shape of one sample, instead of the generated one.
        batch_size: Samples.
        blocks: Patterns of modules to take as the blocks instead of found additions.

    Raises:
        UsageError: The model is unknown, cannot be built, does not run on the batch, or does not
            fit into memory; one line.

    >>> [block.shortcut for block in inspect_model("torchvision:resnet18").blocks[:3]]
    ['identity', 'identity', 'projection']
    """

    def look(built: Built) -> Inspection:
        example = example_batch(built, batch_size=batch_size, shape=shape)
        return _look(built, example, blocks)

    if name.partition(":")[0] not in LIBRARIES:
        return look(build_source(name, arguments))
    try:
        built = build_source(name, arguments, meta=True)
    except ResdiagError:  # unknown, or a factory that reads numbers out of its tensors
        return look(build_source(name, arguments))
    try:
        return look(built)
    except ResdiagError:  # so does its forward, or it fails on every device
        check_memory(built, copies=1)
        return look(build_source(name, arguments))


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
