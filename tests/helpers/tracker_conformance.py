"""What every tracker must do: inherit `TrackerConformance` in a test class and set its attributes.

class TestMyTracker(TrackerConformance):
    kind = MY_KIND

    def read(self, place, name):
        return {(tag, step): value, ...}
"""

import math

import numpy as np
import pytest
from tiny_training import run_tiny_cell

from resdiag.errors import UsageError
from resdiag.trackers.export import export_tracker
from resdiag.trackers.feed import open_feed
from resdiag.trackers.tags import SHOWN
from resdiag.trackers.tracker import TRACKERS, RunInfo, TrackerKind, parse_tracker


def record_run(root):
    """A finished run with gaps, made by the command's own way."""
    return run_tiny_cell(root, steps=6, record_first=3, every=2).run


def expected(run, shown=SHOWN):
    """What a tracker must hold, straight from the frames: {(tag, step): value}."""
    values = {}
    for row in run.metrics().itertuples():
        for name in shown:
            values[f"{name}/block_{row.block:03d}", row.step] = float(getattr(row, name))
    for row in run.curve().to_dict("records"):
        values |= {(name, row["step"]): v for name, v in row.items() if name != "step"}
    return values


def assert_run_was_told(found, run, shown=SHOWN, rel=1e-6, largest=math.inf):
    """Every number that is one, and nothing that is not in the run."""
    wanted = expected(run, shown)
    assert set(found) <= set(wanted)
    for key, value in wanted.items():
        if not math.isnan(value):
            limited = max(-largest, min(largest, value))
            assert found[key] == pytest.approx(limited, rel=rel), key
        elif key in found:
            assert math.isnan(found[key])
    assert sum(not math.isnan(v) for v in wanted.values()) > 50


def columns(frame):
    return {name: frame[name].to_numpy() for name in frame}


class TrackerConformance:
    """Tests of one row of the table of trackers.

    Attributes:
        kind: The row.
        largest: What it stores in place of infinity, if it cannot store that.
    """

    kind: TrackerKind
    largest = math.inf

    def place(self, folder):
        """What stands behind the colon of `--tracker`, in a new folder."""
        return str(folder / "live")

    def export_place(self, folder):
        """What `export --to` takes."""
        return str(folder / "exported")

    def read(self, place, name):
        """What a place holds of the run `name`: {(tag, step): value}."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory):
        return record_run(tmp_path_factory.mktemp("runs"))

    @pytest.fixture(autouse=True)
    def _registered(self):
        with TRACKERS.added(self.kind):
            yield

    def tell(self, place, metrics, curve, name="told"):
        feed = open_feed([f"{self.kind.name}:{place}"], RunInfo(name=name, config={"a": 1}))
        feed.write(metrics, curve)
        feed.close("done")
        return feed.notes

    def test_its_name_is_known_and_its_place_is_asked_for(self, tmp_path):
        kind, place = parse_tracker(f"{self.kind.name}:{self.place(tmp_path)}")
        assert (kind, place) == (TRACKERS[self.kind.name], self.place(tmp_path))
        with pytest.raises(UsageError, match=f"{self.kind.name}:{self.kind.place}$"):
            parse_tracker(self.kind.name)

    def test_nothing_is_written_before_the_start(self, tmp_path):
        before = sorted(tmp_path.rglob("*"))
        self.kind.open(self.place(tmp_path))
        assert sorted(tmp_path.rglob("*")) == before

    def test_a_run_that_is_told_is_there_as_recorded(self, run, tmp_path):
        place = self.place(tmp_path)
        assert self.tell(place, columns(run.metrics()), columns(run.curve())) == []
        assert_run_was_told(self.read(place, "told"), run, largest=self.largest)

    def test_infinities_and_gaps_arrive(self, tmp_path):
        place, inf = self.place(tmp_path), math.inf
        curve = {"step": np.arange(3), "loss": np.array([1.0, inf, math.nan])}
        assert self.tell(place, {}, curve) == []
        found = self.read(place, "told")
        assert found["loss", 0] == 1
        assert found["loss", 1] >= min(self.largest, 1e308)
        assert ("loss", 2) not in found

    def test_an_exported_run_is_there_as_recorded(self, run, tmp_path):
        place = self.export_place(tmp_path)
        assert export_tracker(run, self.kind.name, place)
        assert_run_was_told(self.read(place, run.path.name), run, largest=self.largest)
