"""Every reader on small generated files of the published formats; hostile and damaged ones too."""

import gzip
import io
import os
import pickle  # noqa: TID251  the published CIFAR archives are pickles
import re
import socket
import tarfile
import urllib.request
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_data import (
    CLASSES10,
    TREE,
    noise,
    png,
    write_binary10,
    write_fashion,
    write_parquet,
    write_pickled10,
    write_tar,
    write_tree,
)  # fmt: skip
from PIL import Image

from resdiag.data import download, pictures, registry
from resdiag.data.builtin import enlarge
from resdiag.data.dataset import ImageData, measure_moments, open_data
from resdiag.data.tree import read_tree
from resdiag.errors import ResdiagError, StorageError, UsageError

IMAGES = Path(__file__).parents[3] / "shared/data/cifar10-jpeg.tar.gz"


@pytest.fixture(autouse=True)
def _private_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("RESDIAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RESDIAG_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fashion = replace(registry.DATASETS["fashion"], elsewhere=tmp_path / "debian")
    monkeypatch.setitem(registry.DATASETS._rows, "fashion", fashion)
    monkeypatch.chdir(tmp_path)


def check_tree(data: ImageData) -> None:
    expected = np.stack([TREE[name] for name in sorted(TREE) if name.startswith("train")])
    assert np.array_equal(data.train_images.numpy().transpose(0, 2, 3, 1), expected)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_images.shape == (6, 3, 32, 32)
    assert data.classes == ["cat", "dog"]


# --- digits, auto, names -----------------------------------------------------------------------


def test_digits_have_the_documented_sizes_and_split():
    data = open_data("digits")
    assert data.train_images.shape == (1437, 3, 32, 32)
    assert data.test_images.shape == (360, 3, 32, 32)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.dtype == torch.int64
    assert data.classes == list("0123456789")
    train, test = torch.bincount(data.train_labels), torch.bincount(data.test_labels)
    assert (test - (train + test) / 5).abs().max() < 1
    assert data.train_images.amax() == 255
    assert torch.equal(data.train_images[:, 0], data.train_images[:, 2])
    assert not data.flip
    assert "\n" not in data.note


def test_digits_are_the_same_bytes_everywhere():
    """Golden: results name this hash; the arithmetic of the enlargement is exact."""
    sha = "ebbfa726d26f9d5207c1374cd8c98b03c45ae13a2093d82ff8d06ad7f8886a4a"
    assert open_data("digits").identity == {
        "name": "digits", "train": 1437, "test": 360, "classes": 10, "sha256": sha,
    }  # fmt: skip


def test_enlarging_is_bilinear_interpolation():
    small = np.random.default_rng(0).integers(0, 17, (5, 8, 8), dtype=np.uint8)
    grey = torch.from_numpy(small).double()[:, None] * 255 / 16
    large = torch.nn.functional.interpolate(grey, size=(32, 32), mode="bilinear")
    assert np.abs(enlarge(small)[:, :1] - large.numpy()).max() <= 0.5 + 1e-9


def test_auto_takes_digits_where_cifar10_is_absent_and_says_how_to_get_it():
    data = open_data("auto")
    assert data.name == "digits"
    assert "resdiag data get cifar10" in data.note
    assert "\n" not in data.note


def test_auto_takes_cifar10_where_it_is(tmp_path):
    write_binary10(tmp_path / "data")
    data = open_data("auto")
    assert data.name == "cifar10"
    assert data.note.startswith("auto: cifar10")
    assert "digits" in data.note


def test_an_unknown_name_gets_its_nearest_match():
    with pytest.raises(UsageError, match="unknown data 'cifar1'; did you mean 'cifar10'"):
        open_data("cifar1")
    with pytest.raises(UsageError, match="unknown data 'folder:'; did you mean 'folder:PATH'"):
        open_data("folder:")


def test_measured_moments_are_those_of_numpy():
    images = noise(1500).transpose(0, 3, 1, 2)
    mean, std = measure_moments(images)
    assert np.allclose(mean, images.mean(axis=(0, 2, 3), dtype=np.float64), rtol=1e-12)
    assert np.allclose(std, images.std(axis=(0, 2, 3), dtype=np.float64), rtol=1e-12)


def test_a_constant_channel_is_not_divided_by_zero(tmp_path):
    for name in TREE:
        path = tmp_path / "flat" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(np.full((32, 32, 3), 7, dtype=np.uint8)))
    data = open_data(f"folder:{tmp_path / 'flat'}")
    assert data.std.gt(0).all()


