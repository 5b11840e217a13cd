"""Readers of the built-in sets: the embedded digits, CIFAR and Fashion-MNIST as published."""

import gzip
import math
import zlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resdiag.data.dataset import SIDE, Source
from resdiag.errors import UsageError

Moments = tuple[tuple[float, float, float], tuple[float, float, float]]
Labelled = tuple[NDArray[np.uint8], NDArray[np.int64]]

# -- digits ----------------------------------------------------------------------------------------

_LEVELS = 16  # the 8x8 images count the dark pixels of 4x4 tiles: 0 .. 16


def read_digits(place: None = None) -> Source:
    """The UCI digits, enlarged to 3x32x32 and split.

    The split is fixed: the images are sorted by class (keeping their order within a class) and
    every fifth one, beginning with the first, is a test image. This gives 360 test and 1,437
    training images with every class in proportion. `place` is not needed: the file is embedded.

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


# -- CIFAR -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """One of the two sets on disk; file names are those of the published archives."""

    name: str
    binary: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    class_names: str
    count: int
    label_bytes: int  # the label is the last of them
    torchvision: str
    moments: Moments  # 0..255, facebookarchive/fb.resnet.torch, datasets/cifar10.lua, cifar100.lua


_CIFAR10 = _Layout(
    name="cifar10",
    binary="cifar-10-batches-bin",
    train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    test=("test_batch.bin",),
    class_names="batches.meta.txt",
    count=10,
    label_bytes=1,
    torchvision="CIFAR10",
    moments=((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
)
_CIFAR100 = _Layout(
    name="cifar100",
    binary="cifar-100-binary",
    train=("train.bin",),
    test=("test.bin",),
    class_names="fine_label_names.txt",
    count=100,
    label_bytes=2,
    torchvision="CIFAR100",
    moments=((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
)


def read_cifar10(folder: Path) -> Source:
    """CIFAR-10 from a folder of the binary version, or of the one that torchvision downloads."""
    return _read_cifar(_CIFAR10, folder)


def read_cifar100(folder: Path) -> Source:
    """CIFAR-100 with its 100 fine labels, likewise."""
    return _read_cifar(_CIFAR100, folder)


def _read_cifar(layout: _Layout, folder: Path) -> Source:
    read = _read_binary if folder.name == layout.binary else _read_pickled
    train, test, classes = read(layout, folder)
    return Source(
        name=layout.name,
        train_images=train[0],
        train_labels=train[1],
        test_images=test[0],
        test_labels=test[1],
        classes=classes,
        moments=layout.moments,
        note=f"{layout.name}: {len(train[0]):,} + {len(test[0]):,} images from {folder}",
    )


def _damaged(layout: _Layout, path: Path, reason: str) -> UsageError:
    return UsageError(
        f"{path}: {reason}",
        hint=f"delete the folder and get it again: `resdiag data get {layout.name}`",
    )


def _read_binary(layout: _Layout, folder: Path) -> tuple[Labelled, Labelled, tuple[str, ...]]:
    train = [_read_records(layout, folder / name) for name in layout.train]
    test = [_read_records(layout, folder / name) for name in layout.test]
    return _join(train), _join(test), _read_names(layout, folder / layout.class_names)


def _read_records(layout: _Layout, path: Path) -> Labelled:
    """One file of records: label byte(s), then 3,072 bytes, channel by channel, row by row."""
    try:
        raw = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise _damaged(layout, path, error.strerror or "cannot be read") from error
    size = layout.label_bytes + 3 * SIDE * SIDE
    if not len(raw) or len(raw) % size:
        raise _damaged(layout, path, f"{len(raw):,} bytes are not whole records of {size:,}")
    records = raw.reshape(-1, size)
    labels = records[:, layout.label_bytes - 1].astype(np.int64)
    if labels.max() >= layout.count:
        raise _damaged(layout, path, f"label {labels.max()} of {layout.count} classes")
    return records[:, layout.label_bytes :].reshape(-1, 3, SIDE, SIDE), labels


def _join(parts: list[Labelled]) -> Labelled:
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _read_names(layout: _Layout, path: Path) -> tuple[str, ...]:
    """Class names, one a line; numbers where the file is missing, they are only for people."""
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        names = []
    return tuple(names) if len(names) == layout.count else tuple(map(str, range(layout.count)))


def _read_pickled(layout: _Layout, folder: Path) -> tuple[Labelled, Labelled, tuple[str, ...]]:
    # torchvision un-pickles, but only files with the published MD5. The binary version is preferred
    # (`DataSet.folders`) and has a reader of our own, since torchvision has none.
    from torchvision import datasets

    dataset = getattr(datasets, layout.torchvision)
    try:
        train = dataset(folder.parent, train=True, download=False)
        test = dataset(folder.parent, train=False, download=False)
    except RuntimeError as error:
        reason = "a file is missing or its MD5 is not the published one"
        raise _damaged(layout, folder, reason) from error
    pairs = [
        (_channels_first(part.data), np.asarray(part.targets, dtype=np.int64))
        for part in (train, test)
    ]
    return pairs[0], pairs[1], tuple(train.classes)


def _channels_first(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(N, 32, 32, 3), as torchvision keeps them, to our order of axes."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


# -- Fashion-MNIST ---------------------------------------------------------------------------------

_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_MAX_BYTES = 2**30  # of one file when unpacked


def read_fashion(folder: Path) -> Source:
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017), 28x28 padded with black to 3x32x32.

    Raises:
        UsageError: A file is damaged.
    """
    train, test = _read_split(folder, "train"), _read_split(folder, "t10k")
    return Source(
        name="fashion",
        train_images=train[0],
        train_labels=train[1],
        test_images=test[0],
        test_labels=test[1],
        classes=_CLASSES,
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
    32-bit integers, then the data. torchvision's reader takes neither the packed files of Debian's
    package nor a damaged one without an exception of some kind.
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
