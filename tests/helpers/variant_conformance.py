"""What every variant must do: inherit `VariantConformance` to test one of your own."""

import math
from functools import cache

import pytest
import torch

from resdiag.models.resnet import build_model
from resdiag.models.variants import VARIANTS
from resdiag.probe.forecast import forecast
from resdiag.theory.laws import LAWS
from resdiag.theory.prediction import predict


@cache
def digits(row, depth=20):
    """Theory beside one batch of digits."""
    return forecast(row.id, depth, data="digits", batch_size=32)


class VariantConformance:
    """Tests of one variant.

    A subclass has a fixture `row` that returns its `Variant`; it is registered for the test where
    it is not built in. Its law, if it names one, must be registered.
    """

    @pytest.fixture
    def row(self):
        raise NotImplementedError("a fixture that returns a Variant")

    @pytest.fixture(autouse=True)
    def _registered(self, row):
        with VARIANTS.added(row):
            yield

    def test_its_row_is_made_of_known_words_and_says_where_it_comes_from(self, row):
        assert row.branch.split("-").count("conv") == 2
        assert row.stem.split("-").count("conv") == 1
        assert row.after_add in ("relu", "elu", "none")
        assert row.source

    def test_every_parameter_gets_a_gradient_on_any_image_size(self, row):
        model = build_model(row.id, 8, width=0.5, seed=0)
        for size in (8, 32, 33):
            model.zero_grad()
            model(torch.randn(2, 3, size, size)).square().sum().backward()
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

    def test_it_names_a_law_that_is_registered_or_none(self, row):
        assert not row.law or row.law in LAWS
        assert predict(row.id, 20).basis

    def test_its_growth_per_block_is_predicted_within_a_tenth(self, row):
        pair = digits(row).growth_per_block
        assert not row.law or pair.measured == pytest.approx(pair.theory, rel=0.1)

    def test_its_gradient_ratio_is_predicted_within_a_factor_two_or_not_at_all(self, row):
        pair = digits(row).gradient_ratio
        assert math.isnan(pair.theory) or 0.5 <= pair.measured / pair.theory <= 2
