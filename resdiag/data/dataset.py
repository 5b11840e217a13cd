"""`--data`: what a reader returns, and the images of a run as tensors."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resdiag.data.registry import choose_auto, find_dataset

SIDE = 32
"""Height and width of every image in pixels: the networks are those of CIFAR."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A labelled set of images, read and checked, before it becomes tensors.

    Attributes:
        name: What results call it, e.g. "cifar10".
        train_images: uint8, (N, 3, 32, 32).
        train_labels: int64, (N,), 0 .. len(classes) - 1.
        test_images: uint8, (M, 3, 32, 32).
        test_labels: int64, (M,).
        classes: Names of the classes; a label is an index into it.
        moments: Mean and standard deviation per channel in units of 0..255, or None: measured on
            the training images.
        note: One line for the user: what this is and what was done to it.
    """

    name: str
    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    classes: tuple[str, ...]
    note: str
    moments: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over the bytes of the four arrays, labels as little-endian int64."""
        digest = hashlib.sha256()
        for images, labels in (
            (self.train_images, self.train_labels),
            (self.test_images, self.test_labels),
        ):
            digest.update(np.ascontiguousarray(images).data)
            digest.update(np.ascontiguousarray(labels, dtype="<i8").data)
        return digest.hexdigest()


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
        spec: The name of a row of `registry.DATASETS`, with `:PATH` where it takes a path; or
            `auto`: CIFAR-10 where it is on disk and the embedded digits elsewhere.
        root: Folder with the downloaded sets; None: $RESDIAG_DATA, ./data, ~/data, in this order.

    Raises:
        UsageError: The name is unknown, or the files are missing, damaged or not of this form.
    """
    if spec == "auto":
        row, note = choose_auto(root)
        data = open_data(row.name, root)
        return replace(data, note=note.format(data.note))
    row, path = find_dataset(spec)
    place = Path(path).expanduser() if row.takes_path else row.find(root)
    if place is None and row.state(root) == "missing":
        raise row.missing(root)
    return to_tensors(row.load(place), flip=row.flip)


def to_tensors(source: Source, *, flip: bool) -> ImageData:
    """The tensors of a set that was read; they share memory with its arrays.

    Args:
        source: What a reader returned.
        flip: Whether a mirrored image is still of its class (a mirrored digit is not).
    """
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
        flip=flip,
        identity={
            "name": source.name,
            "train": len(source.train_images),
            "test": len(source.test_images),
            "classes": len(source.classes),
            "sha256": source.sha256,
        },
        note=source.note,
    )


def measure_moments(images: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and (population) standard deviation of each channel of (N, 3, H, W), units 0..255.

    They come from exact counts of the 256 values, so neither order nor chunking can change them.
    """
    counts = np.zeros((3, 256), dtype=np.int64)
    for start in range(0, len(images), 1024):
        for channel in range(3):
            part = images[start : start + 1024, channel]
            counts[channel] += np.bincount(part.reshape(-1), minlength=256)
    values = np.arange(256)
    total = counts.sum(axis=1)
    mean = counts @ values / total
    variance = (counts * (values - mean[:, None]) ** 2).sum(axis=1) / total
    return mean, np.sqrt(variance)
