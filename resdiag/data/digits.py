"""The embedded data set: 1,797 handwritten digits, so that everything runs without a download."""

from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resdiag.data.source import SIDE, Source

_LEVELS = 16  # the 8x8 images count the dark pixels of 4x4 tiles: 0 .. 16


def read_digits(root: Path | None = None) -> Source:
    """The UCI digits, enlarged to 3x32x32 and split.

    The split is fixed: the images are sorted by class (keeping their order within a class) and
    every fifth one, beginning with the first, is a test image. This gives 360 test and 1,437
    training images with every class in proportion. `root` is not needed: the file is embedded.

    Source: Alpaydin & Kaynak 1998, CC BY 4.0; see digits.LICENSE.md.
    """
    with (
        resources.files("resdiag.data").joinpath("digits.npz").open("rb") as file,
        np.load(file, allow_pickle=False) as arrays,
    ):
        images, labels = enlarge(arrays["images"]), arrays["labels"].astype(np.int64)
    by_class = np.argsort(labels, kind="stable")
    test = np.zeros(len(labels), dtype=bool)
    test[by_class[::5]] = True
    return Source(
        name="digits",
        train_images=images[~test],
        train_labels=labels[~test],
        test_images=images[test],
        test_labels=labels[test],
        classes=tuple("0123456789"),
        flip=False,
        note="digits: the embedded 1,797 handwritten digits (UCI), scaled from 8x8 to 32x32",
    )


def enlarge(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bilinear (N, 8, 8) of 0..16 to (N, 3, 32, 32) of 0..255, three equal channels.

    All weights are multiples of 1/8, so the arithmetic is exact and the same on every machine.
    """
    weights = _interpolation(images.shape[-1], SIDE)
    large = weights @ images.astype(np.float64) @ weights.T
    grey = np.floor(large * 255 / _LEVELS + 0.5).astype(np.uint8)
    return np.repeat(grey[:, None], 3, axis=1)


def _interpolation(old: int, new: int) -> NDArray[np.float64]:
    """The (new, old) matrix of linear interpolation between pixel centres, edges repeated."""
    position = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    weights: NDArray[np.float64] = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(old)))
    return weights
