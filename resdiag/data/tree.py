"""`--data folder:PATH`: a tree `train/<class>/*`, `test/<class>/*`, or a tar archive of one."""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from resdiag.data.cache import cached
from resdiag.data.dataset import Source
from resdiag.data.pictures import MAX_BYTES, MAX_COUNT, SUFFIXES, Decoded, Picture, decode_all
from resdiag.data.places import TREE, open_archive
from resdiag.errors import UsageError

_SPLITS = ("train", "test")
_ARCHIVE_SUFFIXES = {".tar", ".gz", ".tgz", ".xz", ".txz", ".bz2", ".tbz2"}


def read_tree(path: Path) -> Source:
    """Images of a folder or of a tar archive, which is read without being extracted.

    Grey images get three equal channels; other sizes are resized to 32x32 (bilinear, the aspect is
    not kept). The order is by split, class and file name, independent of the order on disk.

    Args:
        path: The folder, or the archive: .tar, .tar.gz, .tar.xz, .tar.bz2, possibly with one
            leading folder. Links, devices, absolute names and names with `..` in it are ignored.

    Raises:
        UsageError: There is no such tree, the classes of train and test differ, there are fewer
            than two, or files cannot be read.
    """
    if path.is_dir():
        files = sorted(_list_files(path))
        pictures = [Picture(_split_name(file.relative_to(path))[1], file) for file in files]
        return cached(path, files, lambda: _build(path, decode_all(pictures, path, len(files))))
    if not path.is_file():
        raise UsageError(f"{path}: no such folder or archive", hint=TREE)
    return cached(path, [path], lambda: _build(path, _decode_archive(path)))


def _list_files(root: Path) -> Iterator[Path]:
    """Image files of the tree; links in a folder are the user's own and are followed."""
    for split in _SPLITS:
        if not (root / split).is_dir():
            raise UsageError(f"{root}: has no folder {split}", hint=TREE)
        for kind in (folder for folder in (root / split).iterdir() if folder.is_dir()):
            for folder, _, names in os.walk(kind):
                files = (Path(folder, name) for name in names)
                yield from (file for file in files if _is_image(file.name) and file.is_file())


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def _split_name(name: Path | PurePosixPath) -> tuple[str, tuple[str, str, str]]:
    """(leading folder, (split, class, file)) of a name in the tree.

    >>> _split_name(PurePosixPath("cifar/train/cat/0001.jpg"))
    ('cifar', ('train', 'cat', '0001.jpg'))
    """
    parts = name.parts
    start = 0 if parts[0] in _SPLITS else 1
    if len(parts) < start + 3 or parts[start] not in _SPLITS:
        raise ValueError(f"{name} is not in a tree of classes")
    return "/".join(parts[:start]), (parts[start], parts[start + 1], "/".join(parts[start + 2 :]))


def _decode_archive(path: Path) -> Decoded:
    with open_archive(path) as file, tarfile.open(fileobj=_Bounded(file, path)) as archive:
        return decode_all(_read_members(archive, path), path)


class _Bounded(io.RawIOBase):
    """A file that refuses giant reads: tarfile takes a member's extended header in one piece."""

    def __init__(self, file: io.BufferedIOBase, path: Path) -> None:
        self._file, self._path = file, path

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_BYTES + tarfile.BLOCKSIZE:
            raise UsageError(f"{self._path}: a header in it claims {size:,} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


def _read_members(archive: tarfile.TarFile, path: Path) -> Iterator[Picture]:
    """The images among the members, one after the other; nothing is written anywhere."""
    top = None
    for count, member in enumerate(archive):
        if member.size > MAX_BYTES or count > 2 * MAX_COUNT:
            limits = f"{MAX_BYTES:,} bytes a file and {2 * MAX_COUNT:,} files"
            raise UsageError(f"{path}: {member.name!r} exceeds the limits of {limits}")
        name = PurePosixPath(member.name)
        if not member.isreg() or name.is_absolute() or ".." in name.parts:
            continue
        if not _is_image(name.name) or not (content := archive.extractfile(member)):
            continue
        try:
            lead, key = _split_name(name)
        except ValueError:
            continue
        if top not in (None, lead):
            raise UsageError(f"{path}: holds two trees, {top or '.'} and {lead or '.'}")
        top = lead
        yield Picture(key, content.read())


def _build(path: Path, decoded: Decoded) -> Source:
    keys = sorted(decoded.images)
    classes = _check_classes(path, {(str(split), str(kind)) for split, kind, _ in keys})
    parts = {}
    for split in _SPLITS:
        own = [key for key in keys if key[0] == split]
        labels = [classes.index(str(key[1])) for key in own]
        parts[split] = _stack(decoded, own), np.asarray(labels, dtype=np.int64)
    train, test = parts["train"], parts["test"]
    name = _name(path)
    resized = f"; {decoded.resized:,} resized to 32x32" if decoded.resized else ""
    return Source(
        name=name,
        train_images=train[0],
        train_labels=train[1],
        test_images=test[0],
        test_labels=test[1],
        classes=tuple(classes),
        note=f"{name}: {len(train[0]):,} + {len(test[0]):,} images from {path}{resized}",
    )


def _stack(decoded: Decoded, keys: list[tuple[str | int, ...]]) -> NDArray[np.uint8]:
    return np.stack([decoded.images[key] for key in keys])


def _check_classes(path: Path, found: set[tuple[str, str]]) -> list[str]:
    """The classes, sorted, if there are two or more and train and test have the same."""
    by_split = {split: {kind for own, kind in found if own == split} for split in _SPLITS}
    for split, classes in by_split.items():
        if not classes:
            raise UsageError(f"{path}: no images in {split}/<class>/", hint=TREE)
    only = by_split["train"] ^ by_split["test"]
    if only:
        odd = sorted(only)[0]
        where = "train" if odd in by_split["train"] else "test"
        raise UsageError(f"{path}: class '{odd}' has images in {where} only", hint=TREE)
    if len(by_split["train"]) < 2:
        raise UsageError(f"{path}: only one class, '{by_split['train'].pop()}'", hint=TREE)
    return sorted(by_split["train"])


def _name(path: Path) -> str:
    """Folder name, or archive name without its suffixes.

    >>> _name(Path("data/cifar10-jpeg.tar.gz"))
    'cifar10-jpeg'
    """
    name = PurePosixPath(path.resolve().name)
    while name.suffix.lower() in _ARCHIVE_SUFFIXES:
        name = name.with_suffix("")
    return str(name)
