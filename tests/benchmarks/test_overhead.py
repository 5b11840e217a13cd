"""The benchmark of the recorder: its arithmetic, and one tiny run of the script."""

import json

import overhead
import pytest
from overhead import STRIDES, plain_seconds, summarise


def test_ratios_are_medians_of_one_repetition_over_the_plain_step_of_the_same():
    steps = {
        "null": [1.0, 2.0, 4.0],
        "naive": [2.0, 2.0, 12.0],  # 2, 1, 3
        "core": [1.5, 3.0, 6.0],
        "full": [11.0, 22.0, 44.0],
        "idle": [1.0, 2.0, 4.0],
    }
    times = {name: list(zip(arm, (1.0, 2.0, 4.0), strict=True)) for name, arm in steps.items()}
    rows = {(row["name"], row["every"]): row for row in summarise(times)}
    assert rows["null", 0]["ratio"] == 1
    assert rows["naive", 1]["ratio"] == 2
    assert rows["core", 1]["ratio"] == 1.5
    for every in STRIDES:  # one recorded step of 11 and the others of 1
        assert rows["full", every]["ratio"] == pytest.approx((11 + every - 1) / every)
    assert all(row["n"] == 3 and row["q25"] <= row["ratio"] <= row["q75"] for row in rows.values())


def test_the_processor_s_time_stands_beside_the_clock_s():
    names = ("null", "naive", "core", "full", "idle")
    clock, busy = ({name: [(1.0, 1.0)] * 3 for name in names} for _ in range(2))
    busy["core"] = [(1.25, 1.0), (1.5, 1.0), (1.0, 1.0)]
    rows = {(row["name"], row["every"]): row for row in summarise(clock, busy)}
    assert (rows["core", 1]["ratio"], rows["core", 1]["cpu"]) == (1.0, 1.25)


def test_a_step_is_compared_with_the_plain_ones_before_and_after_it(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(overhead, "stopwatch", lambda step: (float(next(clock)), 1.0))
    ticks = []
    times, busy = overhead.measure("original", 8, 2, 4, lambda: ticks.append(1))
    assert len(ticks) == 4
    assert set(times) == {"null", "naive", "core", "slice", "full", "idle"}
    for pairs in times.values():
        assert len(pairs) == 4
        assert all(arm == plain for arm, plain in pairs)  # (n - 1 + n + 1) / 2 = n: no drift
    assert plain_seconds(busy) == 1


def test_the_script_prints_its_rows_as_json(capsys):
    words = ["--depth", "8", "--batch-size", "2", "--threads", "1"]
    overhead.main([*words, "--repetitions", "2", "--json"])
    printed = json.loads(capsys.readouterr().out)
    names = {(row["name"], row["every"]) for row in printed["rows"]}
    assert names >= {("null", 0), ("naive", 1), ("core", 1), ("full", 1), ("full", 10)}
    assert all(row["n"] == 2 and row["ratio"] > 0 for row in printed["rows"])
    assert all(row["cpu"] > 0 for row in printed["rows"])
    assert printed["plain_s"] > 0


def test_a_variant_without_residual_blocks_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        overhead.main(["--variant", "plain"])
    assert "'plain' has no residual blocks" in capsys.readouterr().err