# --- CIFAR -------------------------------------------------------------------------------------


def test_the_binary_and_the_pickled_cifar10_are_the_same_data(tmp_path, monkeypatch):
    write_binary10(tmp_path / "one")
    write_pickled10(tmp_path / "two", monkeypatch)
    binary, pickled = (open_data("cifar10", tmp_path / place) for place in ("one", "two"))
    assert binary.identity == pickled.identity
    assert binary.classes == pickled.classes == CLASSES10
    assert binary.train_images.shape == (20, 3, 32, 32)
    assert np.array_equal(binary.train_images[0].numpy().transpose(1, 2, 0), noise(1, seed=0)[0])
    assert binary.train_labels.tolist()[:5] == [0, 1, 2, 3, 1]


def test_cifar10_is_normalised_by_the_papers_constants(tmp_path):
    write_binary10(tmp_path / "data")
    data = open_data("cifar10")
    assert (data.mean * 255).tolist() == pytest.approx([125.3, 123.0, 113.9])
    assert (data.std * 255).tolist() == pytest.approx([63.0, 62.1, 66.7])


def test_nothing_is_unpickled_unless_its_md5_is_the_published_one(tmp_path, monkeypatch):
    folder = write_pickled10(tmp_path / "data", monkeypatch)
    ran = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return Path.touch, (ran,)

    for name in ("data_batch_2", "batches.meta"):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps(Hostile()))
        with pytest.raises(UsageError, match="MD5") as caught:
            open_data("cifar10")
        assert "resdiag data get cifar10" in caught.value.hint
        assert not ran.exists()
        (folder / name).write_bytes(good)
    open_data("cifar10")


def test_the_binary_version_is_preferred(tmp_path):
    write_binary10(tmp_path / "data")
    (tmp_path / "data/cifar-10-batches-py").mkdir()
    assert "batches-bin" in open_data("cifar10").note


def test_cifar100_has_its_fine_labels(tmp_path):
    folder = tmp_path / "data/cifar-100-binary"
    folder.mkdir(parents=True)
    for name in ("train.bin", "test.bin"):
        images = noise(3).transpose(0, 3, 1, 2).reshape(3, -1)
        labels = np.array([[1, 99], [2, 50], [3, 0]], dtype=np.uint8)
        (folder / name).write_bytes(np.concatenate([labels, images], axis=1).tobytes())
    data = open_data("cifar100")
    assert data.train_labels.tolist() == [99, 50, 0]
    assert len(data.classes) == 100
    assert np.array_equal(data.test_images[2].numpy().transpose(1, 2, 0), noise(3)[2])


def test_a_missing_set_says_where_it_looked_and_how_to_get_it(tmp_path):
    for name in ("cifar10", "cifar100", "fashion"):
        with pytest.raises(UsageError, match=f"{name} is not on disk") as caught:
            open_data(name, tmp_path / "nowhere")
        assert f"resdiag data get {name}" in caught.value.hint
        assert str(tmp_path / "nowhere") in caught.value.message


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "label"])
def test_a_damaged_binary_file_is_named(tmp_path, damage):
    path = write_binary10(tmp_path / "data") / "data_batch_3.bin"
    raw = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": raw[:-1], "empty": b"", "label": b"\x0a" + raw[1:]}[damage])
    with pytest.raises(UsageError, match=r"data_batch_3\.bin"):
        open_data("cifar10")


