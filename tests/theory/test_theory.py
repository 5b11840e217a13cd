"""Closed forms against quadrature, recursions and walks against real networks: nothing fitted."""

import io
import tarfile
from dataclasses import replace
from math import comb
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import integrate

from resdiag.errors import UsageError
from resdiag.models.resnet import build_model
from resdiag.models.variants import (
    VARIANTS,
    Variant,
    find_variant,
    register_variant,
    unregister_variant,
)
from resdiag.theory import gradient_recursion, moments, walk_gradient
from resdiag.theory.depthlaw import depth_law
from resdiag.theory.geometry import ConvTaps, block_shapes, padding_share, uniform
from resdiag.theory.growth import grow
from resdiag.theory.laws import LAWS, Law, register_law, unregister_law
from resdiag.theory.normalised import NormalisedBranch
from resdiag.theory.prediction import critical_lr, predict, predict_run
from resdiag.theory.walk import WalkUnit, walk

ARCHIVE = Path(__file__).parents[3] / "shared" / "data" / "cifar10-jpeg.tar.gz"
WALKS = ("original", "elu_after", "elu")
SEEDS = (0, 1)


# --- moments ---------------------------------------------------------------------------------


def quadrature(function, q):
    """E[function(z)] for z ~ N(0, q), by adaptive quadrature split at the kink."""
    s = np.sqrt(q)

    def integrand(t):
        return function(s * t) * np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi)

    return sum(integrate.quad(integrand, *ends, epsabs=0)[0] for ends in [(-12, 0), (0, 12)])


def elu(z):
    return z if z > 0 else np.expm1(z)


def elu_derivative(z):
    return 1.0 if z > 0 else np.exp(z)


@pytest.mark.parametrize("q", [1e-6, 1e-3, 0.0049, 0.0051, 0.1, 1.0, 16.0, 400.0, 1e6])
@pytest.mark.parametrize(
    ("closed", "function"),
    [
        (moments.elu_mean, elu),
        (moments.elu_second_moment, lambda z: elu(z) ** 2),
        (moments.elu_slope_sq, lambda z: elu_derivative(z) ** 2),
        (moments.relu_mean, lambda z: max(z, 0)),
        (moments.relu_second_moment, lambda z: max(z, 0) ** 2),
        (moments.relu_slope_sq, lambda z: float(z > 0)),
    ],
)
def test_closed_forms_equal_quadrature(closed, function, q):
    # the mean of ELU cancels between the half-lines for small q: quadrature itself loses digits
    assert float(closed(q)) == pytest.approx(quadrature(function, q), rel=1e-6, abs=1e-12)


def test_moments_reproduce_the_published_table():
    q = np.array([0.01, 0.1, 1, 2, 4, 16])
    activation = moments.ACTIVATIONS["elu"]
    table = {
        "mean": (0.0024, 0.0213, 0.1605, 0.2780, 0.4660, 1.190),
        "second_moment": (0.0093, 0.0815, 0.6449, 1.2001, 2.2582, 8.360),
        "variance": (0.0093, 0.0811, 0.6192, 1.1228, 2.041, 6.944),
        "slope_sq": (0.929, 0.822, 0.668, 0.628, 0.594, 0.549),
    }
    for name, expected in table.items():
        np.testing.assert_allclose(getattr(activation, name)(q), expected, rtol=1e-3, atol=6e-5)


@given(st.floats(-60, 60).map(lambda exponent: 10.0**exponent))
def test_moments_stay_finite_and_between_their_limits(q):
    moment = float(moments.elu_second_moment(q))
    assert 0.5 * q * (1 - 1e-12) <= moment <= q * (1 + 1e-12)
    assert 0 <= float(moments.elu_mean(q)) <= float(moments.relu_mean(q))
    assert 0.5 <= float(moments.elu_slope_sq(q)) <= 1
    assert float(moments.ACTIVATIONS["elu"].variance(q)) > 0


