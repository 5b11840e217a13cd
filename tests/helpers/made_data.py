"""Small data sets in the published formats, written to disk."""

import gzip
import hashlib
import io
import json
import pickle  # noqa: TID251  the published CIFAR archives are pickles
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def noise(count: int, seed: int = 0) -> np.ndarray:
    """Images (count, 32, 32, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def png(image: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


TREE = {
    f"{split}/{kind}/{number}.png": noise(1, seed=10 * row + number)[0]
    for row, (split, kind) in enumerate(
        (split, kind) for split in ("train", "test") for kind in ("cat", "dog")
    )
    for number in range(3)
}


def write_tree(root: Path) -> Path:
    for name, image in TREE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(image))
    return root


def write_tar(path: Path, lead: str = "", mode: str = "w:gz", extra=()) -> Path:
    with tarfile.open(path, mode) as archive:
        for member, content in extra:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, image in reversed(TREE.items()):
            member = tarfile.TarInfo(lead + name)
            content = png(image)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_binary10(root: Path) -> Path:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
    for number, name in enumerate(names):
        images = noise(4, seed=number).transpose(0, 3, 1, 2).reshape(4, -1)
        labels = np.arange(4, dtype=np.uint8)[:, None] + number
        (folder / name).write_bytes(np.concatenate([labels, images], axis=1).tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CLASSES10) + "\n\n")
    return folder


CLASSES10 = [
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
]  # fmt: skip


def write_pickled10(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same images as `write_binary10` in torchvision's layout, with its MD5 list patched."""
    from torchvision.datasets import CIFAR10

    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def dump(name: str, content: dict) -> list[str]:
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return [name, hashlib.md5(raw).hexdigest()]

    def batch(number: int) -> dict:
        images = noise(4, seed=number).transpose(0, 3, 1, 2).reshape(4, -1)
        return {"data": images, "labels": [number + row for row in range(4)]}

    train = [dump(f"data_batch_{number}", batch(number - 1)) for number in range(1, 6)]
    test = [dump("test_batch", batch(5))]
    name, md5 = dump("batches.meta", {"label_names": CLASSES10})
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", test)
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return folder


def write_parquet(folder: Path, *, image="img", label="label", plain=False, names=True) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    for split, seeds in (("train", (0, 1)), ("test", (2,))):
        for part, seed in enumerate(seeds):
            contents = [png(picture) for picture in noise(4, seed)]
            rows = contents if plain else [{"bytes": raw, "path": None} for raw in contents]
            table = pa.table({image: rows, label: pa.array([0, 1, 2, 1])})
            if names:
                features = {label: {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}}
                info = json.dumps({"info": {"features": features}})
                table = table.replace_schema_metadata({"huggingface": info})
            pq.write_table(table, folder / f"{split}-0000{part}-of-0000{len(seeds)}.parquet")
    return folder


def idx(array: np.ndarray) -> bytes:
    lengths = b"".join(length.to_bytes(4, "big") for length in array.shape)
    return bytes([0, 0, 8, array.ndim]) + lengths + array.tobytes()


def write_fashion(folder: Path, packed: bool) -> Path:
    folder.mkdir(parents=True)
    for name, count in (("train", 5), ("t10k", 3)):
        images = noise(count)[:, :28, :28, 0]
        labels = np.arange(count, dtype=np.uint8)
        for part, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(np.ascontiguousarray(array))
            path = folder / f"{name}-{part}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return folder
