"""Triton kernels: their numbers in the interpreter, and that they compile for a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resdiag.watch.measure import kernels, moments, reductions

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no Triton for this platform"
)


@needs_triton
def test_the_kernels_compute_what_the_plain_operations_do():
    script = Path(__file__).parents[1] / "helpers" / "fused_rehearsal.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "the same\n", done.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", "fp64"])
@pytest.mark.parametrize(("tall", "wide"), [(1024, 1), (64, 16)])
def test_the_reading_kernel_compiles_for_an_h200(dtype, tall, wide):
    """By Triton's own assembler: no GPU is needed for that."""
    numbers = ("rows", "channels", "inner", "by_sample", "by_channel", "by_position")
    types = {"x": f"*{dtype}", "parts": "*fp64", **dict.fromkeys(numbers, "i32")}
    assert compiled("read", types, {"TALL": tall, "WIDE": wide, "STEPS": 8})


@needs_triton
@pytest.mark.parametrize("is_norm", [False, True])
def test_the_finishing_kernel_compiles_for_an_h200_and_counts_in_float64(is_norm):
    numbers = ("count", "channels", "rows", "samples")
    types = {"parts": "*fp64", "out": "*fp64", **dict.fromkeys(numbers, "i32")}
    made = compiled("finish", types, {"WIDE": 16, "IS_NORM": is_norm})
    assert ".f32" not in made.asm["ptx"]


def compiled(name, types, constants):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from resdiag.watch.measure import triton_kernels

    types = {**types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(getattr(triton_kernels, name), types, constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert len(made.asm["cubin"]) > 1000
    return made


def test_nothing_on_a_cpu_is_read_by_them_whatever_was_chosen(monkeypatch):
    monkeypatch.setenv(kernels.CHOICE, "triton")
    assert not kernels.serves(torch.ones(4, 4))


@needs_triton
def test_on_a_gpu_they_compute_what_the_plain_operations_do(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(32, 16, 32, 32, device="cuda").contiguous(memory_format=layout)
        plain = moments.statistics(x), *reductions.gradient(x)
        monkeypatch.setattr(kernels, "serves", lambda x: x.is_cuda)
        quick = moments.statistics(x), *reductions.gradient(x)
        monkeypatch.undo()
        for found, expected in zip(quick, plain, strict=True):
            torch.testing.assert_close(
                found, torch.as_tensor(expected).to(found), rtol=1e-9, atol=1e-12
            )
