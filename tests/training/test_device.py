"""What is said of the device before a training."""

import pytest
import torch

from resdiag.training.device import warn_of_dtype


@pytest.mark.parametrize(
    ("capability", "device", "dtype", "warned"),
    [
        ("AVX2", "cpu", "bfloat16", True),
        ("DEFAULT", "cpu", "bfloat16", True),
        ("AVX512", "cpu", "bfloat16", False),
        ("AVX2", "cpu", "float32", False),
        ("AVX2", "cuda", "bfloat16", False),
    ],
)
def test_bfloat16_without_avx512_is_said_to_be_slow(monkeypatch, capability, device, dtype, warned):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    words = warn_of_dtype(device, dtype)
    assert bool(words) == warned
    assert not warned or (capability in words and "--dtype float32" in words)


def test_a_run_says_it_before_the_first_step(monkeypatch, tmp_path, call_run):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    err = call_run("--dtype", "bfloat16")
    assert "note: bfloat16 is slower than float32 on this CPU (AVX2" in err


@pytest.fixture
def call_run(tmp_path, capsys):
    from resdiag.cli.main import app

    def call(*words: str) -> str:
        first = ["run", "--variant", "d", "--depth", "8", "--data", "digits", "--steps", "1"]
        size = ["--width", "0.25", "--batch-size", "2", "--runs", str(tmp_path)]
        assert app.run([*first, *size, *words]) == 0
        return capsys.readouterr().err

    return call
