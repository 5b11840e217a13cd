"""CIFAR-10 and CIFAR-100 as published: the binary version, or the one torchvision downloads."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resdiag.data.places import data_roots, find_folder
from resdiag.data.source import SIDE, Source
from resdiag.errors import UsageError

Moments = tuple[tuple[float, float, float], tuple[float, float, float]]
Labelled = tuple[NDArray[np.uint8], NDArray[np.int64]]


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
    pickled: str
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
    pickled="cifar-10-batches-py",
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
    pickled="cifar-100-python",
    torchvision="CIFAR100",
    moments=((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
)


def read_cifar10(root: Path | None = None) -> Source:
    """CIFAR-10 from `root`, or from the places of `data_roots`; see `open_data`."""
    return _read(_CIFAR10, root)


def read_cifar100(root: Path | None = None) -> Source:
    """CIFAR-100 with its 100 fine labels, found like CIFAR-10."""
    return _read(_CIFAR100, root)


def has_cifar10(root: Path | None = None) -> bool:
    """Whether a folder of CIFAR-10 is on disk (it may still be damaged)."""
    return find_folder([_CIFAR10.binary, _CIFAR10.pickled], root) is not None


def _read(layout: _Layout, root: Path | None) -> Source:
    """The binary version is preferred: reading it un-pickles nothing."""
    folder = find_folder([layout.binary, layout.pickled], root)
    if folder is None:
        raise _missing(layout, root)
    read = _read_binary if folder.name == layout.binary else _read_pickled
    train, test, classes = read(layout, folder)
    return Source(
        name=layout.name,
        train_images=train[0],
        train_labels=train[1],
        test_images=test[0],
        test_labels=test[1],
        classes=classes,
        flip=True,
        moments=layout.moments,
        note=f"{layout.name}: {len(train[0]):,} + {len(test[0]):,} images from {folder}",
    )


def _missing(layout: _Layout, root: Path | None) -> UsageError:
    places = ", ".join(str(place) for place in data_roots(root))
    return UsageError(
        f"{layout.name} is not on disk; searched {places}",
        hint=f"`resdiag data get {layout.name}` downloads it, or put the folder {layout.binary} "
        f"or {layout.pickled} there (--data-root, $RESDIAG_DATA)",
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
    """Through torchvision, which checks every file's published MD5 before it un-pickles."""
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
