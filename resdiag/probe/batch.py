"""The batch of a probe: generated, images with their labels, or a text as tokens."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resdiag.errors import UsageError
from resdiag.models.example import Example, example_batch
from resdiag.models.source import Built

TEXT = "text:"
"""What begins a `--data` that names a text."""


def open_batch(
    built: Built, data: str, root: Path | None, size: int, shape: Sequence[int] | None, seed: int
) -> tuple[Example, Tensor | None, str]:
    """Inputs, labels if there are any, and the name of where they come from.

    Args:
        built: The model.
        data: "" for a generated batch, "text:FILE", or images as `resdiag run --data`.
        root: Folder of downloaded data sets.
        size: Samples.
        shape: Shape of one sample instead of the model's own.
        seed: Which samples are taken.

    Raises:
        UsageError: The data cannot be had or are not what the model takes.
    """
    if not data:
        return example_batch(built, batch_size=size, shape=shape, seed=seed), None, "generated"
    form = example_batch(built, batch_size=size, shape=shape)
    if data.startswith(TEXT):
        return _tokens(built, form, Path(data.removeprefix(TEXT)), size, seed), None, data
    return _images(built, form, data, root, size, seed)


def check_text(data: str) -> None:
    """Refuse a "text:FILE" whose file is missing or empty.

    Raises:
        UsageError: It is.
    """
    path = Path(data.removeprefix(TEXT))
    if not path.is_file():
        raise UsageError(f"no such file: {path}", "--data text:FILE takes any file, as bytes")
    if not path.stat().st_size:
        raise UsageError(f"{path} is empty")


def _images(
    built: Built, form: Example, data: str, root: Path | None, size: int, seed: int
) -> tuple[Example, Tensor, str]:
    from resdiag.data.augment import Augmenter
    from resdiag.data.dataset import open_data

    wanted = next(iter(form.tensors.values()))
    if wanted.dim() != 4 or wanted.shape[1] != 3 or len(form.tensors) != 1:
        takes_tokens = not any(x.is_floating_point() for x in form.tensors.values())
        hint = "--data text:FILE gives tokens" if takes_tokens else "leave --data out"
        raise UsageError(f"--data gives images; {built.name} takes {form.describe()}", hint)
    found = open_data(data, root)
    images, labels = Augmenter(found, size, seed, augment=False).batch(0)
    if images.shape[2:] != wanted.shape[2:]:
        images = F.interpolate(images, tuple(wanted.shape[2:]), mode="bilinear", antialias=True)
    key = next(iter(form.kwargs), "")
    if key:
        return Example(kwargs={key: images}), labels, found.name
    return Example(args=(images,), kwargs={}), labels, found.name


def _tokens(built: Built, form: Example, path: Path, size: int, seed: int) -> Example:
    """Windows of a file's bytes, modulo the vocabulary, where the model takes token ids."""
    count = _vocabulary(built.model)
    inputs = form.tensors
    if count is None or any(x.is_floating_point() or x.dim() != 2 for x in inputs.values()):
        hint = "images, e.g. --data digits, or no --data"
        raise UsageError(f"--data text: gives tokens; {built.name} takes {form.describe()}", hint)
    length = max(x.shape[1] for x in inputs.values())
    data = path.read_bytes()
    if len(data) < length:
        raise UsageError(
            f"{path} has {len(data)} bytes, a sample takes {length}",
            f"a longer file, or --input-shape {len(data)}",
        )
    ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long() % count
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - length + 1, (size,), generator=generator)
    windows = ids[starts[:, None] + torch.arange(length)]

    def put(value: object) -> object:
        return windows[:, : value.shape[1]] if isinstance(value, Tensor) else value

    return replace(
        form,
        args=tuple(map(put, form.args)),
        kwargs={key: put(value) for key, value in form.kwargs.items()},
        tokens=f"the bytes of {path.name}",
    )


def _vocabulary(model: nn.Module) -> int | None:
    """How many token ids a model knows: as its configuration says, or its first embedding."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    known = getattr(config, "vocab_size", None)
    if isinstance(known, int):
        return known
    first = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    return None if first is None else first.num_embeddings
