"""The measurements against closed forms, float64 twins and the laws they must obey."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resdiag.watch.base.functions import Call
from resdiag.watch.measure import changes, moments, reductions

SHAPES = [(6, 5), (4, 7, 5), (3, 5, 4, 2), (2, 3, 2, 4, 4), (1, 4), (1, 2, 3), (1, 3, 1, 1), (1, 1)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = {
    "plain": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def statistics(x):
    values = moments.statistics(x)
    assert values.dtype == torch.float64
    return dict(zip(moments.STATISTICS, values.tolist(), strict=True))


def twin(x):
    """The reference twin; a 5-d tensor has its channels where a 4-d one has them."""
    return reference.statistics(x.flatten(3) if x.dim() == 5 else x)


def assert_statistics(x, rtol=1e-5):
    got, want = statistics(x), twin(x)
    scale = math.hypot(want["channel_mean_rms"], want["channel_std"])
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=rtol, abs=3e-7 * scale), name


@pytest.fixture(params=["cpu", "accelerator"])
def path(request, as_on_an_accelerator):
    """Both ways of reducing: float32 where it can be checked, float64 from the start."""
    if request.param == "accelerator":
        as_on_an_accelerator()
    return request.param


# -- closed forms ----------------------------------------------------------------------------------


def test_gaussian_moments_come_out_within_the_sampling_error():
    mean, std, n = 0.7, 1.5, 200_000
    x = mean + std * draw(n, 8)
    got = statistics(x)
    assert got["mean"] == pytest.approx(mean, abs=4 * std / math.sqrt(8 * n))
    assert got["channel_std"] == pytest.approx(std, rel=4 / math.sqrt(2 * 8 * n))
    assert got["channel_mean_rms"] == pytest.approx(mean, abs=4 * std / math.sqrt(n))
    assert float(reductions.norm(x)) == pytest.approx(
        math.sqrt(8 * n * (mean**2 + std**2)), rel=5e-3
    )


def test_small_cases_are_exact():
    x = torch.tensor([[1.0, 10.0, -1.0], [3.0, 10.0, -1.0]])
    got = statistics(x)
    assert got["mean"] == pytest.approx(11 / 3, rel=1e-15)
    assert got["channel_mean_rms"] == pytest.approx(math.sqrt(105 / 3), rel=1e-15)
    assert got["channel_std"] == pytest.approx(math.sqrt(1 / 3), rel=1e-6)
    assert [got[f"mean_q{q}"] for q in (10, 50, 90)] == pytest.approx([-0.4, 2.0, 8.4], rel=1e-14)
    assert float(reductions.norm(torch.tensor([3.0, 4.0]))) == 5
    assert float(reductions.nonfinite_fraction(torch.tensor([1.0, math.inf, math.nan, 2.0]))) == 0.5


def test_a_zero_tensor_is_zero_everywhere(path):
    x = torch.zeros(3, 4, 2, 2)
    assert float(reductions.norm(x)) == 0
    assert moments.statistics(x).tolist() == [0] * 7
    assert float(changes.relative_change(x, x)) == 0
    assert float(reductions.gradient(x)[0]) == 0
    assert math.isnan(float(changes.share(x, x)))


# -- every shape, type and layout -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_equal_the_twin_in_every_shape_and_type(path, shape, dtype):
    assert_statistics(1 + draw(*shape, dtype=dtype))
    assert float(reductions.norm(draw(*shape, dtype=dtype))) == pytest.approx(
        reference.norm(draw(*shape, dtype=dtype)), rel=1e-6
    )


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_memory_layout_does_not_matter(path, layout):
    x, y = (LAYOUTS[layout](draw(4, 6, 8, 8) + shift) for shift in (0.0, 1.0))
    plain, other = x.contiguous(), y.contiguous()
    assert_statistics(x)
    assert float(reductions.norm(x)) == pytest.approx(float(reductions.norm(plain)), rel=1e-6)
    for a, b in ((x, y), (x, other), (plain, y)):
        assert float(changes.share(a, b)) == pytest.approx(
            float(changes.share(plain, other)), rel=1e-5
        )
        assert float(changes.relative_change(a, b)) == pytest.approx(
            float(changes.relative_change(plain, other)), rel=1e-5
        )


def test_millions_of_elements_lose_no_digits(path):
    x = 1 + draw(128, 16, 32, 32)
    assert_statistics(x, rtol=1e-6)
    assert float(reductions.norm(x)) == pytest.approx(reference.norm(x), rel=1e-6)


# -- extremes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", range(-37, 38, 2))
def test_nothing_overflows_or_vanishes_while_the_elements_are_finite(path, exponent):
    scale = 10.0**exponent
    x, y = draw(4, 6, 5, 5) * scale, (draw(4, 6, 5, 5) + 1) * scale
    assert x.isfinite().all()
    assert float(reductions.norm(x)) == pytest.approx(reference.norm(x), rel=1e-6)
    assert_statistics(y, rtol=2e-6)
    size, broken = reductions.gradient(x)
    assert float(size) == pytest.approx(2 * reference.norm(x), rel=1e-6)
    assert float(broken) == 0
    inner = float((reference.array(x) * reference.array(y)).sum()) / scale**2
    wanted = inner / (reference.norm(y) / scale) ** 2
    assert float(changes.share(x, y)) == pytest.approx(wanted, rel=1e-5)
    assert float(changes.relative_change(x, y)) == pytest.approx(
        reference.norm(x - y) / reference.norm(y), rel=1e-5
    )


def test_small_and_large_elements_together(path):
    x = torch.cat([torch.full((1, 1000), 1e-25), torch.full((1, 3), 1e25)], dim=1)
    assert float(reductions.norm(x)) == pytest.approx(math.sqrt(3) * 1e25, rel=1e-6)
    x = torch.full((1000, 1), 1e-25)
    assert float(reductions.norm(x)) == pytest.approx(math.sqrt(1000) * 1e-25, rel=1e-6)


@pytest.mark.parametrize("ratio", [3.0, 30.0, 300.0, 1e3, 1e4])
def test_a_mean_far_larger_than_the_spread_does_not_cancel(path, ratio):
    x = ratio + draw(16, 4, 16, 16).double()
    x = x.float()  # what float32 makes of it is the truth to be measured
    assert statistics(x)["channel_std"] == pytest.approx(twin(x)["channel_std"], rel=1e-4)


def test_constant_channels_have_no_spread(path):
    x = torch.full((8, 3, 4, 4), 0.1)
    assert statistics(x)["channel_std"] < 1e-9


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_elements_are_counted_and_visible(path, bad):
    x = torch.ones(2, 5)
    x[1, 2] = bad
    got = statistics(x)
    assert got["nonfinite"] == pytest.approx(0.1)
    assert not math.isfinite(got["mean"])
    assert not math.isfinite(got["mean_q50"])
    assert not math.isfinite(float(reductions.norm(x)))
    size, broken = reductions.gradient(x)
    assert not math.isfinite(float(size))
    assert float(broken) == pytest.approx(0.1)


def test_infinities_of_both_signs_are_counted(path):
    assert statistics(torch.tensor([[math.inf, -math.inf, 1.0, math.nan]]))["nonfinite"] == 0.75


# -- laws -----------------------------------------------------------------------------------------

scales = st.integers(-60, 60).map(lambda k: 2.0**k)
seeds = st.integers(0, 2**31)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, scale=scales, sign=st.sampled_from([-1.0, 1.0]))
def test_every_measure_scales_with_its_tensor(seed, scale, sign):
    """A power of two changes no digit, so that the equality is exact but for the float64 switch."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 4, 5, 3, generator=generator).unbind()
    x, y = x.unsqueeze(-1), y.unsqueeze(-1)
    once, many = moments.statistics(x), moments.statistics(sign * scale * x)
    assert many[1:3].tolist() == pytest.approx((scale * once[1:3]).tolist(), rel=1e-5)
    if sign > 0:
        slack = 1e-6 * scale
        for index in (0, 3, 4, 5):
            assert many[index].item() == pytest.approx(scale * once[index].item(), abs=slack)
    assert float(reductions.norm(scale * x)) == pytest.approx(
        scale * float(reductions.norm(x)), rel=1e-6
    )
    for ratio in (changes.relative_change, changes.share):
        assert float(ratio(scale * x, scale * y)) == pytest.approx(float(ratio(x, y)), rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, weight=st.floats(-3, 3))
