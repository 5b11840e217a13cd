"""The benchmarks behind the performance page count what they say they count."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from test_docs import generate

ROOT = Path(__file__).resolve().parent.parent


def _module(name):
    spec = importlib.util.spec_from_file_location(
        f"bench_{name}", ROOT / "benchmarks" / f"{name}.py"
    )
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


steps, storage = _module("steps"), _module("storage_forms")


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
