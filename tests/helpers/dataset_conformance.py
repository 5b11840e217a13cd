"""What every data set must do, built in or registered; inherit the class and name the row."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from draws import draws_of

from resdiag.data import registry
from resdiag.data.augment import Augmenter
from resdiag.data.dataset import ImageData, open_data
from resdiag.data.registry import DataSet, check_data, known_sizes, known_specs, list_sets
from resdiag.errors import UsageError


class DataSetConformance:
    """Inherit, set `row`, and write `make`; the row is registered during each test.

    Attributes:
        row: The data set.
        complete: Whether `make` makes the whole set, so that its sizes are those of the row.
    """

    row: ClassVar[DataSet]
    complete: ClassVar[bool] = False

    def make(self, root: Path) -> str:
        """Put the set, or a small copy, below the folder; returns what to write after `--data`."""
        raise NotImplementedError

    def damage(self, root: Path) -> None:
        """Damage a file that `make` wrote; leave it out if there is none."""
        pytest.skip("nothing on disk")

    @pytest.fixture(autouse=True)
    def _alone(self, tmp_path, monkeypatch):
        """The row by itself: no copy on this machine, no cache of it, no network."""
        monkeypatch.setenv("RESDIAG_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("RESDIAG_DATA", str(tmp_path / "data"))
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setattr("socket.socket.connect", None)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "data").mkdir()
        with registry.DATASETS.added(self.row):
            yield

    @pytest.fixture
    def root(self, tmp_path) -> Path:
        return tmp_path / "data"

    @pytest.fixture
    def opened(self, root) -> ImageData:
        return open_data(self.make(root))

    def test_it_is_accepted_and_listed(self, root):
        spec = self.make(root)
        check_data(spec)
        assert self.row.spec in known_specs()
        states = {name: state for name, state, _ in list_sets(root)}
        assert states[self.row.spec] in ("on disk", "built in", "yours")

    def test_its_row_is_for_people(self):
        assert self.row.description
        assert "\n" not in self.row.description
        assert self.row.licence or self.row.takes_path

    def test_images_and_labels_have_the_documented_form(self, opened):
        pairs = [
            (opened.train_images, opened.train_labels), (opened.test_images, opened.test_labels)
        ]  # fmt: skip
        for images, labels in pairs:
            assert images.dtype == torch.uint8
            assert labels.dtype == torch.int64
            assert images.shape == (len(labels), 3, 32, 32)
            assert len(labels) > 0
            assert 0 <= labels.min() <= labels.max() < len(opened.classes)
        assert len(opened.classes) >= 2
        assert torch.isfinite(opened.mean).all()
        assert (opened.std > 0).all()
        assert opened.note
        assert "\n" not in opened.note

    def test_what_the_row_knows_before_reading_is_right(self, opened):
        row = self.row
        assert opened.flip == row.flip
        assert not row.classes or len(opened.classes) == row.classes
        assert known_sizes(row.name) == ((row.train, row.test) if row.train else None)
        if self.complete:
            assert (len(opened.train_labels), len(opened.test_labels)) == (row.train, row.test)

    def test_reading_it_again_gives_the_same_data(self, root, opened):
        again = open_data(self.make(root) if not self.row.folders else self.row.name)
        assert again.identity == opened.identity
        assert again.classes == opened.classes
        assert torch.equal(again.train_images, opened.train_images)

    def test_it_is_mirrored_in_training_only_if_its_row_says_so(self, opened):
        batches = Augmenter(opened, 8, seed=0, augment=True)
        draws = [draws_of(opened, 8, seed=0, step=step) for step in range(20)]
        assert any(drawn[2].any() for drawn in draws) == self.row.flip
        images, labels = batches.batch(0)
        assert images.shape == (len(labels), 3, 32, 32)
        assert torch.isfinite(images).all()

    def test_if_it_is_absent_one_line_says_where_and_how_to_get_it(self, root):
        row = self.row
        if row.state(root) == "built in":
            pytest.skip("embedded")
        spec = f"{row.name}:{root / 'absent'}" if row.takes_path else row.name
        with pytest.raises(UsageError) as caught:
            open_data(spec, root)
        assert "\n" not in caught.value.message
        assert str(root) in caught.value.message
        if row.download:
            assert f"resdiag data get {row.name}" in caught.value.hint

    def test_a_damaged_file_is_refused_in_one_line(self, root):
        spec = self.make(root)
        self.damage(root)
        with pytest.raises(UsageError) as caught:
            open_data(spec)
        assert "\n" not in caught.value.message
        assert caught.value.exit_code == 2