@given(st.floats(-8, 8), st.floats(-4, 4).map(lambda exponent: 10.0**exponent))
def test_shifted_means_bound_the_unshifted_activation(a, v):
    shifted = float(moments.elu_shifted_mean(a, v))
    # Jensen: ELU is convex only piecewise, but it lies between -1 and ReLU
    assert max(-1.0, elu(a) - np.sqrt(v)) <= shifted + 1e-9
    assert shifted <= float(moments.relu_shifted_mean(a, v)) + 1e-9
    assert float(moments.elu_shifted_mean(0.0, v)) == pytest.approx(
        float(moments.elu_mean(v)), rel=1e-6, abs=1e-9
    )


@given(st.sampled_from(["elu", "relu"]), st.floats(-20, 20).map(lambda e: 10.0**e))
def test_input_variance_inverts_the_second_moment(name, q):
    activation = moments.ACTIVATIONS[name]
    assert activation.input_variance(float(activation.second_moment(q))) == pytest.approx(q)


@pytest.mark.parametrize(("size", "stride"), [(32, 1), (16, 1), (8, 1), (32, 2), (16, 2)])
def test_padding_share_is_the_share_of_taps_inside_the_image(size, stride):
    ones = torch.ones(1, 1, size, size)
    taps = torch.nn.functional.conv2d(ones, torch.ones(1, 1, 3, 3), stride=stride, padding=1)
    assert float(taps.mean()) / 9 == pytest.approx(padding_share(size), rel=1e-6)


# --- recursions and walks on their own -------------------------------------------------------


def test_large_scale_limit_of_b_is_2_and_of_a_is_2_90_without_padding():
    wide = {"width_px": 10**9, "width": np.inf}
    b = predict("elu_pre", 602, **wide)
    a = predict("elu_nobn", 602, **wide)
    assert b.forward_growth[195] == pytest.approx(2, rel=1e-3)
    assert b.grad_growth[195] == pytest.approx(2, rel=1e-3)
    assert a.forward_growth[195] == pytest.approx(2.90, rel=2e-3)


def test_small_scale_limit_of_a_and_b_is_5_without_padding():
    for variant in ("a", "b"):
        first = predict(variant, 20, s0=1e-12, m0=0, width=np.inf, width_px=10**9)
        assert first.forward_growth[0] == pytest.approx(5, rel=1e-3)
        assert first.grad_growth[0] == pytest.approx(5, rel=1e-3)


@pytest.mark.parametrize("depth", [20, 56, 110])
def test_a_grows_faster_than_b(depth):
    assert predict("a", depth).growth_per_block > predict("b", depth).growth_per_block


@pytest.mark.parametrize(
    ("variant", "depth", "moment"),
    [
        ("original", 20, 3.90), ("original", 56, 12.9), ("original", 110, 27.1),
        ("c", 56, 11.0), ("c", 110, 23.9), ("d", 56, 15.9), ("d", 110, 31.6),
    ],
)  # fmt: skip
def test_last_second_moments_are_the_published_ones(variant, depth, moment):
    got = predict(variant, depth)
    blocks = len(got.second_moment)
    # the table was made for another stem (s_0): a difference per block, not in total
    assert (got.second_moment[-1] / moment) ** (1 / blocks) == pytest.approx(1, abs=0.015)


@pytest.mark.parametrize(
    ("variant", "depth", "moment"),
    [
        ("a", 20, 87), ("a", 56, 9e9), ("a", 110, 6e20),
        ("b", 20, 52), ("b", 56, 2.6e6), ("b", 110, 9e12),
    ],
)  # fmt: skip
def test_growth_is_the_one_measured_on_cifar10_copies(variant, depth, moment):
    # geometric means of two networks on 64 images, measured with code that is not this project's
    got = predict(variant, depth)
    assert (got.second_moment[-1] / moment) ** (2 / (depth - 2)) == pytest.approx(1, abs=0.1)


def test_few_channels_slow_the_growth_and_the_border_too():
    for variant in ("a", "b"):
        narrow, wide, endless = (predict(variant, 56, width=w) for w in (1, 4, np.inf))
        assert narrow.growth_per_block < wide.growth_per_block < endless.growth_per_block
        assert (
            endless.growth_per_block
            < predict(variant, 56, width=np.inf, width_px=10**9).growth_per_block
        )
    # of the homogeneous part, <g, H>, less is left the more channels there are
    ratios = [predict("a", 56, width=w).gradient_ratio for w in (1, 16, np.inf)]
    assert ratios[0] > ratios[1] > ratios[2]


