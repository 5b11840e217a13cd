"""The numbers of the heat map: those of the run, what is not finite marked, a bounded size."""

import json
import math
from dataclasses import replace

import numpy as np
import synthetic_runs

from resdiag.report.heatmap import CHOSEN, LOST, make_heat_map, to_json


def test_the_numbers_are_those_of_the_run_with_four_digits():
    run = synthetic_runs.make_run("elu", 20)
    found = make_heat_map(run, "elu-20")
    frame = run.metrics(CHOSEN)
    assert list(found.steps) == sorted(set(frame["step"]))
    assert list(found.blocks) == [row["name"] for row in run.blocks]
    assert {metric["id"] for metric in found.metrics} >= {"grad_output", "output_second_moment"}
    for metric in found.metrics:
        table = frame.pivot(index="block", columns="step", values=metric["id"])
        shown = np.array(metric["values"], dtype=float)  # a gap becomes NaN
        np.testing.assert_allclose(shown, table, rtol=6e-4)


def test_what_is_not_finite_is_marked_and_what_was_not_recorded_is_a_gap():
    run = synthetic_runs.make_run("elu_pre", 56, explode=4)
    frame = run.metrics_frame.copy()
    frame.loc[(frame["step"] == 0) & (frame["block"] == 2), "update_ratio"] = math.nan
    found = make_heat_map(replace(run, metrics_frame=frame), "x")
    values = {metric["id"]: metric["values"] for metric in found.metrics}
    step = list(found.steps).index(4)
    assert values["grad_output"][0][step] == LOST
    assert all(value != LOST for row in values["grad_output"] for value in row[:step])
    assert values["update_ratio"][2][0] is None
    assert values["update_ratio"][3][0] is not None


def test_colours_are_logarithmic_where_nothing_is_negative_and_values_span_a_decade():
    found = make_heat_map(synthetic_runs.make_run("elu_pre", 56), "x")
    logs = {metric["id"]: metric["log"] for metric in found.metrics}
    assert logs["output_second_moment"]
    assert not logs["output_mean"]  # signed
    assert not logs["skip_gain"]  # 1 everywhere


def test_a_long_run_is_thinned_and_keeps_the_step_in_which_it_broke():
    run = synthetic_runs.make_run("elu_pre", 56, explode=4)
    whole = make_heat_map(run, "x")
    small = make_heat_map(run, "x", most=len(whole.metrics) * len(whole.blocks) * 2)
    assert small.every > 1
    assert len(small.steps) < len(whole.steps)
    assert {whole.steps[0], 4, whole.steps[-1]} <= set(small.steps)


def test_a_run_without_records_has_none_and_json_is_strict():
    assert make_heat_map(synthetic_runs.make_run("elu", 20, steps=[]), "x") is None
    run = synthetic_runs.make_run("elu_pre", 56, explode=4)
    text = to_json([make_heat_map(run, "</script><b>&")])
    assert not set("<>&") & set(text)
    (found,) = json.loads(text, parse_constant=lambda word: 1 / 0)
    assert found["name"] == "</script><b>&"
    assert len(text) < 150_000
