"""What every reader of images returns: plain arrays and what is known about them."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

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
        flip: Whether a mirrored image is still of its class (a mirrored digit is not).
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
    flip: bool
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
