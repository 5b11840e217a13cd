"""The benchmarks behind the performance page count what they say they count."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from pages import generate, tables

ROOT = Path(__file__).resolve().parents[2]


def _module(name):
    spec = importlib.util.spec_from_file_location(
        f"bench_{name}", ROOT / "benchmarks" / f"{name}.py"
    )
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


steps, storage, slices = _module("steps"), _module("storage_forms"), _module("slices")


def test_operations_and_traffic_are_those_of_a_product_and_a_sum():
    a, b, c = torch.ones(8, 4), torch.ones(4, 16), torch.ones(8, 16)
    flops, moved = steps.counted(lambda: torch.mm(a, b).view(16, 8).view(8, 16) + c)
    assert flops == 2 * 8 * 4 * 16
    product, total = 8 * 4 + 4 * 16 + 8 * 16, 3 * 8 * 16  # each operand and result once
    assert moved == 4 * (product + total)  # the two views move nothing


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mkldnn_convolution", "convolution, forward"),
        ("aten::convolution_backward", "convolution, backward"),
        ("aten::native_batch_norm_backward", "batch norm, backward"),
        ("autograd::engine::evaluate_function: ConvolutionBackward0", steps.REST),
        ("aten::sum", steps.REST),
    ],
)
def test_an_operation_is_of_its_kind(name, kind):
    assert steps.kind_of(name) == kind


def test_every_form_keeps_the_bytes_that_it_is_charged_for(tmp_path):
    raw = storage.row("raw", 4, storage.raw)
    assert raw["bytes_per_value"] == 4
    packed = storage.row("parquet", 512, storage.parquet)
    assert 1 < packed["bytes_per_value"] < 4
    assert packed["us_per_step"] > 0


def test_the_page_shows_what_was_measured():
    results = json.loads((ROOT / "benchmarks/results/performance.json").read_text("utf-8"))
    page = generate.performance_page()
    for row in results["storage"]["result"]:
        assert f"| {row['form']} |" in page


def test_tools_on_the_deep_network_have_a_row_with_version_and_quartiles():
    deep = {"ratio": [1.01, 1.0251, 1.04], "n": 5, "network": ["original", 110, 128, 2]}
    timed = {"label": "a tool", "version": "1.2", "records": "means", "deep": deep}
    control = {"label": "no tool", "records": "", "deep": {**deep, "ratio": [0.99, 1, 1.01]}}
    answers = {"date": "2026-01-02", "tools": [control, timed, {"label": "not timed"}]}
    make = tables._deep_peers_table
    table = make(answers)
    assert "| a tool 1.2 | means | 1.025 [1.010 1.040] | 5 |" in table
    assert "| no tool | nothing: a second network | 1.000 [0.990 1.010] | 5 |" in table
    assert "original-110, batch 128, 2 threads" in table
    assert "not timed" not in table
    assert "Not measured yet" in make({"tools": [{"label": "b"}]})


def test_errors_of_slices_stand_in_per_cent_by_samples_and_metric():
    rows = [
        {"samples": k, "metric": metric, "median": error, "q95": 3 * error}
        for k, error in ((16, 0.02), (4, 0.04))
        for metric in ("output_mean", "grad_output")
    ]
    lines = tables._slices_table({"rows": rows}).splitlines()
    assert lines[0] == "| samples | `output_mean` | `grad_output` |"
    assert lines[2:4] == ["| 4 | 4.0 (12.0) | 4.0 (12.0) |", "| 16 | 2.0 (6.0) | 2.0 (6.0) |"]


def test_the_error_of_a_slice_is_the_distance_from_the_whole_batch():
    torch.manual_seed(0)
    model = slices.build_model("elu", 8, width=0.25, seed=0)
    images, labels = torch.randn(64, 3, 8, 8), torch.randint(0, 10, (64,))
    errors = slices.errors_of(model, images, labels)
    assert {samples for samples, _ in errors} == set(slices.COUNTS)
    assert all(value == pytest.approx(0, abs=1e-5) for value in errors[64, "output_channel_std"])
    few, many = (max(errors[samples, "grad_output"]) for samples in (4, 64))
    assert few > 0.01 > 1e-4 > many


def test_backends_have_a_row_each():
    speed = {"ratio": 1.5, "q25": 1.4, "q75": 1.6}
    row = {
        "variant": "elu", "depth": 20, "batch_size": 128, "name": "fast", "n": 7,
        "images_per_s": 700.4, "clock": speed, "cpu": {**speed, "ratio": 1.45},
    }  # fmt: skip
    assert (
        "| elu-20 | 128 | `fast` | 700 | 1.50 [1.40 1.60] | 1.45 | 7 |"
        in tables._backends_table([row])
    )
