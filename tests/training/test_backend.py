"""Backends: the same training in other ways, named in the configuration, never by another hash."""

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_training import tiny_config, train, weights

from resdiag.cli.main import app
from resdiag.errors import UsageError
from resdiag.runs.config import RunConfig
from resdiag.training.cpu import FastElu, disable_malloc_trim, elu
from resdiag.training.recipe import Request, resolve

ALL = {"steps": 6, "record_first": 2, "every": 3, "commit_every": 3}


def test_the_default_backend_leaves_name_and_digest_as_they_were():
    config = tiny_config()
    assert config.backend == "eager"
    plain = config.to_dict()
    assert plain["backend"] == "eager"
    del plain["backend"]  # as a run that was written before there were backends
    assert RunConfig.from_dict(plain) == config
    assert config.digest() == "37bd1bbae28da4e19d5db4bdd7e4604f4717b414f1f135124eff2f0cb32740ea"
    assert tiny_config(backend="fast").digest() != config.digest()


@pytest.mark.parametrize(
    ("variant", "device", "backend"),
    [("elu", "cpu", "fast"), ("original", "cpu", "eager"), ("elu", "cuda", "eager")],
)
def test_auto_is_resolved_before_the_run_is_named(variant, device, backend):
    request = Request(variant=variant, depth=20, backend="auto", device=device)
    assert resolve(request, data_name="digits", train_size=100).backend == backend


def test_a_backend_that_is_not_there_is_one_line(capsys):
    assert app.run(["run", "--variant", "elu", "--depth", "20", "--backend", "graf"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "unknown backend 'graf'" in error
    with pytest.raises(UsageError, match="is for the CPU"):
        Request(variant="elu", depth=20, backend="fast", device="cuda").check()


def ulps(found, exact):
    """Largest error in units of the last place of the exact value."""
    spacing = np.spacing(np.abs(exact.numpy()).astype(np.float32)).astype(np.float64)
    return float(np.max(np.abs(found.double().numpy() - exact.numpy()) / spacing))


def test_the_fast_elu_is_accurate_over_the_whole_range():
    x = -torch.logspace(-30, 4, 200_001, dtype=torch.float64).float()
    assert ulps(elu(x), torch.expm1(x.double())) < 4
    assert torch.equal(elu(-x), -x)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    assert elu(special).tolist()[:4] == [0.0, 0.0, torch.inf, -1.0]
    assert torch.isnan(elu(special)[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.0, 0.3, -0.5])
def test_while_it_is_entered_every_elu_is_the_fast_one(dtype, alpha):
    x = torch.linspace(-3, 3, 101).to(dtype).requires_grad_()
    expected = F.elu(x, alpha)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    with FastElu():
        found = F.elu(x, alpha)
        (fast_slope,) = torch.autograd.grad(found.sum(), x)
        assert torch.equal(found, elu(x.detach(), alpha))
        assert found.dtype == dtype
        assert torch.selu(x).dtype == dtype
        torch.testing.assert_close(torch.selu(x), torch.selu(x.double()).to(dtype))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(fast_slope, slope)
    assert torch.equal(F.elu(x, alpha), expected)  # and gone afterwards


def test_layout_is_kept():
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert elu(x).is_contiguous(memory_format=torch.channels_last)


def test_the_fast_backend_trains_the_same_to_rounding_and_watching_changes_no_bit(tmp_path):
    eager, _, run = train(tmp_path / "a", **ALL)
    fast, status, other = train(tmp_path / "b", backend="fast", **ALL)
    silent = {**ALL, "record_first": 0, "every": 0}
    unwatched, _, _ = train(tmp_path / "c", backend="fast", **silent)
    assert status == "done"
    assert other.config.backend == "fast"
    close(fast, eager)
    assert weights(unwatched.model) == weights(fast.model)
    assert weights(eager.model) != weights(fast.model)  # or the backend was not there
    near(other.metrics(), run.metrics())


def close(found, expected):
    """Weights and running statistics to rounding."""
    state = found.model.state_dict()
    for name, value in expected.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-5)


def near(found, expected):
    """Metrics to rounding; NaN where they are NaN."""
    for name in ("grad_output", "grad_param", "output_second_moment", "perturbation", "skip_gain"):
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-3, err_msg=name)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_compiled_backend_trains_and_records_the_same_to_rounding(tmp_path):
    """One graph per state of the recorder, none broken; an epoch's smaller batch runs eagerly."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    asked = {**ALL, "batch_size": 36}  # 96 images: two whole batches and one of 24
    eager, _, run = train(tmp_path / "a", **asked)
    compiled, status, other = train(tmp_path / "b", backend="compile", **asked)
    assert status == "done"
    assert torch._dynamo.utils.counters["graph_break"] == {}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    close(compiled, eager)
    assert other.metrics()["step"].tolist() == run.metrics()["step"].tolist()
    near(other.metrics(), run.metrics())
    np.testing.assert_allclose(other.curve()["loss"], run.curve()["loss"], rtol=1e-4)


def test_the_loop_of_the_compiled_backend_runs(tmp_path, monkeypatch):
    """The same without the minutes that code generation takes."""
    whole = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", whole)
    torch._dynamo.reset()
    asked = {**ALL, "batch_size": 36}
    eager, _, run = train(tmp_path / "a", **asked)
    compiled, status, other = train(tmp_path / "b", backend="compile", **asked)
    assert status == "done"
    close(compiled, eager)
    near(other.metrics(), run.metrics())


def test_keeping_pages_changes_no_number():
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 8, 3)
    x = torch.randn(8, 3, 32, 32)
    before = copy.deepcopy(model)(x)
    assert disable_malloc_trim() in (True, False)
    assert torch.equal(model(x), before)
