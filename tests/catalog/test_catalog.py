"""The catalogue: complete, consistent with what is recorded, and its formulas right."""

import subprocess
import sys
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from resdiag.catalog.table import METRICS, POINTS, RECORDED, RECORDED_PER_STEP, SITES, derive
from resdiag.models.resnet import build_model
from resdiag.watch.loop.attach import attach
from resdiag.watch.measure import moments, skip_path

DERIVED = [m for m in METRICS.values() if m.derive is not None and m.site != "run"]
DERIVED_PER_STEP = [m for m in METRICS.values() if m.derive is not None and m.site == "run"]


def test_every_entry_is_filled_in_and_named_by_its_key():
    for key, metric in METRICS.items():
        assert metric.id == key
        assert key.isidentifier()
        assert key == key.lower()
        for field in fields(metric):
            if field.name not in ("derive", "over_ranks"):
                assert getattr(metric, field.name), (key, field.name)
        assert metric.site in (*SITES, "block", "run")
        assert not metric.label.endswith(".")
        assert not metric.reading.endswith(".")
    labels = [metric.label for metric in METRICS.values()]
    assert len(set(labels)) == len(labels)


def test_sources_and_formulas_do_not_hide_a_second_meaning():
    formulas = [(m.formula, m.site) for m in METRICS.values()]
    assert len(set(formulas)) == len(formulas)
    with pytest.raises(TypeError):
        METRICS["mine"] = next(iter(METRICS.values()))


def test_the_recorder_s_groups_of_columns_stand_together_in_the_catalogue():
    """Buffers are written in runs of neighbouring columns."""
    for site in SITES:
        start = RECORDED.index(f"{site}_mean")
        expected = tuple(f"{site}_{name}" for name in moments.STATISTICS)
        assert RECORDED[start : start + len(expected)] == expected
    start = RECORDED.index("perturbation")
    assert RECORDED[start : start + len(skip_path.COLUMNS)] == skip_path.COLUMNS
    start = RECORDED.index("saturated_fraction")
    assert RECORDED[start + 1] == "dead_fraction"
    assert set(RECORDED_PER_STEP) <= {*METRICS, "lr"}
    assert POINTS[0] == "local"


def test_a_frame_has_exactly_the_catalogue_s_columns():
    model = build_model("elu", 8, width=0.25, seed=0)
    with attach(model, optimizer=torch.optim.SGD(model.parameters(), 0.1)) as monitor:
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        monitor.step()
    blocks, steps = monitor.to_frame(), monitor.to_frame("step")
    assert list(blocks) == ["step", "block", *RECORDED, *sorted_like(blocks, DERIVED), "point"]
    assert {*steps} == {"step", *RECORDED_PER_STEP, "lr_grad_norm", "point"}
    assert (blocks.point == "local").all()
    assert blocks[list(RECORDED)].dtypes.eq(np.float32).all()
    assert (blocks.step.dtype, blocks.block.dtype) == (np.int32, np.int16)


def sorted_like(frame, entries):
    known = {metric.id for metric in entries}
    assert known <= set(frame)
    return [name for name in frame if name in known]


# -- formulas ---------------------------------------------------------------------------------


def test_derived_moments_are_those_of_the_tensor():
    x = 0.5 + torch.randn(6, 5, 4, 4)
    values = dict(zip(moments.STATISTICS, moments.statistics(x).tolist(), strict=True))
    out = derive({f"sum_{name}": [value] for name, value in values.items()})
    channels = reference.by_channel(x)
    mu, var = channels.mean(1), channels.var(1)
    assert out["sum_second_moment"][0] == pytest.approx((channels**2).mean(), rel=1e-6)
    assert out["sum_channel_mean_sq"][0] == pytest.approx((mu**2).mean(), rel=1e-6)
    assert out["sum_channel_var"][0] == pytest.approx(var.mean(), rel=1e-6)
    assert out["sum_bias"][0] == pytest.approx(np.sqrt((mu**2).mean() / var.mean()), rel=1e-6)


def test_derived_ratios_follow_their_formulas():
    columns = {
        "grad_input": [6.0],
        "grad_output": [3.0],
        "grad_sum": [1.5],
        "shortcut_share": [0.8],
        "input_channel_mean_rms": [3.0],
        "input_channel_std": [4.0],
        "output_channel_mean_rms": [6.0],
        "output_channel_std": [8.0],
    }
    out = derive(columns)
    assert out["grad_growth"] == [4]
    assert out["attenuation"] == [0.5]
    assert out["branch_share"] == pytest.approx([0.2])
    assert out["forward_growth"] == [4]
    assert derive({"lr": [0.1], "grad_norm": [5.0]}, per_step=True)["lr_grad_norm"] == [0.5]


def test_columns_that_are_missing_leave_out_what_needs_them():
    assert derive({}) == {}
    assert set(derive({"grad_sum": [1.0], "grad_output": [2.0]})) == {"attenuation"}
    assert derive({"lr": [1.0]}, per_step=True) == {}
    assert derive({"lr": [1.0], "grad_norm": [1.0]}) == {}


def test_squares_of_finite_columns_stay_finite_and_zeros_raise_nothing():
    huge = np.array([3e38, 0.0, np.nan, np.inf], dtype=np.float32)
    columns = dict.fromkeys(RECORDED, huge)
    with np.errstate(all="raise"):
        out = derive(columns)
    assert out["sum_second_moment"][0] == pytest.approx(2 * 9e76, rel=1e-6)
    assert np.isnan(out["grad_growth"][1])
    assert all(np.isnan(values[2]) for values in out.values())
    assert all(values.dtype == np.float64 for values in out.values())


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5), st.floats(1e-3, 1e3))
def test_ratios_do_not_depend_on_the_unit_of_the_gradient(values, unit):
    columns = {
        "grad_input": np.array(values),
        "grad_output": np.array(values[::-1]),
        "grad_sum": np.array(values) * 2,
    }
    one, two = derive(columns), derive({k: v * unit for k, v in columns.items()})
    for name in ("grad_growth", "attenuation"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-9)


def test_series_and_lists_and_arrays_are_the_same_to_derive():
    columns = {"grad_sum": [1.0, 2.0], "grad_output": [4.0, 4.0]}
    wanted = [0.25, 0.5]
    for kind in (list, np.array, pd.Series):
        got = derive({name: kind(values) for name, values in columns.items()})
        assert got["attenuation"].tolist() == wanted


def test_the_catalogue_costs_neither_torch_nor_pandas():
    code = (
        "import sys; import resdiag.catalog.table; "
        "print([m for m in ('torch', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# -- the physics behind one of them ----------------------------------------------------------


def test_the_head_kick_is_how_far_one_step_moves_a_mean_logit():
    """B3 on a linear classifier alone: one first step of Nesterov SGD, the mean logits before and
    after, on features that are the same for all samples.
    """
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    features = torch.randn(1, 5).repeat(8, 1)
    labels = torch.randint(3, (8,))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True)
    watched = torch.nn.Sequential(model)
    with attach(watched, optimizer=optimizer) as monitor:
        before = watched(features)
        F.cross_entropy(before, labels).backward()
        optimizer.step()
        with pytest.warns(UserWarning, match="no residual addition"):
            monitor.step()
    moved = (model(features) - before).mean(0).abs().max().item()
    assert monitor.to_frame("step").head_kick[0] == pytest.approx(moved, rel=1e-4)
