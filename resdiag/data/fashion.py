"""Fashion-MNIST: 70,000 photographs of clothes, from Debian's package or torchvision's download."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resdiag.data.places import data_roots, find_folder
from resdiag.data.source import SIDE, Source
from resdiag.errors import UsageError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist installs the files."""

_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_MAX_BYTES = 2**30  # of one file when unpacked


def read_fashion(root: Path | None = None) -> Source:
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017), 28x28 padded with black to 3x32x32.

    Searched in `FashionMNIST/raw` of `root` or of the places of `data_roots`, then where Debian's
    package puts it.

    Raises:
        UsageError: It is on none of these places, or a file is damaged.
    """
    folder = find_folder(["FashionMNIST/raw"], root) or DEBIAN
    if not folder.is_dir():
        places = ", ".join(str(place) for place in [*data_roots(root), DEBIAN])
        raise UsageError(
            f"fashion is not on disk; searched {places}",
            hint="`resdiag data get fashion` or `apt-get install dataset-fashion-mnist`",
        )
    train, test = _read_split(folder, "train"), _read_split(folder, "t10k")
    return Source(
        name="fashion",
        train_images=train[0],
        train_labels=train[1],
        test_images=test[0],
        test_labels=test[1],
        classes=_CLASSES,
        flip=True,
        note=f"fashion: {len(train[0]):,} + {len(test[0]):,} images from {folder}, "
        "28x28 padded to 32x32",
    )


def _read_split(folder: Path, name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images, labels = (
        _read_idx(folder / f"{name}-{part}-ubyte", axes)
        for part, axes in (("images-idx3", 3), ("labels-idx1", 1))
    )
    border = SIDE - images.shape[1]
    wrong = images.shape[1] != images.shape[2] or border < 0 or border % 2
    if wrong or len(images) != len(labels) or not len(labels) or labels.max() >= len(_CLASSES):
        shapes = f"{images.shape} and {labels.shape}"
        raise UsageError(f"{folder}: {name}: {shapes} are not images with labels 0..9")
    edge = border // 2
    padded = np.pad(images, ((0, 0), (edge, edge), (edge, edge)))
    return np.repeat(padded[:, None], 3, axis=1), labels.astype(np.int64)


def _read_idx(path: Path, axes: int) -> NDArray[np.uint8]:
    """An array of LeCun's IDX format, unpacked or .gz.

    Two zero bytes, the type (8: unsigned byte), the number of axes, their lengths as big-endian
    32-bit integers, then the data.
    """
    packed = path.with_name(path.name + ".gz")
    try:
        with path.open("rb") if path.is_file() else gzip.open(packed) as file:
            content = file.read(_MAX_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}[.gz] cannot be read: {error}") from error
    shape = tuple(int(length) for length in np.frombuffer(content[4 : 4 + 4 * axes], dtype=">u4"))
    data = content[4 + 4 * axes :]
    if content[:4] != bytes([0, 0, 8, axes]) or len(data) != math.prod(shape):
        raise UsageError(f"{path}[.gz] is not a complete IDX file of {axes} axes")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)
