"""Every row of the table of data sets, and rows from outside the package."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dataset_conformance import DataSetConformance
from made_data import noise, write_binary10, write_fashion, write_parquet, write_tar, write_tree

from resdiag.data.registry import (
    DATASETS,
    DataSet,
    choose_auto,
    find_dataset,
    known_sizes,
    known_specs,
    register_dataset,
    unregister_dataset,
)
from resdiag.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]


class TestDigits(DataSetConformance):
    row = DATASETS["digits"]
    complete = True

    def make(self, root: Path) -> str:
        return "digits"


class TestCifar10(DataSetConformance):
    row = DATASETS["cifar10"]

    def make(self, root: Path) -> str:
        write_binary10(root)
        return "cifar10"

    def damage(self, root: Path) -> None:
        (root / "cifar-10-batches-bin/test_batch.bin").write_bytes(b"cut")


class TestCifar100(DataSetConformance):
    row = DATASETS["cifar100"]

    def make(self, root: Path) -> str:
        folder = root / "cifar-100-binary"
        folder.mkdir()
        for name in ("train.bin", "test.bin"):
            images = noise(3).transpose(0, 3, 1, 2).reshape(3, -1)
            labels = np.array([[1, 99], [2, 50], [3, 0]], dtype=np.uint8)
            (folder / name).write_bytes(np.concatenate([labels, images], axis=1).tobytes())
        return "cifar100"

    def damage(self, root: Path) -> None:
        (root / "cifar-100-binary/train.bin").unlink()


class TestFashion(DataSetConformance):
    row = replace(DATASETS["fashion"], elsewhere=None)

    def make(self, root: Path) -> str:
        write_fashion(root / "FashionMNIST/raw", packed=True)
        return "fashion"

    def damage(self, root: Path) -> None:
        (root / "FashionMNIST/raw/t10k-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8b\x08cut")


class TestFolder(DataSetConformance):
    row = DATASETS["folder"]

    def make(self, root: Path) -> str:
        return f"folder:{write_tree(root / 'pets')}"

    def damage(self, root: Path) -> None:
        (root / "pets/train/cat/0.png").write_bytes(b"\x89PNG cut")


class TestArchive(TestFolder):
    def make(self, root: Path) -> str:
        return f"folder:{write_tar(root / 'pets.tar.gz')}"

    def damage(self, root: Path) -> None:
        path = root / "pets.tar.gz"
        path.write_bytes(path.read_bytes()[:-200])


class TestParquet(DataSetConformance):
    row = DATASETS["parquet"]

    def make(self, root: Path) -> str:
        if not (root / "pets").exists():
            write_parquet(root / "pets")
        return f"parquet:{root / 'pets'}"

    def damage(self, root: Path) -> None:
        (root / "pets/test-00000-of-00001.parquet").write_bytes(b"PAR1 cut")


def test_every_built_in_row_is_tried():
    tried = {case.row.name for case in DataSetConformance.__subclasses__()}
    assert set(DATASETS) <= tried


@pytest.fixture
def boxes():
    """A registered set that is always there."""
    row = DataSet(name="boxes", description="boxes", read=lambda place: None, train=7, test=3)
    register_dataset(row)
    yield row
    unregister_dataset("boxes")


def test_a_registered_set_is_known_everywhere(boxes):
    assert "boxes" in known_specs()
    assert find_dataset("boxes") == (boxes, "")
    assert known_sizes("boxes") == (7, 3)
    with pytest.raises(UsageError, match="did you mean 'boxes'"):
        find_dataset("boxs")


@pytest.mark.parametrize("name", ["digits", "boxes", "auto", "text", "", "Boxes", "a b", "a:b"])
def test_a_name_that_is_taken_or_cannot_be_written_is_refused(boxes, name):
    with pytest.raises(ValueError, match="data set '"):
        register_dataset(replace(boxes, name=name))


def test_auto_takes_the_set_of_the_highest_priority_that_is_there(boxes, tmp_path):
    assert choose_auto(tmp_path)[0].name == "digits"
    unregister_dataset("boxes")
    register_dataset(replace(boxes, auto=3))
    assert choose_auto(tmp_path)[0].name == "boxes"


def test_the_page_about_adding_a_data_set_does_what_it_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/howto/extend-dataset.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    try:
        exec(compile("\n".join(blocks), "extend-dataset.md", "exec"), {"__name__": "page"})
    finally:
        unregister_dataset("stripes")
    assert f"```text\n{capsys.readouterr().out}```" in page
    (tmp_path / "test_stripes.py").write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_stripes.py"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "8 passed" in done.stdout
