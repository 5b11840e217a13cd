"""`--data parquet:PATH`: CIFAR in the Parquet files of the Hugging Face hub."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from resdiag.data.cache import cached
from resdiag.data.dataset import Source
from resdiag.data.pictures import MAX_COUNT, Picture, decode_all
from resdiag.errors import UsageError

_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "fine_label", "labels")
_LAYOUT = "expected train-*.parquet and test-*.parquet with the columns img and label"


def read_parquet(path: Path) -> Source:
    """Images and labels from Parquet files of the layout of `uoft-cs/cifar10` and `.../cifar100`.

    The image column (img or image) holds encoded files, as bytes or as a struct with a field
    `bytes`; the label column (label, fine_label or labels) holds integers. Other image sizes are
    resized to 32x32.

    Args:
        path: The folder with the files, or its parent.

    Raises:
        UsageError: Files or columns are missing, damaged or of another type.
    """
    files = {split: _find_files(path, split) for split in ("train", "test")}
    return cached(path, [*files["train"], *files["test"]], lambda: _build(path, files))


def _find_files(path: Path, split: str) -> list[Path]:
    """Of the folder, or of its only subfolder that has such files."""
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder", hint=_LAYOUT)
    found = sorted(path.glob(f"{split}-*.parquet")) or sorted(path.glob(f"*/{split}-*.parquet"))
    if not found:
        raise UsageError(f"{path}: no {split}-*.parquet", hint=_LAYOUT)
    if len({file.parent for file in found}) > 1:
        raise UsageError(f"{path}: {split}-*.parquet in several folders; name one of them")
    return found


def _build(path: Path, files: dict[str, list[Path]]) -> Source:
    train, train_resized = _read_files(path, files["train"])
    test, test_resized = _read_files(path, files["test"])
    count = int(max(train[1].max(), test[1].max())) + 1
    if count > MAX_COUNT or min(train[1].min(), test[1].min()) < 0:
        raise UsageError(f"{path}: labels are not 0 .. number of classes - 1")
    resized = train_resized + test_resized
    name = path.resolve().name
    return Source(
        name=name,
        train_images=train[0],
        train_labels=train[1],
        test_images=test[0],
        test_labels=test[1],
        classes=_class_names(files["train"][0], count),
        note=f"{name}: {len(train[0]):,} + {len(test[0]):,} images from Parquet files in {path}"
        + (f"; {resized:,} resized to 32x32" if resized else ""),
    )


def _read_files(
    path: Path, files: list[Path]
) -> tuple[tuple[NDArray[np.uint8], NDArray[np.int64]], int]:
    """Images and labels in the order of the files' rows, and how many images were resized."""
    labels: list[int] = []
    try:
        decoded = decode_all(_read_rows(files, labels), path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path}: not a readable Parquet file: {reason}", hint=_LAYOUT) from error
    if not labels:
        raise UsageError(f"{path}: {files[0].name} has no rows")
    images = np.stack(list(decoded.images.values()))
    return (images, np.asarray(labels, dtype=np.int64)), decoded.resized


def _read_rows(files: list[Path], labels: list[int]) -> Iterator[Picture]:
    """The images one by one; their labels are appended to `labels` on the way."""
    for file in files:
        with pq.ParquetFile(file) as parquet:
            image, label = _find_columns(file, parquet.schema_arrow)
            for rows in parquet.iter_batches(batch_size=512, columns=[image, label]):
                contents = rows.column(image)
                if pa.types.is_struct(contents.type):
                    contents = contents.field("bytes")
                if contents.null_count or rows.column(label).null_count:
                    raise UsageError(f"{file}: a row has no image bytes or no label")
                for content, number in zip(contents, rows.column(label).to_pylist(), strict=True):
                    labels.append(number)
                    yield Picture((file.name, f"image {len(labels)}"), content.as_py())


def _find_columns(file: Path, schema: pa.Schema) -> tuple[str, str]:
    """Names of the image and the label column, if both are there and of the right type."""
    image = next((name for name in _IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in _LABEL_COLUMNS if name in schema.names), None)
    if image is None or label is None:
        raise UsageError(f"{file}: has columns {', '.join(schema.names)}", hint=_LAYOUT)
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UsageError(f"{file}: column {image} is {kind}, not the bytes of image files")
    if not pa.types.is_integer(schema.field(label).type):
        raise UsageError(f"{file}: column {label} is {schema.field(label).type}, not integer")
    return image, label


def _class_names(file: Path, count: int) -> tuple[str, ...]:
    """The names the hub writes into the schema; numbers where they are not there."""
    schema = pq.read_schema(file)
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = features[_find_columns(file, schema)[1]]["names"]
    except (KeyError, TypeError, ValueError):
        names = []
    if not isinstance(names, list) or len(names) < count:
        return tuple(map(str, range(count)))
    return tuple(map(str, names))
