"""What a study is said to cost: counted by hand for cells whose cost can be counted."""

from dataclasses import replace

import pytest
from studyfiles import write_study

from resdiag.study.estimate import estimate
from resdiag.study.ledger import read_ledger
from resdiag.study.live import describe
from resdiag.study.study import load_study

START = 0.6  # seconds to start and end a cell of depth 20; three quarters of it per 18 layers more

ONE = """
question = "q"
[fixed]
data = "digits"
recipe = "short"
steps = 30
batch_size = 20
record_first = 30
[grid]
variant = ["elu"]
depth = [20]
"""


def read(root, text):
    study = load_study(str(write_study(root, text)))
    return study, read_ledger(study, root / "runs")


def test_the_time_of_a_cell_is_its_images_at_the_speed_of_a_core(tmp_path):
    study, entries = read(tmp_path, ONE)
    left = estimate(study.cells, entries)
    tested = 360 / 3  # a pass over the test images, of which a forward pass is a third of a step
    assert left.seconds == pytest.approx((30 * 20 + tested) / 300 + START)
    assert "one core" in left.basis


def test_depth_counts_linearly_and_width_squared(tmp_path):
    def work(change):
        study, entries = read(tmp_path, ONE.replace("[grid]", change + "\n[grid]"))
        return estimate(study.cells, entries).seconds - START

    plain = work("")
    assert work("width = 2.0") == pytest.approx(4 * plain)
    study, entries = read(tmp_path, ONE.replace("[20]", "[20, 38]"))
    assert estimate(study.cells, entries).seconds == pytest.approx(3 * plain + 2.5 * START)


def test_what_is_done_costs_nothing_and_measured_speed_counts(tmp_path):
    study, entries = read(tmp_path, ONE.replace("[20]", "[20, 38]"))
    fast = replace(entries[0], state="done", progress={"images_per_s": 1000.0})
    left = estimate(study.cells, [fast, entries[1]])
    assert left.seconds == pytest.approx((30 * 20 + 120) * 2 / 1000 + 1.5 * START)
    assert left.basis == "measured on 1 cells of this study"
    ended = [replace(entry, state="done") for entry in entries]
    assert estimate(study.cells, ended).seconds == 0.0


def test_cells_with_data_of_unknown_size_are_said_not_to_be_counted(tmp_path):
    study, entries = read(tmp_path, ONE.replace("digits", "folder:somewhere"))
    left = estimate(study.cells, entries)
    assert (left.seconds, left.bytes, left.unknown) == (None, None, 1)
    assert describe(left) == "unknown: 1 cells with data whose size is not known here"
