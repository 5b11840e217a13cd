"""Reading long runs: only what a plot needs, and without PyTorch."""

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from made_runs import (
    make_blocks,
    make_checkpoint,
    make_config,
    make_curve,
    make_metrics,
    open_writer,
)
from matplotlib.figure import Figure
from synthetic_runs import make_run

from resdiag.catalog.table import RECORDED, inputs_of
from resdiag.plots.grouping import _read_for, open_view
from resdiag.plots.heat import draw_heat
from resdiag.plots.kinds import KINDS
from resdiag.plots.style import look
from resdiag.plots.view import Record

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = 54


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """64,000 steps of depth 110, every 50th recorded, 640 rows of which explode at the end."""
    config = make_config(variant="original", depth=110, steps=64_000, every=50)
    with open_writer(tmp_path_factory.mktemp("long"), config) as writer:
        writer.describe(make_blocks(BLOCKS), [], "local")
        metrics = make_metrics(0, 1280, BLOCKS)
        metrics["step"] = metrics["step"] * 50
        writer.commit(64_000, metrics, make_curve(0, 64_000), *make_checkpoint(64_000))
        writer.finish("done", None)
    return writer.folder


@pytest.mark.parametrize("kind", ["gradnorms", "curves"])
def test_a_plot_of_a_long_run_reads_its_own_columns_only_and_does_not_import_torch(
    long_run, tmp_path, kind
):
    words = ["plot", kind, str(long_run), "--out", str(tmp_path / "figure")]
    code = (
        "import json, sys; from resdiag.cli.main import app; from resdiag.runs import segments\n"
        "whole, read = segments.decode, {}\n"
        "def decode(table, parts, names=None):\n"
        "    rows = whole(table, parts, names)\n"
        "    read[table] = [rows.column_names, read.get(table, [0, 0])[1] + 1]\n"
        "    return rows\n"
        "segments.decode = decode\n"
        "code = app.run(sys.argv[1:]); print(json.dumps([code, 'torch' in sys.modules, read]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    code, has_torch, read = json.loads(done.stdout.splitlines()[-1])
    assert (code, has_torch) == (0, False)
    assert all(times == 1 for _, times in read.values())
    columns, _ = read.get("metrics", ([], 0))
    needed = {"step", "block", *chain.from_iterable(map(inputs_of, _read_for(KINDS[kind])))}
    assert set(columns) <= needed
    assert len(columns) < len(RECORDED) / 2
    assert 10_000 < (tmp_path / "figure.svg").stat().st_size < 3_000_000


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("variants", [("elu",), ("elu", "original")], ids=["one", "two"])
def test_a_plot_looks_at_no_column_that_was_not_read_for_it(kind, variants, monkeypatch):
    asked = set()
    spread = Record._spread
    monkeypatch.setattr(
        Record, "_spread", lambda self, name: (asked.add(name), spread(self, name))[1]
    )
    runs = [make_run(variant, depth=20, steps=(0, 1, 2, 40)) for variant in variants]
    known = set(runs[0].metrics().columns)
    view = open_view(KINDS[kind], runs, step=None, theory=True)
    with look():
        KINDS[kind].draw(view)
    assert asked & known <= _read_for(KINDS[kind])
    assert KINDS[kind].axis != "block" or asked & known


def test_rows_in_any_order_make_the_same_grid():
    run = make_run("elu", depth=20, steps=(0, 1, 2, 40))
    frame = run.metrics()
    ordered = Record(run, frame, run.curve())
    mixed = Record(run, frame.sample(frac=1, random_state=0), run.curve())
    gap = Record(run, frame.drop(index=[3]), run.curve())
    for record in (ordered, mixed, gap):
        np.testing.assert_array_equal(record.steps, [0, 1, 2, 40])
    np.testing.assert_array_equal(mixed.grid("grad_output"), ordered.grid("grad_output"))
    assert np.isnan(gap.grid("grad_output")[3, 0])
    np.testing.assert_array_equal(gap.grid("grad_output")[4:], ordered.grid("grad_output")[4:])


def test_of_many_steps_a_map_draws_some_and_every_broken_cell():
    most = 700
    count = 3 * most + 1
    run = make_run("elu", depth=20, steps=(0,))
    frame = run.metrics()
    blocks = len(frame)
    many = frame.loc[frame.index.repeat(count)].sort_values("block", kind="stable")
    many["step"] = np.tile(np.arange(count, dtype=np.int32), blocks)
    record = Record(run, many, run.curve())
    values = np.ones((blocks, count))
    broken = np.zeros(values.shape, dtype=bool)
    values[4, 1001], broken[4, 1001] = np.nan, True  # its column is not one of those drawn
    axes = Figure().subplots()
    draw_heat(axes, record, values, broken, "x")
    shown = axes.collections[-1].get_array().reshape(blocks, -1)
    assert shown.shape[1] <= most
    assert np.argwhere(shown.mask).tolist() == [[4, 1001 // 4]]
    assert "one in 4 drawn" in axes.get_xlabel()
    label = int(axes.get_xticklabels()[3].get_text())
    assert label == 4 * int(axes.get_xticks()[3] - 0.5)
