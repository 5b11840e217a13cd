"""`--data`: the images of a run as tensors, from a name or a path."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from resdiag.data.digits import read_digits
from resdiag.data.source import Source, measure_moments
from resdiag.errors import UsageError, unknown

Reader = Callable[[Path | None], Source]

_READERS = {
    "cifar10": ("resdiag.data.cifar", "read_cifar10"),
    "cifar100": ("resdiag.data.cifar", "read_cifar100"),
    "digits": ("resdiag.data.digits", "read_digits"),
    "fashion": ("resdiag.data.fashion", "read_fashion"),
}
_PATH_READERS = {
    "folder": ("resdiag.data.tree", "read_tree"),
    "parquet": ("resdiag.data.parquet", "read_parquet"),
}
SPECS = ("auto", *_READERS, *(f"{kind}:PATH" for kind in _PATH_READERS))
"""What `--data` accepts."""


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Labelled images, training and test, on the CPU.

    Attributes:
        name: What results call it: "digits", "cifar10", "cifar10-jpeg", ...
        train_images: uint8, (N, 3, 32, 32).
        train_labels: int64, (N,).
        test_images: uint8, (M, 3, 32, 32).
        test_labels: int64, (M,).
        classes: Names of the classes; a label is an index into it.
        mean: Mean of each channel, float32 (3,), in units of 0..1: fb.resnet.torch's constants for
            CIFAR, measured on the training images otherwise.
        std: Standard deviation of each channel, likewise.
        flip: Whether mirroring keeps an image in its class.
        identity: Name, sizes and the SHA-256 of the arrays; equal where the data are equal.
        note: One line for the user: what was taken and what was done to it.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: list[str]
    mean: Tensor
    std: Tensor
    flip: bool
    identity: dict[str, str | int]
    note: str


def open_data(spec: str, root: Path | None = None) -> ImageData:
    """Read the data set that `spec` names.

    Args:
        spec: auto, cifar10, cifar100, digits, fashion, folder:PATH or parquet:PATH. `auto` is
            CIFAR-10 where it is on disk and the embedded digits elsewhere.
        root: Folder with the downloaded sets; None: $RESDIAG_DATA, ./data, ~/data, in this order.

    Raises:
        UsageError: The name is unknown, or the files are missing, damaged or not of this form.
    """
    return to_tensors(_find_reader(spec)(root))


def to_tensors(source: Source) -> ImageData:
    """The tensors of a set that was read; they share memory with its arrays."""
    mean, std = source.moments or measure_moments(source.train_images)
    return ImageData(
        name=source.name,
        train_images=torch.from_numpy(source.train_images),
        train_labels=torch.from_numpy(source.train_labels),
        test_images=torch.from_numpy(source.test_images),
        test_labels=torch.from_numpy(source.test_labels),
        classes=list(source.classes),
        mean=torch.tensor([value / 255 for value in mean], dtype=torch.float32),
        # a channel without any contrast must become zeros, not 0/0
        std=torch.tensor([max(value, 1.0) / 255 for value in std], dtype=torch.float32),
        flip=source.flip,
        identity={
            "name": source.name,
            "train": len(source.train_images),
            "test": len(source.test_images),
            "classes": len(source.classes),
            "sha256": source.sha256,
        },
        note=source.note,
    )


def _find_reader(spec: str) -> Reader:
    kind, colon, path = spec.partition(":")
    if spec == "auto":
        return _read_auto
    if colon and kind in _PATH_READERS:
        if not path:
            raise UsageError(f"data '{spec}' names no path", hint=f"write {kind}:PATH")
        return lambda root: _load(_PATH_READERS[kind])(Path(path).expanduser())
    if spec in _READERS:
        return _load(_READERS[spec])
    raise unknown("data", spec, SPECS)


def _load(home: tuple[str, str]) -> Callable[..., Source]:
    """Import a reader when it is needed: torchvision and pyarrow take a second each."""
    module, name = home
    reader: Callable[..., Source] = getattr(importlib.import_module(module), name)
    return reader


def _read_auto(root: Path | None) -> Source:
    from resdiag.data.cifar import has_cifar10, read_cifar10

    if has_cifar10(root):
        source = read_cifar10(root)
        return replace(source, note=f"auto: {source.note}; `--data digits` is the small set")
    source = read_digits()
    hint = "no CIFAR-10 on disk (`resdiag data get cifar10` downloads it)"
    return replace(source, note=f"auto: {hint}, taking {source.note}")