@pytest.mark.parametrize("variant", ["elu_nobn", "elu_pre"])
def test_euler_the_gradient_along_a_homogeneous_signal_is_kept(variant):
    shapes = block_shapes(20)
    pre = variant == "elu_pre"
    levels = grow(shapes, 1e8, 0.0 if pre else 2e3, pre=pre)
    back = gradient_recursion._back_pre if pre else gradient_recursion._back_post
    size = len(levels[-1].after_s)
    g = gradient_recursion.Gradient(
        along=np.full((size, size), 1e-3),
        level=np.zeros((size, size)),
        rest=np.ones((size, size)),
    )
    last = levels[-1]
    kept = last.channels * float((g.along * last.after_s).sum())
    for level in reversed(levels):
        g = back(level, gradient_recursion._uncorrected(level, g))
        now = level.channels * level.shape.kept * (g.along * level.s + g.level * level.m).sum()
        assert float(now) == pytest.approx(kept, rel=2e-3)


def test_euler_holds_for_the_reflected_walk_of_relu_without_norm():
    # exact but for the branch's ReLU: H is any law that is not negative
    h = np.array([0.0, 0.5, 3.0, 7.0])
    masses = np.array([0.4, 0.3, 0.2, 0.1])
    s, sigma = float(masses @ h**2), 2.0
    for shape in block_shapes(20):
        a, b, _ = walk_gradient._through((h, masses), shape, sigma, 0.5, (1.3, 0.4, 1.0))
        generator = np.random.default_rng(0)
        kept = generator.random(400_000) < shape.kept
        drawn = np.where(kept, generator.choice(h, 400_000, p=masses), 0.0)
        after = np.maximum(drawn + sigma * generator.standard_normal(400_000), 0.0)
        units = 2 if shape.transition else 1
        before = units * (a * s + b * float(masses @ h))
        expected = 1.3 * (after**2).mean() + 0.4 * after.mean()
        # <g, F> returns as a multiple of H only where the branch's variance is that of the law
        scale = shape.gain1 * shape.gain2 / 2 * s / sigma**2
        shortcut = (np.where(after > 0, 1.3 * after + 0.4, 0.0) * drawn).mean()
        assert before == pytest.approx(shortcut + (expected - shortcut) * scale, rel=0.02)


@pytest.mark.parametrize(("size", "stride"), [(8, 1), (8, 2), (16, 2), (200, 1)])
def test_scattering_is_the_adjoint_of_gathering(size, stride):
    generator = np.random.default_rng(0)
    taps = ConvTaps(size=size, stride=stride)
    x = uniform(size, 1.0) * generator.standard_normal(uniform(size, 1.0).shape)
    y = generator.standard_normal(taps.gather(x).shape)
    assert (taps.gather(x) * y).sum() == pytest.approx((x * taps.scatter(y)).sum())
    np.testing.assert_allclose(np.mean(taps.seen(x), axis=0), taps.gather(x), atol=1e-12)
    if size < 100:
        image = torch.from_numpy(x)[None, None]
        ones = torch.full((1, 1, 3, 3), 1 / 9, dtype=torch.float64)
        twin = torch.nn.functional.conv2d(image, ones, stride=stride, padding=1)[0, 0]
        np.testing.assert_allclose(taps.gather(x), twin.numpy(), atol=1e-12)


@pytest.mark.parametrize("q", [1e-2, 1.0, 30.0, 1e4])
@pytest.mark.parametrize(
    ("closed", "function"),
    [
        (moments.elu_cubed, lambda z: elu(z) ** 3),
        (moments.elu_fourth, lambda z: elu(z) ** 4),
        (moments.elu_times_slope, lambda z: elu(z) * elu_derivative(z)),
        (moments.elu_times_slope_sq, lambda z: elu(z) * elu_derivative(z) ** 2),
        (moments.elu_sq_times_slope_sq, lambda z: (elu(z) * elu_derivative(z)) ** 2),
    ],
)
def test_products_equal_quadrature(closed, function, q):
    assert float(closed(q)) == pytest.approx(quadrature(function, q), rel=1e-6)


