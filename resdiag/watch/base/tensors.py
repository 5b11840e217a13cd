"""Tensors inside what functions take and return."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor


def tensors_in(values: object) -> Iterator[Tensor]:
    """Tensors inside nested tuples, lists, dicts and dataclass-like outputs, in order."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from tensors_in(value)
    elif is_dataclass(values):
        for field_ in fields(values):
            yield from tensors_in(getattr(values, field_.name))


def first_floating(tensors: Iterable[Tensor]) -> Tensor | None:
    """The first tensor of a floating type, None if there is none."""
    return next((x for x in tensors if x.is_floating_point()), None)
