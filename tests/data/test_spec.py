import bz2
import gzip
import io
import lzma
import os
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resdiag.data.registry import check_data, known_specs
from resdiag.errors import UsageError

SETS = [spec for spec in known_specs() if ":" not in spec]


def make_tree(root):
    for split in ("train", "test"):
        folder = root / split / "cat"
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(b"x")
    return root


def make_tar(path, pack=lambda data: data):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("train/cat/1.png"), io.BytesIO())
    path.write_bytes(pack(buffer.getvalue()))
    return path


@pytest.mark.parametrize("name", SETS)
def test_names_of_sets_pass(name):
    check_data(name)


def test_a_tree_and_its_archives_pass(tmp_path):
    check_data(f"folder:{make_tree(tmp_path / 'tree')}")
    packers = {"tar": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    for ending, pack in packers.items():
        check_data(f"folder:{make_tar(tmp_path / f'a.{ending}', pack)}")
    check_data(f"parquet:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar11", "did you mean 'cifar10'"),
        ("", "unknown data ''"),
        ("folder", "folder:PATH"),
        ("folder:", "unknown data .folder:.; did you mean .folder:PATH"),
        ("folder:/does/not/exist", "no such file"),
        ("parquet:/does/not/exist", "no such file"),
        ("digits:x", "unknown data"),
        ("folder:" + "x" * 5000, "cannot be read"),
        ("folder:a\0b", "cannot be read|no such file"),
        ("folder:~nobody_of_this_name/x", "cannot be read"),
    ],
)
def test_a_wrong_spec_is_named(spec, message):
    with pytest.raises(UsageError, match=message):
        check_data(spec)


@given(st.text(max_size=40))
def test_any_text_passes_or_is_a_usage_error(text):
    try:
        check_data(text)
    except UsageError:
        assert text not in SETS


def test_missing_and_empty_splits_are_named(tmp_path):
    with pytest.raises(UsageError, match="has no folder train"):
        check_data(f"folder:{tmp_path}")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"x")
    with pytest.raises(UsageError, match="has no folder test"):
        check_data(f"folder:{tmp_path}")
    (tmp_path / "test" / "cat").mkdir(parents=True)
    with pytest.raises(UsageError, match="test holds no file"):
        check_data(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    "content", [b"", b"text" * 400, b"\x1f\x8b", gzip.compress(b"text", mtime=0)]
)
def test_a_file_that_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "a.tar.gz").write_bytes(content)
    with pytest.raises(UsageError, match="neither a folder nor a tar archive"):
        check_data(f"folder:{tmp_path / 'a.tar.gz'}")


def test_a_giant_extended_header_is_not_read(tmp_path):
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 7 << 30
    zeros = b"\0" * (1 << 20)
    path = tmp_path / "bomb.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(64):
            file.write(zeros)
    limit = len(zeros)
    read = gzip.GzipFile.read
    sizes = []

    def spy(self, size=-1):
        sizes.append(size)
        return read(self, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gzip.GzipFile, "read", spy)
        check_data(f"folder:{path}")
    assert max(sizes) < limit
    assert min(sizes) >= 0


def test_an_unreadable_place_is_refused(tmp_path, monkeypatch):
    make_tree(tmp_path / "tree")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="not readable by this user"):
        check_data(f"folder:{tmp_path / 'tree'}")


def test_a_place_behind_a_closed_folder_is_refused(tmp_path, monkeypatch):
    def refuse(self, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.exists", refuse)
    with pytest.raises(UsageError, match="Permission denied"):
        check_data(f"folder:{tmp_path}")