def test_products_of_two_units_are_the_moments_where_they_are_one_or_two():
    assert moments.elu_kernel(2.0, 2.0) == pytest.approx(
        float(moments.elu_second_moment(2.0)), rel=1e-3
    )
    assert moments.elu_kernel(2.0, 0.0) == pytest.approx(float(moments.elu_mean(2.0)) ** 2)
    along = quadrature(lambda z: elu(z) * elu_derivative(z) * z, 2.0) / 2.0
    assert float(moments.elu_times_slope_along(2.0)) == pytest.approx(along)


def test_sum_of_d_is_the_stem_plus_one_per_block_and_halves_at_a_transition():
    got = predict("d", 32, s0=0.6)
    np.testing.assert_allclose(got.second_moment[:5], 0.6 + np.arange(1, 6))
    assert got.second_moment[5] == pytest.approx(5.6 / 2 + 1)


def skip_gain_from_zero(blocks):
    """C(2n, n) / 4^n: probability that a symmetric walk from 0 stays positive for n steps."""
    return comb(2 * blocks, blocks) / 4**blocks


@pytest.mark.parametrize("n", [1, 5, 9])
def test_reflected_walk_from_zero_has_the_distribution_free_skip_gain(n):
    unit = WalkUnit(after_add="relu", branch=NormalisedBranch())
    got = walk(unit, block_shapes(6 * n + 2), s0=1e-10)
    assert got["skip_gain"][n - 1] == pytest.approx(skip_gain_from_zero(n), rel=1e-3)
    assert got["skip_gain"][-1] == pytest.approx(skip_gain_from_zero(3 * n), rel=1e-3)


@pytest.mark.parametrize("variant", ["original", "elu_after"])
def test_walk_equals_its_monte_carlo_twin(variant):
    generator = np.random.default_rng(0)
    row, n, walkers = find_variant(variant), 5, 40_000
    relu = row.after_add == "relu"

    def phi(u):
        return np.maximum(u, 0) if relu else np.where(u > 0, u, np.expm1(u))

    got = predict(variant, 32, s0=0.5)
    q = moments.ACTIVATIONS[row.after_add].input_variance(0.5)
    h = phi(np.sqrt(q) * generator.standard_normal(walkers))
    gain, channels = np.ones(walkers), np.ones(walkers, bool)
    for block in range(3 * n):
        if block in (n, 2 * n):  # as many appended zero channels as there were channels
            h, gain = np.append(h, np.zeros_like(h)), np.append(gain, np.ones_like(gain))
            channels = np.append(channels, np.zeros_like(channels))
            keep = generator.permutation(len(h))[:walkers]
            h, gain, channels = h[keep], gain[keep], channels[keep]
        u = h + generator.standard_normal(len(h))
        h = phi(u)
        gain *= (u > 0) if relu else np.exp(np.minimum(u, 0))
        assert got.second_moment[block] == pytest.approx((h**2).mean(), rel=0.04)
        assert got.mean[block] == pytest.approx(h.mean(), rel=0.04)
        assert got.negative_fraction[block] == pytest.approx((u < 0).mean(), abs=0.01)
        assert got.perturbation[block] == pytest.approx(
            np.sqrt(((h - u) ** 2).mean() / (u**2).mean()), rel=0.04
        )
        assert got.skip_gain[block] == pytest.approx(gain[channels].mean(), rel=0.06)


def test_nothing_on_the_skip_path_is_exactly_nothing():
    for variant in ("a", "b", "d", "no_relu", "relu_pre"):
        got = predict(variant, 20)
        for name in ("perturbation", "identity_defect", "identity_drift"):
            assert (getattr(got, name) == 0).all()
        for name in ("skip_gain", "skip_gain_stage", "attenuation", "slope_mean"):
            assert (getattr(got, name) == 1).all()