# --- trees and archives ------------------------------------------------------------------------


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    (write_tree(tmp_path / "pets") / "train/cat/README.txt").write_text("not an image")
    (tmp_path / "pets/train/cat/._0.png").write_bytes(b"resource fork")
    data = open_data(f"folder:{tmp_path / 'pets'}")
    check_tree(data)
    assert data.name == "pets"
    assert data.flip


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz", "tar.bz2", "tgz"])
@pytest.mark.parametrize("lead", ["", "./", "pets-1.0/"])
def test_an_archive_is_the_same_data_as_its_folder(tmp_path, suffix, lead):
    folder = open_data(f"folder:{write_tree(tmp_path / 'pets')}")
    mode = {"tar": "w", "tar.xz": "w:xz", "tar.bz2": "w:bz2"}.get(suffix, "w:gz")
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    path = write_tar(tmp_path / f"pets.{suffix}", lead, mode)
    archive = open_data(f"folder:{path}")
    check_tree(archive)
    assert archive.identity == folder.identity
    after = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    assert after - before == {path}


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_hostile_members_are_ignored(tmp_path):
    image = png(noise(1, seed=99)[0])
    extra = [
        (member("/train/cat/absolute.png"), image),
        (member("../train/cat/up.png"), image),
        (member("train/cat/../../../up.png"), image),
        (member("train/cat/link.png", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (member("train/cat/hard.png", tarfile.LNKTYPE, "train/cat/0.png"), b""),
        (member("train/cat/device.png", tarfile.CHRTYPE), b""),
        (member("train/cat/pipe.png", tarfile.FIFOTYPE), b""),
        (member("other/place/x.png"), image),
        (member("x.png"), image),
    ]
    check_tree(open_data(f"folder:{write_tar(tmp_path / 'pets.tar.gz', extra=extra)}"))


def test_a_giant_member_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("resdiag.data.tree.MAX_BYTES", 10_000)
    extra = [(member("train/cat/zeros.png"), bytes(20_000))]
    with pytest.raises(UsageError, match="exceeds the limits"):
        open_data(f"folder:{write_tar(tmp_path / 'pets.tar.gz', extra=extra)}")


def test_a_giant_extended_header_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("resdiag.data.tree.MAX_BYTES", 10_000)
    extra = [(member("pax", tarfile.XHDTYPE), bytes(20_000))]
    with pytest.raises(UsageError, match="claims 20,480 bytes"):
        open_data(f"folder:{write_tar(tmp_path / 'pets.tar.gz', extra=extra)}")


def test_two_trees_in_one_archive_are_refused(tmp_path):
    extra = [(member("second/train/cat/0.png"), png(noise(1)[0]))]
    with pytest.raises(UsageError, match="two trees"):
        open_data(f"folder:{write_tar(tmp_path / 'pets.tar.gz', 'first/', extra=extra)}")


def bomb() -> bytes:
    """A PNG of a few bytes that claims 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    side = (30_000).to_bytes(4, "big")
    head = chunk(b"IHDR", side + side + bytes([8, 0, 0, 0, 0]))
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "content", [b"", b"not an image", png(noise(1)[0])[:-60], bomb(), b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_unreadable_images_are_counted_and_the_first_is_named(tmp_path, content):
    root = write_tree(tmp_path / "pets")
    (root / "train/cat/1.png").write_bytes(content)
    (root / "train/dog/2.png").write_bytes(content)
    with pytest.raises(UsageError, match=r"2 of 12 image files.*train/cat/1\.png") as caught:
        open_data(f"folder:{root}")
    assert "\n" not in caught.value.message


@given(
    content=st.binary(max_size=400), kind=st.sampled_from([b"", b"\xff\xd8\xff", b"GIF89a", b"BM"])
)
@settings(max_examples=60, deadline=None)
def test_any_bytes_give_an_image_or_a_reason(content, kind):
    picture = pictures.Picture(("x",), kind + content)
    shape, reason = (), ""
    try:
        (image,) = pictures.decode_all([picture], Path("here")).images.values()
        shape = image.shape
    except UsageError as error:
        reason = error.message
    told = re.fullmatch(r"here: 1 of 1 image .* the first is x \(.+\)", reason)
    assert told or shape == (3, 32, 32)


@pytest.mark.parametrize("size", [(32, 32), (48, 20), (7, 7)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_any_size_and_mode_becomes_rgb_of_32x32(tmp_path, size, mode):
    white = Image.new("L", size, 255)
    file = io.BytesIO()
    white.convert(mode).save(file, "PNG")
    array, resized = pictures.decode(file.getvalue())
    assert array.shape == (3, 32, 32)
    assert (array == 255).all()
    assert resized == (size != (32, 32))


def test_the_note_says_that_images_were_resized(tmp_path):
    root = write_tree(tmp_path / "pets")
    Image.new("L", (64, 48), 100).save(root / "train/cat/0.png")
    data = open_data(f"folder:{root}")
    assert "1 resized to 32x32" in data.note
    assert (data.train_images[0] == 100).all()


def remove(root: Path, pattern: str) -> None:
    for path in root.glob(pattern):
        path.unlink()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("train/*/*", r"no images in train"),
        ("*/*/*", r"no images in train"),
        ("test/dog/*", r"class 'dog' has images in train only"),
        ("*/dog/*", r"only one class, 'cat'"),
    ],
)
def test_a_tree_without_what_is_needed_is_refused_in_one_line(tmp_path, pattern, message):
    root = write_tree(tmp_path / "pets")
    remove(root, pattern)
    with pytest.raises(UsageError, match=message) as caught:
        open_data(f"folder:{root}")
    assert "\n" not in caught.value.message
    assert "train/<class>" in caught.value.hint


def test_a_path_that_is_no_tree_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar.gz").write_text("hello")
    for name, message in (
        ("absent", "no such folder"),
        ("empty", "no folder train"),
        ("text.tar.gz", "not a complete tar archive"),
    ):
        with pytest.raises(UsageError, match=message):
            read_tree(tmp_path / name)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz"])
def test_a_cut_archive_is_refused(tmp_path, suffix):
    mode = {"tar": "w", "tar.xz": "w:xz"}.get(suffix, "w:gz")
    path = write_tar(tmp_path / f"pets.{suffix}", mode=mode)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UsageError, match=r"pets\.tar"):
        read_tree(path)


# --- the cache ---------------------------------------------------------------------------------


def count_decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = pictures.decode
    monkeypatch.setattr(pictures, "decode", lambda file: (calls.append(1), original(file))[1])
    return calls


def entry(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "cache").iterdir()
    return folder


def test_the_second_reading_decodes_nothing_and_is_equal(tmp_path, monkeypatch):
    calls = count_decodes(monkeypatch)
    path = write_tar(tmp_path / "pets.tar.gz")
    first = open_data(f"folder:{path}")
    assert len(calls) == 12
    second = open_data(f"folder:{path}")
    assert len(calls) == 12
    check_tree(second)
    assert (first.identity, first.note, first.classes) == (
        second.identity, second.note, second.classes,
    )  # fmt: skip
    assert not list(entry(tmp_path).glob("*.tmp"))
    assert (
        second.train_images[0].add_(1) is not None
    )  # writable memory, and private to this process
    check_tree(open_data(f"folder:{path}"))


def test_a_changed_source_is_read_again(tmp_path, monkeypatch):
    calls = count_decodes(monkeypatch)
    root = write_tree(tmp_path / "pets")
    open_data(f"folder:{root}")
    Image.new("RGB", (32, 32)).save(root / "train/cat/1.png")
    data = open_data(f"folder:{root}")
    assert len(calls) == 24
    assert (data.train_images[1] == 0).all()
    os.utime(root / "train/cat/1.png", ns=(1, 1))
    open_data(f"folder:{root}")
    assert len(calls) == 36
    entry(tmp_path)


SPLITS = ("train_images", "train_labels", "test_images", "test_labels")
FILES = [*(f"{name}.npy" for name in SPLITS), "meta.json"]


def test_these_are_the_files_of_the_cache(tmp_path):
    open_data(f"folder:{write_tar(tmp_path / 'pets.tar.gz')}")
    assert {path.name for path in entry(tmp_path).iterdir()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing", "garbage"])
def test_a_damaged_cache_is_rebuilt(tmp_path, monkeypatch, name, damage):
    path = write_tar(tmp_path / "pets.tar.gz")
    open_data(f"folder:{path}")
    calls = count_decodes(monkeypatch)
    file = entry(tmp_path) / name
    raw = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        flipped = raw[:-20] + bytes([raw[-20] ^ 1]) + raw[-19:]
        file.write_bytes(
            {"flip": flipped, "cut": raw[:-9], "empty": b"", "garbage": b"\x80\x04." * 99}[damage]
        )
    check_tree(open_data(f"folder:{path}"))
    assert len(calls) == 12
    check_tree(open_data(f"folder:{path}"))
    assert len(calls) == 12


def test_an_object_array_in_the_cache_is_not_unpickled(tmp_path):
    path = write_tar(tmp_path / "pets.tar.gz")
    open_data(f"folder:{path}")
    ran = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return Path.touch, (ran,)

    hostile = np.array([Hostile()], dtype=object)
    np.save(entry(tmp_path) / "train_images.npy", hostile, allow_pickle=True)
    check_tree(open_data(f"folder:{path}"))
    assert not ran.exists()


def test_an_unwritable_cache_is_only_a_note(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RESDIAG_CACHE", str(tmp_path / "file/below"))
    data = open_data(f"folder:{write_tar(tmp_path / 'pets.tar.gz')}")
    check_tree(data)
    assert "not cached" in data.note


def test_a_full_disk_leaves_no_temporary_file(tmp_path, monkeypatch):
    def full(file, array, allow_pickle):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    data = open_data(f"folder:{write_tar(tmp_path / 'pets.tar.gz')}")
    check_tree(data)
    assert "No space left" in data.note
    assert list(entry(tmp_path).iterdir()) == []


# --- Parquet -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [{}, {"label": "fine_label"}, {"image": "image", "plain": True}, {"names": False}]
)
def test_parquet_files_of_the_hub_are_read_in_the_order_of_their_rows(tmp_path, shape):
    write_parquet(tmp_path / "cifar/plain_text", **shape)
    data = open_data(f"parquet:{tmp_path / 'cifar'}")
    expected = np.concatenate([noise(4, 0), noise(4, 1)]).transpose(0, 3, 1, 2)
    assert np.array_equal(data.train_images.numpy(), expected)
    assert data.train_labels.tolist() == [0, 1, 2, 1] * 2
    assert data.classes == (["cat", "dog", "owl"] if shape.get("names", True) else ["0", "1", "2"])
    assert data.identity == open_data(f"parquet:{tmp_path / 'cifar'}").identity
    assert data.name == "cifar"


def test_parquet_of_another_form_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(UsageError, match="no such folder"):
        open_data("parquet:absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no train-\*\.parquet"):
        open_data("parquet:empty")
    tables = {
        "has columns a": pa.table({"a": [1]}),
        "column img is string": pa.table({"img": ["x"], "label": [0]}),
        "column label is string": pa.table({"img": [b"x"], "label": ["cat"]}),
        "no image bytes": pa.table({"img": pa.array([None], pa.binary()), "label": [0]}),
        "1 of 1 image files cannot be read": pa.table({"img": [b"x"], "label": [0]}),
        "labels are not": pa.table({"img": [png(noise(1)[0])], "label": [-1]}),
        "has no rows": pa.table({"img": pa.array([], pa.binary()), "label": pa.array([], "int64")}),
    }
    for number, (message, table) in enumerate(tables.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        for split in ("train", "test"):
            pq.write_table(table, folder / f"{split}-0.parquet")
        with pytest.raises(UsageError, match=message):
            open_data(f"parquet:{folder}")
    for split in ("train", "test"):
        (tmp_path / f"empty/{split}-0.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UsageError, match="not a readable Parquet file"):
        open_data("parquet:empty")


# --- Fashion-MNIST -----------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "packed"), [("debian", True), ("data/FashionMNIST/raw", False)])
def test_fashion_is_padded_and_has_three_equal_channels(tmp_path, place, packed):
    write_fashion(tmp_path / place, packed)
    data = open_data("fashion")
    assert data.train_images.shape == (5, 3, 32, 32)
    assert data.test_labels.tolist() == [0, 1, 2]
    inner = data.train_images[:, :, 2:30, 2:30].numpy()
    assert all(np.array_equal(inner[:, c], noise(5)[:, :28, :28, 0]) for c in range(3))
    assert data.train_images.sum() == inner.sum(dtype=np.int64)
    assert data.classes[9] == "Ankle boot"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\x08",
        b"\0\0\x08\x03" + b"\xff" * 12,
        gzip.compress(b"abc", mtime=0),
        b"\x1f\x8b\x08cut",
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, content):
    folder = write_fashion(tmp_path / "debian", packed=True)
    packed = content[:2] == b"\x1f\x8b"
    (folder / "train-images-idx3-ubyte.gz").write_bytes(
        content if packed else gzip.compress(content)
    )
    with pytest.raises(UsageError, match="train-images-idx3-ubyte"):
        open_data("fashion")


# --- downloads ---------------------------------------------------------------------------------


def test_a_failed_download_is_one_line_and_names_the_way_out(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    for name in ("cifar10", "cifar100", "fashion"):
        with pytest.raises(ResdiagError, match=f"cannot download {name}: .*not known") as caught:
            download.download(name, tmp_path / "data")
        assert "\n" not in caught.value.message
        assert "--data digits" in caught.value.hint
    assert socket.getdefaulttimeout() is None


def test_downloads_refuse_unknown_names_and_unwritable_folders(tmp_path):
    with pytest.raises(UsageError, match="unknown download 'cifar11'; did you mean 'cifar1"):
        download.download("cifar11")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        download.download("cifar10", tmp_path / "file/below")


def test_what_is_already_there_is_not_downloaded_again(tmp_path, monkeypatch):
    write_pickled10(tmp_path / "data", monkeypatch)
    monkeypatch.setattr(urllib.request, "urlopen", None)
    assert download.download("cifar10") == tmp_path / "data"
    assert open_data("cifar10", tmp_path / "data").name == "cifar10"


# --- the real images ---------------------------------------------------------------------------


@pytest.mark.images
@pytest.mark.skipif(not IMAGES.is_file(), reason=f"the CIFAR-10 JPEG copies are not at {IMAGES}")
def test_the_jpeg_copies_of_cifar10_have_the_moments_of_the_originals():
    data = open_data(f"folder:{IMAGES}")
    assert data.name == "cifar10-jpeg"
    assert data.train_images.shape == (50_000, 3, 32, 32)
    assert torch.bincount(data.test_labels).tolist() == [1000] * 10
    assert data.classes == CLASSES10
    assert (data.mean * 255).tolist() == pytest.approx([125.3, 123.0, 113.9], abs=0.2)
    assert (data.std * 255).tolist() == pytest.approx([63.0, 62.1, 66.7], abs=0.8)