def test_the_shares_of_the_parts_of_a_sum_add_up_to_one(seed, weight):
    generator = torch.Generator().manual_seed(seed)
    part, rest = torch.randn(2, 6, 7, generator=generator).unbind()
    total = weight * part + rest
    both = changes.share(weight * part, total) + changes.share(rest, total)
    assert float(both) == pytest.approx(1, abs=1e-4)
    assert float(changes.share(total, total)) == pytest.approx(1, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(copies=st.integers(2, 5), seed=seeds)
def test_the_gradient_of_a_mean_loss_does_not_depend_on_the_batch_size(copies, seed):
    """The same samples again: each sample's gradient of the mean falls as 1/B."""
    g = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    once, _ = reductions.gradient(g / 3)
    again, _ = reductions.gradient(g.repeat(copies, 1) / (3 * copies))
    assert float(again) == pytest.approx(float(once), rel=1e-5)


@pytest.mark.parametrize(
    ("function", "kind"), [(torch.relu, "relu"), (torch.nn.functional.elu, "elu")]
)
def test_slopes_equal_the_analytic_derivative(function, kind):
    u = torch.cat([draw(100), torch.tensor([-30.0, 30.0])])
    got = changes.slope(function, u)
    np.testing.assert_allclose(got.numpy(), reference.SLOPES[kind](reference.array(u)), rtol=1e-5)
    assert not got.requires_grad
    assert not u.requires_grad
    with torch.no_grad():
        assert torch.equal(changes.slope(function, u), got)


def test_no_measure_touches_its_tensor_or_its_graph():
    x = draw(3, 4).requires_grad_()
    y = x * 2
    before = y.detach().clone()
    for value in (reductions.norm(y), moments.statistics(y), changes.share(y, y)):
        assert not getattr(value, "requires_grad", False)
    assert torch.equal(y, before)
    assert y._version == 0


def test_one_sample_without_a_batch_dimension_and_an_empty_batch(path):
    x = draw(5)
    assert moments.statistics(x).tolist() == moments.statistics(x.unsqueeze(0)).tolist()
    assert moments.statistics(draw(0, 5)).isnan().all()
    assert float(reductions.norm(draw(0, 5))) == 0


# -- what a BatchNorm says of its output -----------------------------------------------------------


def normalise(x, gamma, beta, eps=1e-5):
    layer = torch.nn.BatchNorm2d(x.shape[1], eps=eps)
    with torch.no_grad():
        layer.weight.copy_(gamma)
        layer.bias.copy_(beta)
    return layer(x.requires_grad_())


@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("shift", [0.0, 1.0, 300.0])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_the_moments_of_a_normalised_tensor_need_not_be_read(eps, shift, memory):
    torch.manual_seed(3)
    x = (draw(6, 5, 4, 4) * 3 + 2).to(memory_format=memory)
    y = normalise(x, torch.tensor([1.0, 0.0, -2.0, 1e-3, 30.0]), shift + torch.randn(5), eps)
    known, read = moments.normalised(y).sums(), moments.reduce(y)
    assert known is not None
    np.testing.assert_allclose(
        moments.combine([known]).numpy(), moments.combine([read]).numpy(), rtol=2e-4, atol=1e-6
    )
    wanted = reference.statistics(y)
    for name, value in zip(moments.STATISTICS, moments.combine([known])[0].tolist(), strict=True):
        assert value == pytest.approx(wanted[name], rel=2e-4, abs=1e-6), name


def test_only_what_a_batch_norm_in_training_returned_is_taken_for_it():
    x, one, zero = draw(6, 5, 4, 4), torch.ones(5), torch.zeros(5)
    assert moments.normalised(x) is None
    assert moments.normalised(x.requires_grad_() * 2) is None
    y = normalise(x.detach(), one, zero)
    assert moments.normalised(y) is not None
    assert moments.normalised(y * 1) is None
    assert moments.normalised(y.add_(1)) is None
    layer = torch.nn.BatchNorm2d(5, affine=False)
    assert moments.normalised(layer(x)) is None
    layer = torch.nn.BatchNorm2d(5).eval()
    assert moments.normalised(layer(x)) is None
    layer = torch.nn.BatchNorm2d(5)
    layer.bias.requires_grad_(False)
    assert moments.normalised(layer(x)) is None
    # the variance overflows, the output does not; then an output that float32 squares cannot hold
    for y in (
        normalise(draw(6, 5, 4, 4) * 1e25, one, zero),
        normalise(x.detach(), one * 1e30, zero),
    ):
        assert moments.normalised(y).sums() is None
        assert moments.normalised(y).tensor() is y
        waiting = moments.normalised(y)
        y.add_(1)
        assert waiting.tensor() is None
    with torch.autograd.graph.save_on_cpu():  # reading what is saved would run these hooks
        assert moments.normalised(normalise(draw(6, 5, 4, 4), one, zero)) is None


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("where", ["input", "gamma", "beta"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_normalised_tensor_that_is_not_finite_is_known_without_reading_it(where, value):
    x, gamma, beta = draw(6, 5, 4, 4), torch.ones(5), torch.zeros(5)
    {"input": x[1, :, 0, 0], "gamma": gamma, "beta": beta}[where][2] = value
    y = normalise(x, gamma, beta)
    known, wanted = moments.normalised(y).sums(), reference.statistics(y)
    assert known.broken == pytest.approx(wanted["nonfinite"]) == 0.2
    got = moments.combine([known])[0].tolist()
    assert all(math.isnan(number) for number in got[:-1])


@pytest.mark.parametrize("name", ["relu", "elu", "celu", "gelu"])
def test_slopes_read_off_the_output_are_those_of_autograd(name):
    u = torch.cat([draw(200) * 4, torch.tensor([-80.0, -0.0, 0.0, 80.0])])
    for kwargs in ({}, {"inplace": True}, {"alpha": 0.5}):
        if kwargs and (name == "gelu" or (name == "relu" and "alpha" in kwargs)):
            continue
        call = Call(getattr(torch.nn.functional, name), (), kwargs)
        got = changes.slope_at((call,), u, call(u))
        torch.testing.assert_close(got, changes.slope(call, u), rtol=0, atol=1.2e-7)