def test_only_c_fails_to_be_an_identity_when_its_branch_is_zero():
    assert (predict("original", 20).identity_defect == 0).all()
    assert (predict("original", 20).identity_drift == 0).all()
    c = predict("c", 20)
    assert (c.identity_defect > 0).all()
    assert (np.diff(c.identity_drift[:3]) > 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("depth", [8, 20, 110])
def test_predictions_have_one_value_per_block(variant, depth):
    got = predict(variant, depth)
    for name in ("second_moment", "mean", "forward_growth", "grad_growth"):
        assert getattr(got, name).shape == ((depth - 2) // 2,)
        assert np.isfinite(getattr(got, name)).all()
    assert got.basis
    assert np.prod(got.grad_growth) == pytest.approx(got.gradient_ratio**2)
    total = got.second_moment[-1] / got.s0
    assert got.growth_per_block == pytest.approx(total ** (2 / (depth - 2)))


def test_theory_says_nothing_about_the_skip_path_of_a_plain_network():
    got = predict("plain", 20)
    assert got.series("skip_gain") is None
    assert got.series("output_second_moment") is not None


# --- a variant names its law -----------------------------------------------------------------


@pytest.fixture
def relu_first():
    """No normalisation and nothing after the addition, as a, but with ReLU in front."""
    row = Variant(
        id="relu_first", branch="relu-conv-relu-conv", after_add="none", stem="conv", head="relu",
        source="a test",
    )  # fmt: skip
    register_variant(row)
    yield row
    unregister_variant(row.id)


@torch.no_grad()
def test_a_variant_without_a_law_is_not_predicted_by_that_of_one_that_looks_alike(
    relu_first, noise
):
    got = predict(relu_first.id, 20)
    assert all(
        np.isnan(value).all() and value.shape == (9,)
        for value in vars(got).values()
        if isinstance(value, np.ndarray)
    )
    assert np.isnan([got.growth_per_block, got.gradient_ratio]).all()
    assert "names no law" in got.basis
    assert got.series("output_second_moment") is None
    # the law of a would have been wrong: each block adds a convolution's 2 E[ReLU^2] = E[x^2]
    moment, _ = measure(relu_first.id, 56, noise[:8])
    interior = growth_per_block(moment[:, 19:27])
    assert (interior < 2.05).all()
    assert predict("elu_nobn", 56).forward_growth[19:27].mean() > 2.3


def test_a_law_that_is_not_registered_predicts_nothing_and_is_named(relu_first):
    unregister_variant(relu_first.id)
    register_variant(replace(relu_first, law="elu_sumn"))
    got = predict(relu_first.id, 20)
    assert np.isnan(got.second_moment).all()
    assert "'elu_sumn', which is not registered" in got.basis


def test_a_registered_law_is_the_prediction_of_the_variants_that_name_it(relu_first):
    law = Law(
        name="doubling", unit=relu_first.branch, basis="Fixup",
        columns=lambda start: {"second_moment": start.s0 * 2.0 ** np.arange(1, 10)},
    )  # fmt: skip
    register_law(law)
    unregister_variant(relu_first.id)
    register_variant(replace(relu_first, law="doubling"))
    got = predict(relu_first.id, 20)
    unregister_law("doubling")
    assert got.growth_per_block == pytest.approx(2)
    assert got.basis == "Fixup"
    assert np.isnan(got.grad_growth).all()
    assert np.isnan(predict(relu_first.id, 20).growth_per_block)


def test_every_built_in_variant_names_a_law_that_was_derived_for_its_unit():
    for row in VARIANTS.values():
        branch, after = LAWS[row.law].unit.replace(" without a shortcut", "").split(", then ")
        assert (branch, after.replace("nothing", "none")) == (row.branch, row.after_add)
        assert row.shortcut != ("without a shortcut" in LAWS[row.law].unit)
    with pytest.raises(UsageError, match="already"):
        register_law(replace(LAWS["elu_sum"], basis="another"))


def test_the_prediction_of_a_run_is_that_of_its_images_width_and_stem():
    config = SimpleNamespace(variant="elu_pre", depth=20, width=0.5)
    blocks = [{"shape": [8, 64, 64]}]
    got = predict_run(config, blocks, s0=0.7, m0=0.1)
    wanted = predict("elu_pre", 20, s0=0.7, m0=0.1, width=0.5, width_px=64)
    np.testing.assert_array_equal(got.second_moment, wanted.second_moment)
    assert predict_run(config, blocks).s0 == predict("elu_pre", 20, width_px=64).s0
    for wrong in ({"depth": 0}, {"variant": "resnet50"}):
        assert predict_run(SimpleNamespace(**{**vars(config), **wrong}), blocks) is None


def test_a_wrong_name_or_depth_is_the_users_error():
    with pytest.raises(UsageError, match="did you mean 'elu_pre'"):
        predict("elu_prr", 20)
    with pytest.raises(UsageError, match="6n\\+2"):
        predict("elu", 21)


def test_heuristics_scale_as_documented():
    assert critical_lr(3.0) == pytest.approx(0.2)
    assert critical_lr(0.0) == np.inf


# --- against real networks -------------------------------------------------------------------


@pytest.fixture(scope="module")
def noise():
    return torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def photographs():
    if not ARCHIVE.exists():
        pytest.skip(f"{ARCHIVE} is not there: no real images to measure on")
    images = []
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            if member.name.endswith(tuple(f"000{i}.jpg" for i in range(7))):
                data = archive.extractfile(member)
                assert data is not None
                images.append(np.asarray(Image.open(io.BytesIO(data.read()))))
    x = torch.from_numpy(np.stack(images)[::2][:64]).permute(0, 3, 1, 2) / 255
    return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


def forward(variant, depth, seed, images):
    """Outputs of the stem and of every block, in train mode."""
    model = build_model(variant, depth, seed=seed).train()
    outputs = [model.stem(images)]
    for stage in model.stages:
        for block in stage:
            outputs.append(block(outputs[-1]))
    return model, outputs


@torch.no_grad()
def measure(variant, depth, images, seeds=SEEDS):
    """E[H_l^2] and E[H_l] from the stem on, one row per seed."""
    runs = [forward(variant, depth, seed, images)[1] for seed in seeds]
    moment = [[h.double().square().mean().item() for h in run] for run in runs]
    mean = [[h.double().mean().item() for h in run] for run in runs]
    return np.array(moment), np.array(mean)


def growth_per_block(moment):
    return (moment[..., -1] / moment[..., 0]) ** (1 / (moment.shape[-1] - 1))


@pytest.mark.parametrize("depth", [20, 56, 110])
def test_growth_of_a_and_b_is_the_recursions_and_b_is_milder(depth, noise):
    measured = {}
    for variant in ("elu_nobn", "elu_pre"):
        moment, mean = measure(variant, depth, noise)
        theory = predict(variant, depth, s0=moment[:, 0].mean(), m0=mean[:, 0].mean())
        measured[variant] = growth_per_block(moment)
        np.testing.assert_allclose(measured[variant], theory.growth_per_block, rtol=0.1)
    assert (measured["elu_pre"] < measured["elu_nobn"]).all()


@pytest.mark.parametrize("depth", [20, 56, 110])
@pytest.mark.parametrize("variant", WALKS)
def test_second_moment_of_every_block_is_the_walks(variant, depth, noise):
    moment, mean = measure(variant, depth, noise)
    theory = predict(variant, depth, s0=moment[:, 0].mean(), m0=mean[:, 0].mean())
    np.testing.assert_allclose(moment.mean(0)[1:], theory.second_moment, rtol=0.1)
    np.testing.assert_allclose(mean.mean(0)[1:], theory.mean, rtol=0.1, atol=0.06)


@pytest.mark.images
@pytest.mark.parametrize("variant", ["elu_nobn", "elu_pre", *WALKS])
def test_theory_holds_on_photographs(variant, photographs):
    moment, mean = measure(variant, 56, photographs)
    theory = predict(variant, 56, s0=moment[:, 0].mean(), m0=mean[:, 0].mean())
    np.testing.assert_allclose(growth_per_block(moment), theory.growth_per_block, rtol=0.1)
    if variant in WALKS:
        assert moment[:, -1].mean() == pytest.approx(theory.second_moment[-1], rel=0.1)


def test_growth_of_relu_without_norm_is_the_walks_on_average_over_seeds(noise):
    # channels have a common sign: one network's E[H^2] is log-normal with deviation 0.9 at depth 20
    moment, _ = measure("relu_nobn", 20, noise[:8], seeds=range(16))
    theory = predict("relu_nobn", 20, s0=moment[:, 0].mean())
    assert growth_per_block(moment).mean() == pytest.approx(theory.growth_per_block, rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["original", "elu_after"])
def test_skip_gain_and_perturbation_are_the_walks(variant, noise):
    sums = []
    theory = predict(variant, 20)
    gains = []
    for seed in SEEDS:
        model = build_model(variant, 20, seed=seed).train()
        handles = [
            block.after_add.register_forward_pre_hook(lambda _, args: sums.append(args[0].clone()))
            for stage in model.stages
            for block in stage
        ]
        assert len(handles) == 9
        model(noise)
        gain = torch.ones(1, 1, 32, 32)
        for u in sums[-9:]:
            slope = (u > 0).float() if variant == "original" else u.clamp(max=0).exp()
            stride = gain.shape[-1] // u.shape[-1]
            gain = gain[..., ::stride, ::stride]
            gain = gain * slope[:, :16]
        gains.append(gain.mean().item())
    assert np.mean(gains) == pytest.approx(theory.skip_gain[-1], rel=0.1)
    u = torch.stack([sums[8], sums[17]])
    h = u.clamp(min=0) if variant == "original" else torch.nn.functional.elu(u)
    defect = ((h - u).norm() / u.norm()).item()
    assert defect == pytest.approx(theory.perturbation[-1], rel=0.1)


@pytest.mark.parametrize(
    ("variant", "low", "high"),
    [
        ("elu_nobn", 0.5, 2.0),
        ("elu_pre", 0.7, 1.5), ("original", 0.6, 1.5), ("elu_after", 0.6, 1.5), ("elu", 0.6, 1.5),
        ("no_relu", 0.6, 1.5), ("relu_pre", 0.6, 1.5), ("relu_nobn", 0.6, 1.5), ("plain", 0.6, 1.5),
    ],
)  # fmt: skip
def test_gradient_ratio_is_predicted_within_its_documented_bounds(variant, low, high, noise):
    model, outputs = forward(variant, 20, 0, noise)
    logits = model.classifier(model.pool(model.head(outputs[-1])).flatten(1))
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(64) % 10)
    first, last = torch.autograd.grad(loss, [outputs[0], outputs[-1]])
    moment = outputs[0].double().square().mean().item()
    theory = predict(variant, 20, s0=moment, m0=outputs[0].mean().item())
    ratio = (first.double().norm() / last.double().norm()).item() / theory.gradient_ratio
    assert low <= ratio <= high


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "kind"),
    [("a", "geometric"), ("b", "geometric"), ("d", "additive"), ("no_relu", "additive")],
)
def test_the_depth_law_of_a_stage_is_told_from_its_branches(variant, kind, noise):
    model = build_model(variant, 44, seed=0).train()
    x, moments_, ratios = model.stem(noise[:16]), [], []
    for block in model.stages[0]:
        after = block(x)
        moments_.append(after.double().square().mean().item())
        ratios.append((block.branch(x).norm() / x.norm()).item())
        x = after
    law = depth_law(moments_, ratios)
    assert law.kind == kind
    deeper = predict(variant, 86)  # stages of 14 blocks, twice as long
    expected = deeper.second_moment[13] / deeper.s0
    rate = 14 if kind == "geometric" else 1
    assert (law.growth_at_twice / expected) ** (1 / rate) == pytest.approx(1, rel=0.2)


def test_no_depth_law_is_told_from_too_little():
    assert depth_law([1.0, 2.0], [1.0, 1.0]).kind == "unknown"
    assert depth_law([1.0] * 5, [0.0] * 5).kind == "unknown"
    assert "less than" in depth_law([1.0, 1.01, 1.02, 1.03], [0.1] * 4).reason
